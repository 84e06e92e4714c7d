"""Back-propagation in csrc/cuda on the CPU, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2l_fast.kernels import reference
from l2l_fast.kernels.config import Config as ReferenceConfig

from .kernels import BFLOAT16, FLOAT16, FLOAT32, TILE, Config, Kernels, Tensor, from_bits, to_bits
from .test_kernels import (
    ALL_SIZES,
    SHORT_SIZES,
    assert_close,
    blocked,
    inside,
    logical,
    random_gradient,
    random_phi,
    random_state,
)


def joined_state(
    config: Config, states: list[np.ndarray], numels: list[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layers = zip(*(logical(config, state, n) for state, n in zip(states, numels)))
    return [(torch.cat([h for h, _ in pairs]), torch.cat([c for _, c in pairs])) for pairs in layers]


class Segment:
    """Random tensors, records and coefficients of a segment, with what the reference makes of them."""

    def __init__(self, config: Config, numels: list[int], steps: int, seed: int, end: bool) -> None:
        rng = np.random.default_rng([seed, steps])
        self.config, self.numels = config, numels
        self.phi = random_phi(config, rng)
        self.states = [random_state(config, n, rng) for n in numels]
        self.ends = [random_state(config, n, rng) for n in numels] if end else None
        tiles = [state.shape[0] for state in self.states]
        self.record_tiles = [1 + sum(tiles[:k]) for k in range(len(tiles))]
        grads = [[random_gradient((n,), rng) for n in numels] for _ in range(steps + 1)]
        self.records = []
        for at_step in grads:
            record = np.zeros((1 + sum(tiles)) * TILE, np.float32)
            for first, g in zip(self.record_tiles, at_step):
                record[first * TILE : first * TILE + g.size] = g
            self.records.append(record)
        self.weights = rng.uniform(0.2, 1, steps).tolist()
        self.lrs = rng.uniform(0.1, 1, steps).tolist()
        self.decays = rng.uniform(0.8, 1, steps).tolist()
        # Coordinates are independent: to the reference all tensors are one.
        joined = [joined_state(config, self.states, numels)]
        grad_phi, starts = reference.segment_backward(
            joined,
            [[torch.from_numpy(np.concatenate(at_step)).double()] for at_step in grads],
            self.weights,
            self.lrs,
            self.decays,
            torch.from_numpy(self.phi).double(),
            ReferenceConfig(*config),
            [joined_state(config, self.ends, numels)] if self.ends else None,
        )
        bounds = np.cumsum([0, *numels])
        self.grad_phi = grad_phi.numpy()
        self.grad_starts = [blocked([(h[a:b], c[a:b]) for h, c in starts[0]]) for a, b in zip(bounds[:-1], bounds[1:])]

    def run(self, kernels: Kernels, scratch_budget: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
        return kernels.segment_backward(
            self.config,
            self.phi,
            self.states,
            self.numels,
            self.record_tiles,
            self.records,
            self.weights,
            self.lrs,
            self.decays,
            self.ends,
            scratch_budget,
        )

    def check(self, kernels: Kernels, scratch_budget: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
        grad_phi, starts = self.run(kernels, scratch_budget)
        assert_close(grad_phi, self.grad_phi)
        for got, expected, numel in zip(starts, self.grad_starts, self.numels):
            assert_close(inside(self.config, got, numel), expected)
        return grad_phi, starts


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("hidden", [4, 8])
def test_segment_sizes(kernels: Kernels, hidden: int, numel: int) -> None:
    Segment(Config(hidden, 1), [numel], 3, numel, end=True).check(kernels)


@pytest.mark.parametrize("config", SHORT_SIZES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_segment_networks(kernels: Kernels, config: Config, steps: int) -> None:
    Segment(config, [100, 30], steps, steps, end=steps == 2).check(kernels)


def test_segment_without_tensors(kernels: Kernels) -> None:
    config = Config(8, 1)
    segment = Segment(config, [64], 1, 0, end=False)
    grad_phi, _ = kernels.segment_backward(config, segment.phi, [], [], [], segment.records, [1.0], [1.0], [1.0])
    assert not grad_phi.any()


@pytest.mark.parametrize("per_chunk", [1, 2, 3])
def test_segment_in_chunks(kernels: Kernels, per_chunk: int) -> None:
    """The states between chunks are recomputed exactly, so that chunks change nothing."""
    config = Config(8, 2)
    segment = Segment(config, [70], 7, per_chunk, end=True)
    whole_phi, whole_starts = segment.check(kernels)
    step_bytes = 4 * TILE * 6 * config.hidden_size * config.num_layers
    chunked_phi, chunked_starts = segment.check(kernels, per_chunk * step_bytes)
    np.testing.assert_array_equal(chunked_phi, whole_phi)
    np.testing.assert_array_equal(chunked_starts[0], whole_starts[0])


@pytest.mark.parametrize(
    ("steps", "chunk", "expected"),
    [(22, 21, [1, 21]), (7, 3, [1, 3, 3]), (6, 3, [3, 3]), (5, 5, [5]), (4, 1, [1, 1, 1, 1]), (69, 34, [1, 34, 34])],
)
def test_the_first_chunk_is_the_short_one(kernels: Kernels, steps: int, chunk: int, expected: list[int]) -> None:
    """All but the last are run forward twice."""
    bounds = np.zeros((len(expected), 2), np.int64)
    kernels.library.call("chunk_steps", steps, chunk, len(expected), bounds)
    assert bounds[0, 0] == 0 and bounds[-1, 1] == steps and np.array_equal(bounds[1:, 0], bounds[:-1, 1])
    assert (bounds[:, 1] - bounds[:, 0]).tolist() == expected


def test_segment_of_many_tensors_takes_two_launches(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    segment = Segment(Config(8, 1), [int(n) for n in rng.integers(0, 70, 300)], 2, 1, end=False)
    kernels.library.reset_counters()
    segment.check(kernels)
    log = kernels.library.launch_log()
    assert len(log) == 2 and "backward_kernel" in log[0] and "reduce_kernel" in log[1]


def test_segment_repeats_bit_for_bit_under_any_schedule(kernels: Kernels) -> None:
    segment = Segment(Config(8, 2), [900], 4, 2, end=True)
    first_phi, first_starts = segment.run(kernels)
    for seed in (-1, 1, 2):
        with kernels.library.seed(seed):
            grad_phi, starts = segment.run(kernels)
        np.testing.assert_array_equal(grad_phi, first_phi)
        np.testing.assert_array_equal(starts[0], first_starts[0])


def check_step_backward(kernels: Kernels, config: Config, shape: tuple[int, ...], dtype: int, strided: bool) -> None:
    rng = np.random.default_rng([len(shape), dtype])
    phi = random_phi(config, rng)
    grad = from_bits(to_bits(random_gradient(shape, rng), dtype), dtype)
    upstream = rng.standard_normal(shape).astype(np.float32)
    state = random_state(config, grad.size, rng)
    end = rng.standard_normal(state.shape).astype(np.float32)  # its padding is not zero
    leaves = [
        torch.from_numpy(grad).double().reshape(-1).requires_grad_(),
        torch.from_numpy(phi).double().requires_grad_(),
    ]
    parts = [part.requires_grad_() for pair in logical(config, state, grad.size) for part in pair]
    pairs = list(zip(parts[::2], parts[1::2]))
    update, new = reference.lstm_step(leaves[0], pairs, leaves[1], ReferenceConfig(*config))
    outputs = [update, *(part for pair in new for part in pair)]
    into = [torch.from_numpy(upstream).double().reshape(-1)]
    into += [part for pair in logical(config, end, grad.size) for part in pair]
    grads = torch.autograd.grad(outputs, leaves + parts, into)

    library = kernels.library
    order = tuple(reversed(range(len(shape)))) if strided else None
    source = Tensor(library, grad, dtype, permutation=order, offset=int(strided))
    grad_grad, grad_state, grad_phi = kernels.step_backward(config, phi, source, upstream, state, end)
    expected = grads[0].numpy().reshape(shape)
    unit = {FLOAT32: 0.0, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-10}[dtype]
    # The features are exact to 2e-5; their derivative is 1 / (p g) or e^p, if there is preprocessing.
    scale = 1 + np.abs(expected)
    if config.preprocess == "log_sign":
        scale += np.where(np.abs(grad) >= np.exp(-10), 1 / (10 * np.abs(grad).clip(1e-9)), np.exp(10.0))
    finite = np.abs(expected) < 6e4 if dtype == FLOAT16 else np.isfinite(expected)
    assert np.all((np.abs(grad_grad - expected) <= (unit + 2e-5) * scale)[finite])
    assert_close(inside(config, grad_state, grad.size), blocked(list(zip(grads[2::2], grads[3::2]))))
    assert_close(grad_phi, grads[1].numpy())


@pytest.mark.parametrize("config", SHORT_SIZES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (64,), (150,)])
def test_step_backward(kernels: Kernels, config: Config, shape: tuple[int, ...]) -> None:
    check_step_backward(kernels, config, shape, FLOAT32, False)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_step_backward_of_any_dtype_and_strides(kernels: Kernels, dtype: int) -> None:
    check_step_backward(kernels, Config(8, 2), (3, 5, 7), dtype, True)


@pytest.mark.slow
@pytest.mark.parametrize("config", ALL_SIZES, ids=str)
def test_backward_all_networks(all_kernels: Kernels, config: Config) -> None:
    for preprocess in ("log_sign", "identity"):
        Segment(config._replace(preprocess=preprocess), [130], 3, 5, end=True).check(all_kernels)
        check_step_backward(all_kernels, config._replace(preprocess=preprocess), (70,), FLOAT32, False)


@pytest.mark.parametrize("config", [Config(8, 1), Config(20, 2)], ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_padding_reaches_nothing(kernels: Kernels, config: Config, poison: float) -> None:
    """Whatever states, gradients of states and records hold beyond the last coordinate."""
    results = []
    for value in (0.0, poison):
        segment = Segment(config, [5, 64, 70], 3, 1, end=True)
        for k, n in enumerate(segment.numels):
            if n % TILE:
                segment.states[k][-1, :, n % TILE :] = segment.ends[k][-1, :, n % TILE :] = value
                first = segment.record_tiles[k] * TILE
                for record in segment.records:
                    record[first + n : first + n + -n % TILE] = value
        grad_phi, starts = segment.run(kernels)
        for n, start in zip(segment.numels, starts):
            assert n % TILE == 0 or not start[-1, :, n % TILE :].any()
        values = np.linspace(-1, 1, 70, dtype=np.float32)
        grad = Tensor(kernels.library, values)
        step = kernels.step_backward(config, segment.phi, grad, values, segment.states[2], segment.ends[2])
        results.append([grad_phi, *starts, *step])
    for clean, dirty in zip(*results):
        assert np.array_equal(clean, dirty) and np.isfinite(clean).all()
