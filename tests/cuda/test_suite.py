"""The device-independent tests of the suite, on a GPU.

Every test of the modules below runs as it is, on CUDA tensors (placement.py), but for those named here with the reason.
Networks of sizes that are not compiled for CUDA are skipped; test_operators.py has all sizes that are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from tests import (
    helpers,
    test_network,
    test_ops,
    test_ops_errors,
    test_ops_segment,
    test_ops_torch,
    test_optimizer,
    test_segment,
    test_state,
)
from tests.cuda.placement import Placement

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OPERATORS = (test_ops, test_ops_errors, test_ops_segment, test_ops_torch)
MODULES = (test_state, test_network, *OPERATORS, test_optimizer, test_segment)
COMPILED = ((4, 8, 16, 20, 32), (1, 2, 3))

#: Tests that stay on the CPU, as regular expressions of their names.
LEFT_OUT = {
    "no tensors, or no kernels": r"test_\w*(rejects|repr|initialisation|constructor|swapped|damage|phi_is_)\w*"
    r"|test_default_is_the_network_of_the_paper|test_unknown_device_is_named|test_layout_is_the_one_the_kernels_use"
    r"|test_what_communicates_is_checked_before_writing|test_averages_of_a_segment_are_checked",
    "files": r"test_\w*(save|load)_?\w*",
    "the CPU's own": r"test_elementary_functions|test_opcheck_vector_math|test_\w*meta_tensors|test_after_fork"
    r"|test_denormals\w*|test_import_\w*|test_environment_\w*|test_zeros|test_clone_detach_to",
    "the CPU's random numbers": r"test_from_lstm_cells_does_not_touch_the_random_state",
    "names device cpu; see test_torch.py": r"test_grad_scaler|test_trains_a_model_under_autocast"
    r"|test_an_in_place_step_names_the_tensor_on_another_device",
    "compiled; see test_torch.py": r"test_\w*(compiled_|torch_compile)\w*",
}


def collect(modules: tuple[ModuleType, ...]) -> Iterator[tuple[str, object]]:
    """The tests under names of their own: modules share some."""
    for module in modules:
        for name, test in inspect.getmembers(module, inspect.isfunction):
            chosen = name.startswith("test_") and test.__module__ == module.__name__
            if chosen and not any(re.fullmatch(pattern, name) for pattern in LEFT_OUT.values()):
                yield f"{module.__name__.rpartition('.')[2]}_{name.removeprefix('test_')}", test


globals().update(collect(MODULES))


@pytest.fixture
def isa() -> str:
    """Instead of the CPU's instruction sets: once is enough."""
    return "gpu"


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    original = helpers.random_network

    def compiled_only(*args, **options):
        size = options.get("hidden_size", 20), options.get("num_layers", 2)
        if size[0] not in COMPILED[0] or size[1] not in COMPILED[1]:
            pytest.skip(f"hidden_size={size[0]}, num_layers={size[1]} are not compiled for CUDA")
        return original(*args, **options)

    for module in MODULES:
        if hasattr(module, "random_network"):
            monkeypatch.setattr(module, "random_network", compiled_only)
    with Placement("cuda"):
        yield
