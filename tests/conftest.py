"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import l2l_fast as l2l

# Time limits make tests fail on a busy machine, and a fixed seed makes a red run repeatable.
settings.register_profile(
    "l2l_fast",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("l2l_fast")


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    """A fixed seed before, and the thread count and instruction set as they were after every test."""
    torch.manual_seed(0)
    threads, isa = torch.get_num_threads(), l2l._C.isa()
    yield
    torch.set_num_threads(threads)
    l2l._C.set_isa(isa)


# Of avx512bf16 all but the steps with bfloat16 products are avx512's very kernels; tests/test_precision.py has those.
@pytest.fixture(params=[name for name in l2l._C.isa_available() if name != "avx512bf16"])
def isa(request: pytest.FixtureRequest) -> str:
    """Runs the test once per instruction set of this build and machine."""
    l2l._C.set_isa(request.param)
    return request.param
