"""What is measured: a learned optimizer by name or file, or any torch optimizer, with options.

``mnist-mlp``, ``mine.safetensors``, ``Adam:lr=1e-3,betas=(0.9,0.95)``, ``package.module:Class:lr=0.1,schedule=cosine``.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...kernels.checks import one_of
from ...networks import pretrained, trained
from ...networks.lstm import CoordinatewiseLSTM
from ...networks.shipped import path_of
from ...optim.optimizer import LearnedOptimizer
from ..baselines.schedules import SCHEDULES
from ..experiments.report import weights_digest
from .running import Make

_OPTIONS = re.compile(r"(?P<target>.+?)(?::(?P<options>\s*\w+\s*=.*))?", re.S)
_DOTTED = re.compile(r"\w+(\.\w+)*(:\w+)?")
_ENDING = ".safetensors"


@dataclass(frozen=True)
class Contender:
    """An optimizer under measurement.

    Attributes:
        name: for tables.
        make: of a network's parameters and the run's length, an optimizer.
        schedule: what the suite multiplies its rates by, see :func:`~..baselines.schedules.factor`.
        identity: what its runs are kept under: another optimizer of the same name must have another one. Empty: runs
            are not kept.
    """

    name: str
    make: Make
    schedule: str = "constant"
    identity: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name: expected a word, got {self.name!r}")
        if not callable(self.make):
            raise TypeError(f"make: expected a function (parameters, steps) -> Optimizer, got {self.make!r}")
        one_of("schedule", self.schedule, SCHEDULES)


def parse(text: str) -> Contender:
    """The contender that a text names: a pretrained optimizer, a ``.safetensors`` file, a class of ``torch.optim``
    (``Adam``, ``torch.optim.Adam``), or any other class or function of parameters and options (``package.Class`` or
    ``package.module:Class``); behind a colon its options as in a call, and ``schedule``, which the suite applies.

    Raises:
        ValueError: there is nothing of that name, options that cannot be read, or a network that is not for all
            parameters. The message lists what there is.
        FileNotFoundError: no such file.
        TypeError: options that it does not take.
    """
    if not isinstance(text, str):
        raise TypeError(f"contender: expected a text, got {text!r}")
    target, options = text, {}
    if not Path(text).is_file():
        matched = _OPTIONS.fullmatch(text)
        if matched is None:
            raise ValueError(f"contender: expected NAME or NAME:option=value,..., got {text!r}")
        target, options = matched["target"], _read_options(text, matched["options"] or "")
    schedule = one_of(f"{text}: schedule", options.pop("schedule", "constant"), SCHEDULES)
    if target in pretrained.names() or target.endswith(_ENDING) or Path(target).is_file():
        path = path_of(target) if target in pretrained.names() else Path(target)
        make, digest = _learned(target, path, options)
    else:
        make, digest = _by_hand(target, options)
    _try(text, make)
    identity = f"{_without_folder(text)} {digest}".strip()
    return Contender(_without_folder(text), make, schedule, identity)


def _without_folder(text: str) -> str:
    return os.path.basename(text) if Path(text).is_file() else text


def _read_options(text: str, options: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({options})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(each.arg is None for each in call.keywords):
            raise ValueError("expected option=value, ...")
        # A word without quotes is taken as one: schedule=cosine.
        return {
            str(each.arg): each.value.id if isinstance(each.value, ast.Name) else ast.literal_eval(each.value)
            for each in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"contender: the options of {text!r} cannot be read: {error}") from None


def _learned(name: str, path: Path, options: dict[str, Any]) -> tuple[Make, str]:
    """How to make it, and a digest of the network: its options and weights, whatever else its file tells."""
    net = trained.load(path)
    if not isinstance(net, CoordinatewiseLSTM):
        kinds = ", ".join(net)
        raise ValueError(f"contender: {name!r} has a network for each of {kinds}; the suite needs one for all")

    def make(parameters: Iterable[nn.Parameter], steps: int) -> Optimizer:
        return LearnedOptimizer(parameters, net, total_steps=steps, **options)

    return make, hashlib.sha256((json.dumps(net.options()) + weights_digest(net)).encode()).hexdigest()


def _by_hand(target: str, options: dict[str, Any]) -> tuple[Make, str]:
    """How to make it, and a digest of the code that it comes from, where that is not torch's."""
    found, module = _find(target)

    def make(parameters: Iterable[nn.Parameter], steps: int) -> Optimizer:
        return found(parameters, **options)

    return make, _digest_of_code(found, module)


def _digest_of_code(found: Any, module: str) -> str:
    """Of the files that it was looked up in, and that it and what it inherits from are defined in, torch's apart; ""
    if that is all of it."""
    names = {module, getattr(found, "__module__", None) or module}
    names |= {each.__module__ for each in inspect.getmro(found)} if inspect.isclass(found) else set()
    digest, seen = hashlib.sha256(), False
    for name in sorted(names):
        if name.partition(".")[0] in ("torch", "builtins", "typing", "abc"):
            continue
        origin = getattr(sys.modules.get(name), "__file__", None)
        if origin and Path(origin).is_file():
            digest.update(Path(origin).read_bytes())
            seen = True
    return digest.hexdigest() if seen else ""


def _find(target: str) -> tuple[Callable[..., Optimizer], str]:
    """The class or function, and the module that it was looked up in."""
    if not _DOTTED.fullmatch(target):
        raise ValueError(f"contender: expected the name of an optimizer, got {target!r}")
    module, name = target.split(":") if ":" in target else target.rpartition(".")[::2]
    module = module or "torch.optim"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"contender: {target!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"contender: {module} has no optimizer {name!r}{_hint(name, module)}")
    return found, module


def _hint(name: str, module: str) -> str:
    if module != "torch.optim":
        return ""
    classes = [each for each in dir(torch.optim) if isinstance(getattr(torch.optim, each), type)]
    classes = [each for each in classes if each != "Optimizer"]
    names = [*pretrained.names(), *classes]
    close = difflib.get_close_matches(name, names, 1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{meant}; there are {', '.join(names)}, .safetensors files, and classes by package.module:Class"


def _try(text: str, make: Make) -> None:
    """Say now, not after minutes, what an optimizer does not take."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    try:
        optimizer = make([parameter], 10)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected an Optimizer, got {type(optimizer).__name__}")
        optimizer.step()
    except (TypeError, ValueError, NotImplementedError, RuntimeError, KeyError) as error:
        raise TypeError(f"contender: {text!r}: {error}") from error
