"""The CUDA step of networks with normalized inputs, on the CPU, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2l_fast import State
from l2l_fast.kernels import reference
from l2l_fast.kernels.config import Config as ReferenceConfig
from l2l_fast.kernels.state import Averages

from . import normalized_kernels
from .kernels import AUTOMATIC, BFLOAT16, FLOAT16, FLOAT32, NARROW, TILE, WIDE, Kernels, Tensor, from_bits, to_bits
from .normalized_kernels import NormalizedKernels

TOLERANCE = 3e-5
DEVICE = "sm_90,multiprocessors=2"  # for the fixture `kernels`
SIZES = [(20, 2, 7), (8, 1, 0), (20, 1, 16), (8, 2, 1), (4, 1, 15), (4, 2, 0), (0, 0, 3)]


class Network:
    def __init__(self, sizes: tuple[int, int, int], rng: np.random.Generator) -> None:
        self.sizes = sizes
        self.config = ReferenceConfig(*sizes[:2], "normalized", 10.0, 0.5, tensor_inputs=sizes[2])
        self.phi = (rng.standard_normal(reference.phi_size(self.config)) * 0.3).astype(np.float32)
        self.on_device = normalized_kernels.Network(*sizes, self.phi)


class Case:
    """Some tensors of different ages and scales with their states, and what the reference makes of them."""

    def __init__(self, net: Network, numels: list[int], ages: list[int], rng: np.random.Generator) -> None:
        self.net, self.numels, self.ages = net, numels, ages
        scales = [10.0 ** rng.uniform(-12, 12, n) for n in numels]
        self.grads = [(rng.standard_normal(n) * s).astype(np.float32) for n, s in zip(numels, scales)]
        for grad in self.grads:
            grad[: min(2, grad.size)] = 0.0
        self.params = [rng.standard_normal(n).astype(np.float32) for n in numels]
        self.states = [self._state(n, s, age - 1, rng) for n, s, age in zip(numels, scales, ages)]
        self.inputs = rng.standard_normal((len(numels), net.sizes[2])) if net.sizes[2] else None
        self.nominal = rng.uniform(0, 1, (len(numels), 5))

    def _state(self, n: int, scale: np.ndarray, age: int, rng: np.random.Generator) -> State:
        shape = (n, self.net.sizes[0])
        layers = range(self.net.sizes[1])
        pairs = [tuple(torch.from_numpy(rng.uniform(-1, 1, shape)).float() for _ in "hc") for _ in layers]
        rows = rng.uniform(0.1, 1, (n, 4)) * scale[:, None]
        rows[:, :2] *= rng.choice([-1, 1], (n, 2))
        return State.from_logical([*pairs, Averages(torch.from_numpy(rows).float(), age)])

    def expected(self, k: int, sign: float = 1.0, grad: np.ndarray | None = None) -> tuple[np.ndarray, State]:
        grad = self.grads[k] if grad is None else grad
        update, new = reference.lstm_step(
            torch.from_numpy(sign * grad.astype(np.float64)),
            self.states[k].to(torch.float64).to_logical(),
            torch.from_numpy(self.net.phi).double(),
            self.net.config,
            1,
            None,
            None if self.inputs is None else torch.from_numpy(self.inputs[k]).float(),
            torch.from_numpy(self.nominal[k]).float(),
        )
        return update.numpy(), State.from_logical(new)

    def run(self, kernels: Kernels, params, grads, states, **options) -> None:
        common = (self.ages, self.inputs, self.nominal)
        NormalizedKernels(kernels.library).step(self.net.on_device, params, grads, states, *common, **options)


def close(got: np.ndarray, expected: np.ndarray, scale: np.ndarray | float = 1.0) -> None:
    assert got.shape == expected.shape and np.isfinite(got).all()
    assert np.all(np.abs(got - expected) <= TOLERANCE * scale)


def close_states(got: np.ndarray, expected: State) -> None:
    """h and c, and averages by their coordinate's scale."""
    data = State(torch.from_numpy(got).double(), *torch.utils._pytree.tree_flatten(expected)[1].context)
    *pairs, averages = data.to_logical()
    *others, wanted = expected.to_logical()
    for pair, other in zip(pairs, others, strict=True):
        for a, b in zip(pair, other, strict=True):
            close(a.numpy(), b.numpy())
    scale = wanted.rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-300).numpy()
    assert np.all(np.abs((averages.rows - wanted.rows).numpy()) <= 1e-6 * scale)


def check(kernels: Kernels, sizes, numels: list[int], mapping: int, seed: int = 0) -> None:
    rng = np.random.default_rng([seed, *numels])
    case = Case(Network(sizes, rng), numels, [1 + 7 * k * k for k in range(len(numels))], rng)
    library = kernels.library
    params = [Tensor(library, x) for x in case.params]
    states = [library.array(state.data.numpy()) for state in case.states]
    case.run(kernels, params, [Tensor(library, g) for g in case.grads], states, lr=0.7, decay=0.9, mapping=mapping)
    for k, n in enumerate(numels):
        if n == 0:
            continue
        update, new = case.expected(k)
        close(params[k].numpy(), case.params[k] * 0.9 + 0.7 * update, np.maximum(1.0, np.abs(update)))
        close_states(states[k].numpy(), new)


@pytest.mark.parametrize("mapping", [NARROW, WIDE])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[4]], ids=str)
def test_sizes(kernels: Kernels, sizes, numel: int, mapping: int) -> None:
    check(kernels, sizes, [numel], mapping)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mapping", [NARROW, WIDE])
def test_networks_and_several_tensors(kernels: Kernels, sizes, mapping: int) -> None:
    check(kernels, sizes, [70, 1, 0, 130], mapping)


def test_a_table_in_device_memory(kernels: Kernels) -> None:
    check(kernels, SIZES[3], [3] * 400, AUTOMATIC)


def test_other_schedules(kernels: Kernels) -> None:
    for seed in (-1, 1, 2):
        with kernels.library.seed(seed):
            check(kernels, SIZES[0], [300, 5], AUTOMATIC, seed + 1)


@pytest.mark.parametrize("param_dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("grad_dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_dtypes_maximize_and_record(kernels: Kernels, param_dtype: int, grad_dtype: int) -> None:
    rng, library = np.random.default_rng(3), kernels.library
    case = Case(Network(SIZES[3], rng), [100], [5], rng)
    grad = from_bits(to_bits(rng.standard_normal(100), grad_dtype), grad_dtype)
    param = from_bits(to_bits(case.params[0], param_dtype), param_dtype)
    update, _ = case.expected(0, -1.0, grad)
    target, record = Tensor(library, param, param_dtype), library.array(np.full(3 * TILE, np.nan, np.float32))
    states = [library.array(case.states[0].data.numpy())]
    grads, records = [Tensor(library, grad, grad_dtype)], [record.pointer + 4 * TILE]
    case.run(kernels, [target], grads, states, records=records, lr=0.5, maximize=True)
    unit = {FLOAT32: 0.0, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}[param_dtype]
    expected = param + 0.5 * update
    close(target.numpy(), expected, np.maximum(1.0, np.abs(update)) + unit * np.abs(expected) / TOLERANCE)
    np.testing.assert_array_equal(record.numpy()[TILE : TILE + 100], -grad)


def test_functional_form_leaves_the_old_state(kernels: Kernels) -> None:
    rng, library = np.random.default_rng(4), kernels.library
    case = Case(Network(SIZES[0], rng), [130], [9], rng)
    update, new = case.expected(0)
    out, old = Tensor(library, np.full(130, np.nan, np.float32)), library.array(case.states[0].data.numpy())
    after = library.array(np.full_like(case.states[0].data.numpy(), np.nan))
    case.run(kernels, [out], [Tensor(library, case.grads[0])], [old], new_states=[after], in_place=False)
    close(out.numpy(), update, np.maximum(1.0, np.abs(update)))
    close_states(after.numpy(), new)
    np.testing.assert_array_equal(old.numpy(), case.states[0].data.numpy())


def test_without_nominal_it_is_the_default(kernels: Kernels) -> None:
    rng, library = np.random.default_rng(5), kernels.library
    case = Case(Network(SIZES[0], rng), [70], [2], rng)
    results = []
    for nominal in (None, np.array([reference.normalized.NOMINAL])):
        case.nominal = nominal
        param, state = Tensor(library, case.params[0]), library.array(case.states[0].data.numpy())
        case.run(kernels, [param], [Tensor(library, case.grads[0])], [state])
        results.append(param.numpy())
    np.testing.assert_array_equal(*results)


def test_extreme_gradients(kernels: Kernels) -> None:
    """As on the CPU: finite but for a NaN, which stays in its own coordinate; of zeros from the start nothing comes but
    the correction."""
    rng, library = np.random.default_rng(6), kernels.library
    net, huge = Network(SIZES[3], rng), np.finfo(np.float32).max
    grad = np.array([0.0, -0.0, 1e-39, huge, -huge, np.inf, -np.inf, np.nan, 1.0], np.float32)
    case = Case(net, [9], [1], rng)
    state = library.array(State.zeros(9, *net.sizes[:2], averages=4).data.numpy())
    exact = State.zeros(9, *net.sizes[:2], dtype=torch.float64, averages=4)
    others = np.arange(9) != 7
    for t in range(3):
        case.ages, case.states = [t + 1], [exact]
        update, exact = case.expected(0, 1.0, grad)
        param = Tensor(library, np.zeros(9, np.float32))
        case.run(kernels, [param], [Tensor(library, grad)], [state])
        got = param.numpy()
        assert np.isnan(got[7]) and np.isfinite(got[others]).all()
        assert np.all(np.abs(got - update)[others] <= TOLERANCE * np.maximum(1, np.abs(update[others])))
