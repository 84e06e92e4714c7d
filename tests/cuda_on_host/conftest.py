"""The short form of these tests runs by default; L2L_FAST_FULL=1, or -m with "slow" in it, adds those marked slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .kernels import SHORT_FLAGS, SOURCE, Kernels
from .library import Library


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: runs with L2L_FAST_FULL=1 or when selected with -m")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("L2L_FAST_FULL") == "1" or "slow" in config.getoption("markexpr"):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="full form only: L2L_FAST_FULL=1"))


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """A few sizes of network, on the device that the module names."""
    library = Library.build([SOURCE], flags=SHORT_FLAGS)
    library.set_device(getattr(request.module, "DEVICE", "sm_90,multiprocessors=1"))
    return Kernels(library)


@pytest.fixture(scope="module")
def all_kernels() -> Kernels:
    """All sizes of network."""
    library = Library.build([SOURCE])
    library.set_device("sm_90,multiprocessors=1")
    return Kernels(library)
