"""Sums over tensors' coordinates on CUDA, run on the CPU: against the operator there, whose tests have an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2l_fast.kernels import operators, state_types
from l2l_fast.kernels.config import Config

from .kernels import BFLOAT16, FLOAT16, FLOAT32, Kernels, Tensor, from_bits, to_bits
from .normalized_kernels import Network, NormalizedKernels

DEVICE = "sm_90,multiprocessors=2"  # for the fixture `kernels`
TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
# Around tiles and slices of 64 tiles; the last has more tiles than a launch has blocks at a time.
SHAPES = [(63,), (), (0,), (64,), (5, 13), (64 * 64,), (64 * 64 + 1,), (3, 4, 1000), (200_003,)]


def bytes_of(state: torch.Tensor) -> np.ndarray:
    return (state.view(torch.int16) if state.dtype is torch.bfloat16 else state).numpy()


class Case:
    """Tensors of many shapes and dtypes, with states of a type, and what both sides make of them."""

    def __init__(self, kind: str, sizes: tuple[int, int] = (4, 1), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.config = Config(*sizes, "normalized", 10.0, 0.1, betas=(0.9, 0.99, 0.95, 0.999))
        self.kind, self.ages = kind, [int(age) for age in rng.integers(1, 9, len(SHAPES))]
        self.ages[0], self.ages[-1] = 1, 7
        self.dtypes = [(FLOAT32, BFLOAT16, FLOAT16)[k % 3] for k in range(len(SHAPES))]
        self.values = [
            [(rng.standard_normal(shape) * 10 ** rng.uniform(-2, 1, shape)).astype(np.float32) for shape in SHAPES]
            for _ in range(2)
        ]
        self.states = []
        for shape, age in zip(SHAPES, self.ages, strict=True):
            numel = int(np.prod(shape))
            rows = torch.zeros((numel + 63) // 64, self.config.rows, 64)
            if age > 1:
                rows[:, -4:] = torch.from_numpy(rng.standard_normal(rows[:, -4:].shape)).float()
                rows[:, -2:].abs_()
            if age > 1 and numel % 64:
                rows[-1, :, numel % 64 :] = 1e5  # whatever is in the padding
            dtype = state_types.STATE_DTYPES[kind]
            self.states.append(rows if kind == "float32" else state_types.encode(rows, self.config, dtype, numel, 1))

    def expected(self, maximize: bool) -> torch.Tensor:
        rounded = [
            [from_bits(to_bits(each, dtype), dtype) for each, dtype in zip(group, self.dtypes, strict=True)]
            for group in self.values
        ]
        params, grads = ([torch.from_numpy(np.array(each)) for each in group] for group in rounded)
        return operators.tensor_sums(params, grads, self.states, self.config, maximize, self.ages)

    def found(self, kernels: Kernels, maximize: bool, **layout) -> np.ndarray:
        library = kernels.library
        params, grads = (
            [Tensor(library, each, dtype, **layout) for each, dtype in zip(group, self.dtypes, strict=True)]
            for group in self.values
        )
        states = [library.array(bytes_of(state)) for state in self.states]
        net = Network(self.config.hidden_size, self.config.num_layers, 0, np.zeros(0), 0.1, self.config.betas)
        types = [TYPES[self.kind]] * len(states)
        return NormalizedKernels(library).tensor_sums(net, params, grads, states, types, self.ages, maximize)


def agree(found: np.ndarray, expected: torch.Tensor) -> None:
    want = expected.numpy()
    size = np.sqrt(want[:, 1] * want[:, 3])  # of the sum of products, which may cancel
    assert np.all(np.abs(found[:, :4] - want[:, :4]) <= 1e-6 * np.abs(want[:, :4]))
    assert np.all(np.abs(found[:, 4] - want[:, 4]) <= 1e-6 * size)
    assert np.array_equal(found[:, 5], want[:, 5])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_sums(kernels, kind, maximize):
    case = Case(kind)
    found = case.found(kernels, maximize)
    agree(found, case.expected(maximize))
    assert np.array_equal(found, case.found(kernels, maximize))


def test_any_strides_and_networks_without_layers(kernels):
    case = Case("bfloat16", (0, 0))
    agree(case.found(kernels, False, step=3, offset=1), case.expected(False))


def test_what_is_not_finite_counts_as_zero(kernels):
    sums = []
    for spoilt in (False, True):
        case = Case("float32")
        for group in case.values:
            group[-1][:3] = (np.nan, np.inf, -np.inf) if spoilt else 0.0
        case.states[-1][0, -4:, 7] = np.nan if spoilt else 0.0
        sums.append(case.found(kernels, False))
    assert np.isfinite(sums[1]).all()
    assert np.allclose(sums[0], sums[1], rtol=1e-12, atol=0)


def test_as_many_tensors_as_do_not_fit_into_arguments(kernels):
    """Their table goes to device memory."""
    library, count = kernels.library, 400
    rng = np.random.default_rng(0)
    net = Network(4, 1, 0, np.zeros(0))
    values = [rng.standard_normal(5).astype(np.float32) for _ in range(count)]
    params, grads = ([Tensor(library, sign * each) for each in values] for sign in (1, 2))
    states = [library.array(np.zeros((1, 12, 64), np.float32)) for _ in values]
    found = NormalizedKernels(library).tensor_sums(net, params, grads, states, [0] * count, [1] * count)
    squares = np.array([np.square(each.astype(np.float64)).sum() for each in values])
    assert np.allclose(found[:, 0], squares, rtol=1e-12) and np.allclose(found[:, 1], 4 * squares, rtol=1e-12)
    assert not found[:, 3:5].any() and (found[:, 5] == 5).all()
