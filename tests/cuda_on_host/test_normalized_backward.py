"""Back-propagation of networks with normalized inputs in csrc/cuda, on the CPU, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2l_fast import State
from l2l_fast.kernels import reference
from l2l_fast.kernels.config import Config as ReferenceConfig
from l2l_fast.kernels.state import Averages

from .kernels import BFLOAT16, FLOAT16, FLOAT32, TILE, Kernels, StoredSegment, StoredStep, Tensor, from_bits, to_bits
from .normalized_kernels import Network, NormalizedKernels

TOLERANCE = 3e-5
DEVICE = "sm_90,multiprocessors=2"  # for the fixture `kernels`
SIZES = [(20, 2, 7), (8, 1, 0), (20, 1, 16), (8, 2, 1), (20, 2, 15), (20, 2, 0), (4, 1, 15), (4, 2, 0)]
ALL_SIZES = [(hidden, layers, inputs) for hidden in (4, 8, 16, 20, 32) for layers in (1, 2, 3) for inputs in (0, 15)]


def reference_config(net: Network) -> ReferenceConfig:
    scale, betas = net.output_scale, net.betas
    return ReferenceConfig(*net[:2], "normalized", 10.0, scale, tensor_inputs=net.tensor_inputs, betas=betas)


def random_network(sizes: tuple[int, int, int], rng: np.random.Generator) -> Network:
    net = Network(*sizes, np.zeros(0))
    size = reference.phi_size(reference_config(net))
    return net._replace(phi=(rng.standard_normal(size) * 0.3).astype(np.float32))


def random_state(net: Network, scale: np.ndarray, age: int, rng: np.random.Generator) -> State:
    shape = scale.size, net.hidden_size
    pairs = [tuple(torch.from_numpy(rng.uniform(-1, 1, shape)).float() for _ in "hc") for _ in range(net.num_layers)]
    rows = rng.uniform(0.1, 1, (scale.size, 4)) * scale[:, None]
    rows[:, :2] *= rng.choice([-1, 1], (scale.size, 2))
    return State.from_logical([*pairs, Averages(torch.from_numpy(rows).float(), age)])


def exact(state: State) -> list:
    return state.to(torch.float64).to_logical()


def parts_of(state: list) -> list[torch.Tensor]:
    """h and c of every layer."""
    return [part for pair in state if type(pair) is not Averages for part in pair]


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape and np.isfinite(got).all()
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    assert float(np.abs(got - expected).max(initial=0.0)) <= TOLERANCE * scale


def assert_state_gradient(net: Network, got: np.ndarray, expected: list[torch.Tensor], numel: int) -> None:
    """Of h and c; that of averages is zero, and so is all padding."""
    wanted = torch.cat([*expected, torch.zeros(numel, 4, dtype=torch.float64)], dim=1)
    tiles = -(-numel // TILE)
    padded = torch.nn.functional.pad(wanted, (0, 0, 0, tiles * TILE - numel)).view(tiles, TILE, -1).transpose(1, 2)
    assert_close(got, padded.numpy())
    assert not got[:, -4:].any()


class Segment:
    """Tensors of different ages with badly scaled gradients whose signs have a structure, and what the reference makes
    of them. drift: how far the scale of a coordinate goes from the first step to the last."""

    def __init__(self, sizes, numels: list[int], steps: int, seed: int, *, decades: float = 1.0, drift: float = 0.3):
        rng = np.random.default_rng([seed, steps, *numels])
        self.net, self.numels = random_network(sizes, rng), numels
        self.ages = [1 + 7 * k * k for k in range(len(numels))]
        scales = [10.0 ** rng.uniform(-decades, decades, n) for n in numels]
        self.states = [random_state(self.net, s, age - 1, rng) for s, age in zip(scales, self.ages, strict=True)]
        zeros = [np.zeros(n) + 1 for n in numels]
        self.ends = [random_state(self.net, s, 0, rng) for s in zeros]
        tiles = [state.data.shape[0] for state in self.states]
        self.record_tiles = [1 + sum(tiles[:k]) for k in range(len(tiles))]
        self.grads: list[list[np.ndarray]] = []
        for t in range(steps + 1):
            factor = 10.0 ** (drift * (1 - 2 * t / steps))
            drawn = [(rng.standard_normal(n) + 0.7 * (-1.0) ** (np.arange(n) % 3)) * s for n, s in zip(numels, scales)]
            self.grads.append([(g * factor).astype(np.float32) for g in drawn])
            for g in self.grads[-1]:
                g[: min(2, g.size)] = 0.0
        self.records = [np.zeros((1 + sum(tiles)) * TILE, np.float32) for _ in self.grads]
        for record, at_step in zip(self.records, self.grads, strict=True):
            for first, g in zip(self.record_tiles, at_step, strict=True):
                record[first * TILE : first * TILE + g.size] = g
        shape = steps, len(numels)
        self.inputs = rng.standard_normal((*shape, sizes[2])).astype(np.float32) if sizes[2] else None
        self.nominal = (rng.uniform(0, 1, (*shape, 5)) * [0.5, 1, 0.5, 1, 1]).astype(np.float32)
        self.coefficients = [rng.uniform(low, 1, steps).tolist() for low in (0.2, 0.1, 0.8)]

    def run(self, kernels: Kernels, budget: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
        states, ends = ([state.data.numpy() for state in each] for each in (self.states, self.ends))
        where = self.numels, self.record_tiles, self.records
        stored = StoredSegment(kernels.library, states, *where, *self.coefficients, ends)
        common = self.ages, self.inputs, self.nominal
        return NormalizedKernels(kernels.library).segment_backward(self.net, stored, *common, budget)

    def expected(self) -> tuple[torch.Tensor, list[list]]:
        nothing = self.inputs is None
        return reference.segment_backward(
            [exact(state) for state in self.states],
            [[torch.from_numpy(g).double() for g in at_step] for at_step in self.grads],
            *self.coefficients,
            torch.from_numpy(self.net.phi).double(),
            reference_config(self.net),
            [exact(state) for state in self.ends],
            tensor_inputs=None if nothing else torch.from_numpy(self.inputs),
            nominal=torch.from_numpy(self.nominal),
        )

    def check(self, kernels: Kernels, budget: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
        grad_phi, starts = self.run(kernels, budget)
        expected, expected_starts = self.expected()
        assert_close(grad_phi, expected.numpy())
        for got, wanted, numel in zip(starts, expected_starts, self.numels, strict=True):
            if numel:
                assert_state_gradient(self.net, got, parts_of(wanted), numel)
        return grad_phi, starts


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("hidden", [4, 8])
def test_segment_sizes(kernels: Kernels, hidden: int, numel: int) -> None:
    Segment((hidden, 1, 3), [numel], 3, numel).check(kernels)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_segment_networks_and_several_tensors(kernels: Kernels, sizes, steps: int) -> None:
    """Each has inputs, a nominal vector and an age of its own in every step."""
    Segment(sizes, [70, 1, 0, 130], steps, steps).check(kernels)


@pytest.mark.parametrize("decades", [0.0, 6.0])
def test_segment_of_badly_scaled_gradients(kernels: Kernels, decades: float) -> None:
    """Of steps whose scale falls by a factor of a million, too. lr makes up for the size of the adjoint."""
    segment = Segment((8, 2, 7), [100], 4, 3, decades=decades, drift=3.0)
    segment.coefficients[1] = [lr * 10.0**-decades for lr in segment.coefficients[1]]
    segment.check(kernels)


@pytest.mark.parametrize("per_chunk", [1, 2, 3])
def test_segment_in_chunks(kernels: Kernels, per_chunk: int) -> None:
    segment = Segment((8, 2, 7), [70], 7, per_chunk)
    whole_phi, (whole_start,) = segment.check(kernels)
    chunked_phi, (chunked_start,) = segment.check(kernels, per_chunk * 4 * TILE * 6 * 8 * 2)
    np.testing.assert_array_equal(chunked_phi, whole_phi)
    np.testing.assert_array_equal(chunked_start, whole_start)


def test_segment_of_many_tensors_takes_three_launches(kernels: Kernels) -> None:
    """Some of several blocks' turns, in which float32 sums go to memory; their table is uploaded."""
    numels = [int(n) for n in np.random.default_rng(0).integers(0, 70, 500)]
    segment = Segment((8, 1, 2), numels, 2, 1)
    kernels.library.reset_counters()
    segment.check(kernels)
    *upload, told, walk, reduce = kernels.library.launch_log()
    assert upload and "tensor_steps_kernel" in told and "normalized_backward_kernel" in walk
    assert "reduce_kernel" in reduce


def test_segment_repeats_bit_for_bit_under_any_schedule(kernels: Kernels) -> None:
    segment = Segment((8, 2, 7), [900, 3], 4, 2)
    first_phi, first_starts = segment.run(kernels)
    for seed in (-1, 1, 2):
        with kernels.library.seed(seed):
            grad_phi, starts = segment.run(kernels)
        for got, first in zip([grad_phi, *starts], [first_phi, *first_starts], strict=True):
            np.testing.assert_array_equal(got, first)


def test_without_nominal_it_is_the_default(kernels: Kernels) -> None:
    segment, results = Segment((8, 1, 2), [70], 2, 5), []
    for nominal in (None, np.broadcast_to(np.float32(reference.normalized.NOMINAL), (2, 1, 5))):
        segment.nominal = nominal
        results.append(segment.run(kernels)[0])
    np.testing.assert_array_equal(*results)


def test_gains_beyond_their_bounds_have_no_gradient(kernels: Kernels) -> None:
    """Below and above, by what a tensor is told."""
    segment = Segment((8, 1, 2), [70, 70, 70], 2, 6)
    segment.nominal[:, :, 0] = [-12.0, 0.0, 6.0]
    segment.check(kernels)


def check_step_backward(kernels: Kernels, sizes, shape: tuple[int, ...], dtype: int, strided: bool) -> None:
    rng = np.random.default_rng([len(shape), dtype, *sizes])
    net, numel = random_network(sizes, rng), int(np.prod(shape))
    scale = 10.0 ** rng.uniform(-4, 4, numel)
    grad = from_bits(to_bits(rng.standard_normal(shape) * scale.reshape(shape), dtype), dtype)
    state, end = random_state(net, scale, 8, rng), random_state(net, np.ones(numel), 0, rng)
    upstream = rng.standard_normal(shape).astype(np.float32)
    inputs = rng.standard_normal(sizes[2]).astype(np.float32) if sizes[2] else None
    nominal = (rng.uniform(0, 1, 5) * [0.5, 1, 0.5, 1, 1]).astype(np.float32)

    phi = torch.from_numpy(net.phi).double().requires_grad_()
    *pairs, averages = exact(state)
    leaves = [part.requires_grad_() for part in parts_of(pairs)]
    start = [*zip(leaves[::2], leaves[1::2], strict=True), averages]
    given = None if inputs is None else torch.from_numpy(inputs), torch.from_numpy(nominal)
    flat = torch.from_numpy(grad).double().reshape(-1)
    update, new = reference.lstm_step(flat, start, phi, reference_config(net), 1, None, *given)
    into = [torch.from_numpy(upstream).double().reshape(-1), *parts_of(exact(end))]
    expected, *expected_state = torch.autograd.grad([update, *parts_of(new)], [phi, *leaves], into)

    order = tuple(reversed(range(len(shape)))) if strided else None
    source = Tensor(kernels.library, grad, dtype, permutation=order, offset=int(strided))
    stored = StoredStep(kernels.library, source, upstream, state.data.numpy(), end.data.numpy())
    grad_grad, grad_state, grad_phi = NormalizedKernels(kernels.library).step_backward(net, stored, 9, inputs, nominal)
    assert not grad_grad.any()  # nor NaN
    assert_close(grad_phi, expected.numpy())
    assert_state_gradient(net, grad_state, expected_state, numel)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (64,), (150,)])
def test_step_backward(kernels: Kernels, sizes, shape: tuple[int, ...]) -> None:
    check_step_backward(kernels, sizes, shape, FLOAT32, False)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_step_backward_of_any_dtype_and_strides(kernels: Kernels, dtype: int) -> None:
    check_step_backward(kernels, (8, 2, 3), (3, 5, 7), dtype, True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL_SIZES, ids=str)
def test_backward_all_networks(all_kernels: Kernels, sizes) -> None:
    Segment(sizes, [130, 3], 3, 5).check(all_kernels)
    check_step_backward(all_kernels, sizes, (70,), FLOAT32, False)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_padding_reaches_nothing(kernels: Kernels, poison: float) -> None:
    """Whatever states, gradients of states and records hold beyond the last coordinate."""
    results = []
    for value in (0.0, poison):
        segment = Segment((8, 2, 3), [5, 64, 70], 3, 1)
        for k, n in enumerate(segment.numels):
            if n % TILE:
                for state in (segment.states[k], segment.ends[k]):
                    state.data[-1, :, n % TILE :] = value
                first = segment.record_tiles[k] * TILE
                for record in segment.records:
                    record[first + n : first + n + -n % TILE] = value
        grad_phi, starts = segment.run(kernels)
        values = np.linspace(-1, 1, 70, dtype=np.float32)
        state, end = segment.states[2].data.numpy(), segment.ends[2].data.numpy()
        step = StoredStep(kernels.library, Tensor(kernels.library, values), values, state, end)
        common = segment.net, step, 3, np.ones(3, np.float32)
        results.append([grad_phi, *starts, *NormalizedKernels(kernels.library).step_backward(*common)])
    for clean, dirty in zip(*results, strict=True):
        assert np.array_equal(clean, dirty) and np.isfinite(clean).all()


def test_extreme_gradients(kernels: Kernels) -> None:
    """A NaN stays in its own coordinate of the states' gradients and makes those of phi NaN; of infinite, huge and
    tiny ones nothing does."""
    huge = np.finfo(np.float32).max
    values = np.array([0.0, -0.0, 1e-39, huge, -huge, np.inf, -np.inf, 1.0, 1e-30], np.float32)
    segment = Segment((8, 2, 3), [9], 2, 8)
    segment.states = [State.zeros(9, 8, 2, averages=4)]
    # The first gradients go into no adjoint.
    first = segment.record_tiles[0] * TILE
    segment.grads[0][0][:] = segment.records[0][first : first + 9] = values
    segment.check(kernels)
    segment.records[0][first + 7] = np.nan
    grad_phi, (start,) = segment.run(kernels)
    others = np.arange(TILE) != 7
    assert np.isnan(grad_phi[0]) and np.isfinite(start[0][:, others]).all() and np.isnan(start[0][:32, 7]).any()
