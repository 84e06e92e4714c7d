"""Microbenchmarks under pytest-benchmark: ``python -m pytest bench``. Not part of the tests."""

import pytest
import torch

from l2l_fast import _C


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="threads of the operators (default 1)")
    parser.addoption("--coordinates", type=int, default=65536, help="coordinates where a benchmark has one size")


@pytest.fixture(autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def n(request):
    return request.config.getoption("--coordinates")


@pytest.fixture(params=_C.isa_available()[::-1])
def isa(request):
    """Every instruction set of this machine in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def measure(benchmark):
    """``measure(function, coordinate_steps)``: benchmark it; the JSON also gets ns per coordinate and step."""

    def run(function, coordinate_steps):
        benchmark(function)
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info["ns_per_coordinate_step"] = benchmark.stats["median"] * 1e9 / coordinate_steps

    return run
