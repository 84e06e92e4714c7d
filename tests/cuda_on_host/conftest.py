"""The short form of these tests runs by default; L2L_FAST_FULL=1, or -m with "slow" in it, adds those marked slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: runs with L2L_FAST_FULL=1 or when selected with -m")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("L2L_FAST_FULL") == "1" or "slow" in config.getoption("markexpr"):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="full form only: L2L_FAST_FULL=1"))
