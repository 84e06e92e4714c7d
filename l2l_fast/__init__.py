"""l2l_fast: learned optimizers (Andrychowicz et al. 2016) with fused kernels.

Use a trained one::

    net = l2l_fast.load_pretrained("mnist-mlp")        # or l2l_fast.load("optimizer.safetensors")
    opt = l2l_fast.LearnedOptimizer(model.parameters(), net)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (the extension links against the libraries that this loads)

from .kernels.version import VERSION as __version__

try:
    from . import _C as _C
except ImportError as error:
    if "L2L_FAST_ISA" in str(error):  # an unknown instruction set, not a missing build
        raise ValueError(str(error)) from None
    raise ImportError(
        f"l2l_fast's compiled extension could not be loaded ({error}). Build it for the installed torch "
        f"({torch.__version__}) from the source folder: pip install --no-build-isolation -e ."
    ) from error
if getattr(_C, "version", None) != __version__:  # None: built before extensions said which they are
    raise ImportError(
        f"l2l_fast is version {__version__}, but its compiled extension is "
        f"{'version ' + _C.version if hasattr(_C, 'version') else 'an older one'} ({_C.__file__}). Rebuild it from the "
        "source folder: pip install --no-build-isolation -e ."
    )

from .kernels import moved, reference
from .kernels import operators as ops
from .kernels.config import Config, GacConfig
from .kernels.state import State
from .networks.lstm import CoordinatewiseLSTM
from .networks.ntm_bfgs import NTMBFGS
from .networks.orthogonal import OrthogonalLSTM
from .optim.optimizer import LearnedOptimizer

moved.install(__name__)

if TYPE_CHECKING:
    from . import meta, problems
    from .evaluation import baselines, decisions, experiments, plots
    from .meta import MetaTrainer
    from .networks import interchange, pretrained, trained
    from .networks.pretrained import list_pretrained, load_pretrained
    from .networks.trained import load
    from .problems import data, dni

__all__ = [
    "Config",
    "CoordinatewiseLSTM",
    "GacConfig",
    "LearnedOptimizer",
    "MetaTrainer",
    "NTMBFGS",
    "OrthogonalLSTM",
    "State",
    "baselines",
    "data",
    "decisions",
    "dni",
    "experiments",
    "interchange",
    "list_pretrained",
    "load",
    "load_pretrained",
    "meta",
    "ops",
    "plots",
    "pretrained",
    "problems",
    "reference",
    "trained",
]

# What deployment does not need (data sets, plots, meta-training) is imported when first asked for.
_LAZY_MODULES = {**moved.MOVED, "meta": "meta", "problems": "problems"}
_LAZY_NAMES = {
    "MetaTrainer": "meta",
    "list_pretrained": "networks.pretrained",
    "load": "networks.trained",
    "load_pretrained": "networks.pretrained",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{_LAZY_MODULES[name]}", __name__)
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
