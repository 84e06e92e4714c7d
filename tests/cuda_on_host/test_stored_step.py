"""The CUDA step where states are not float32, on the CPU: against the float32 kernels and the oracle of the codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2l_fast.kernels import reference, state_types
from l2l_fast.kernels.config import Config as ReferenceConfig

from . import normalized_kernels
from .kernels import BFLOAT16, FLOAT16, FLOAT32, WIDE, Config, Kernels, Tensor
from .normalized_kernels import NormalizedKernels

DEVICE = "sm_90,multiprocessors=2"  # for the fixture `kernels`
TYPES = {"bfloat16": 1, "int8": 2}
SIZES = [((20, 2), False), ((8, 1), False), ((8, 1), True), ((8, 2), True)]
SIZES += [((4, 1), False), ((4, 1), True), ((0, 0), True)]
NUMELS = [1, 63, 64, 65, 700, 0, 129]


class Case:
    """Tensors in a network, plain or normalized, with states of a type, over some steps."""

    def __init__(
        self,
        kernels: Kernels,
        kind: str,
        sizes: tuple[int, int],
        normalized: bool,
        seed: int = 0,
        tensor_cores: bool = False,
    ) -> None:
        self.kernels, self.library, self.kind, self.normalized = kernels, kernels.library, kind, normalized
        self.tensor_cores = tensor_cores
        self.rng = np.random.default_rng(seed)
        self.dtype = state_types.STATE_DTYPES[kind]
        preprocess = "normalized" if normalized else "log_sign"
        scale = 0.5 if normalized else 0.1
        self.config = ReferenceConfig(*sizes, preprocess, 10.0, scale, tensor_inputs=3 if normalized else 0)
        self.phi = (self.rng.standard_normal(reference.phi_size(self.config)) * 0.7).astype(np.float32)
        self.states = [state_types.zeros(n, self.config, self.dtype) for n in NUMELS]
        self.params = [self.rng.standard_normal(n).astype(np.float32) for n in NUMELS]
        self.age = 0

    def stored(self, grads: list[Tensor], params: list[Tensor], seeds: list[int], common, maximize: bool):
        """The kernel under test; the new states."""
        held = [self.library.array(self._bytes(state)) for state in self.states]
        rows = NormalizedKernels(self.library)._rows(*common)
        net = normalized_kernels.Network(*self.config.arguments[0][:2], self.config.tensor_inputs, self.phi)
        stream: list[int] = []
        for k, (param, grad) in enumerate(zip(params, grads)):
            stream += [param.array.pointer, param.dtype, grad.array.pointer, grad.dtype, held[k].pointer, seeds[k], 0]
            stream += [len(param.shape), *param.shape, *param.strides, *grad.strides, self.age]
            stream += net.addresses(rows, k)
        plain = Config(*self.config.arguments[0][:2])
        network = net.arguments() if self.normalized else (plain.sizes(), np.array([10.0, 0.1], np.float32))
        self.library.call(
            "stored_step",
            *network,
            np.array([0.5, 0.99], np.float32),
            self.library.array(self.phi),
            np.array([maximize, TYPES[self.kind], self.normalized, self.tensor_cores], np.int64),
            len(params),
            np.array(stream, np.int64),
        )
        return [self._tensor(array.numpy(), state) for array, state in zip(held, self.states)]

    def _bytes(self, state: torch.Tensor) -> np.ndarray:
        return state.view(torch.int8).numpy().view(np.uint8).reshape(-1)

    def _tensor(self, stored: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        if stored.size == 0:
            return like
        return torch.from_numpy(stored.copy()).view(torch.int8).view(like.dtype).view(like.shape)

    def decoded(self, states: list[torch.Tensor]) -> list[np.ndarray]:
        return [state_types.decode(state, self.config).numpy() for state in states]

    def step(self, dtype: int = FLOAT32, maximize: bool = False, bad: bool = False) -> None:
        """One step of both, compared; the stored states go on."""
        self.age += 1
        values = [(self.rng.standard_normal(n) * 10.0 ** self.rng.uniform(-3, 1, n)).astype(np.float32) for n in NUMELS]
        if bad:
            values[4][[3, 500]] = np.nan, np.inf
        seeds = [state_types.seed_of(k, self.age) for k in range(len(NUMELS))]
        common = (None, None)
        if self.normalized:
            common = (self.rng.standard_normal((len(NUMELS), 3)), self.rng.uniform(0, 1, (len(NUMELS), 5)))
        results = []
        for which in ("stored", "float32"):
            params = [Tensor(self.library, x, dtype) for x in self.params]
            grads = [Tensor(self.library, x, dtype) for x in values]
            if which == "stored":
                states = self.stored(grads, params, seeds, common, maximize)
            else:
                held = [self.library.array(x) for x in self.decoded(self.states)]
                options = {"lr": 0.5, "decay": 0.99, "maximize": maximize, "mapping": WIDE}
                if self.normalized:
                    net = normalized_kernels.Network(*self.config.arguments[0][:2], 3, self.phi)
                    ages = [self.age] * len(NUMELS)
                    NormalizedKernels(self.library).step(net, params, grads, held, ages, *common, **options)
                else:
                    plain = Config(*self.config.arguments[0][:2])
                    options["tensor_cores"] = self.tensor_cores and self.kind == "bfloat16"
                    self.kernels.step(plain, self.phi, params, grads, held, **options)
                rows = [torch.from_numpy(array.numpy().reshape(-1, self.config.rows, 64)) for array in held]
                states = [
                    state_types.encode(row, self.config, self.dtype, numel, seed)
                    for row, numel, seed in zip(rows, NUMELS, seeds)
                ]
            results.append(([param.numpy() for param in params], states))
        (ours, our_states), (theirs, their_states) = results
        for k, numel in enumerate(NUMELS):
            np.testing.assert_array_equal(ours[k], theirs[k])
            pair = (self.decoded([states[k]])[0] for states in (our_states, their_states))
            a, b = (np.swapaxes(x, 1, 2).reshape(-1, self.config.rows)[:numel] for x in pair)
            np.testing.assert_array_equal(a, b)
        self.params, self.states = ours, our_states


@pytest.mark.parametrize("sizes, normalized", SIZES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_a_step_decodes_computes_in_float32_and_encodes(kernels, kind, sizes, normalized) -> None:
    case = Case(kernels, kind, sizes, normalized)
    for step in range(5):
        case.step(maximize=step == 1)
    case.step(bad=True)
    case.step()
    assert np.isnan(case.params[4]).any() and sum(np.isnan(x).sum() for x in case.params) <= 2
    rows = np.swapaxes(case.decoded([case.states[4]])[0], 1, 2).reshape(-1, case.config.rows)[:700]
    assert 0 < np.isnan(rows).any(axis=1).sum() <= 2


@pytest.mark.parametrize("sizes", [(20, 2), (8, 1)])
def test_on_tensor_cores_too(kernels, sizes) -> None:
    """Against the float32 kernel on tensor cores, bit for bit: stored numbers have no small parts to lack."""
    case = Case(kernels, "bfloat16", sizes, normalized=False, tensor_cores=True)
    for step in range(3):
        case.step(BFLOAT16 if step == 2 else FLOAT32, maximize=step == 1)
        assert sum("mma_" in line for line in kernels.library.launch_log()[-2:]) == 2
    case.step(bad=True)
    case.step()
    assert 0 < sum(np.isnan(x).sum() for x in case.params) <= 2


@pytest.mark.parametrize(("kind", "sizes"), [("int8", (8, 1)), ("bfloat16", (4, 1))])
def test_what_tensor_cores_do_not_serve_stays_with_the_other_kernel(kernels, kind, sizes) -> None:
    case = Case(kernels, kind, sizes, normalized=False, tensor_cores=True)
    for _ in range(2):
        case.step()
    assert not any("mma_" in line for line in kernels.library.launch_log()[-2:])


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_parameters_of_other_types(kernels, dtype) -> None:
    case = Case(kernels, "int8", (8, 1), False, seed=3)
    for _ in range(3):
        case.step(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sizes", [(16, 1), (16, 3)], ids=str)
def test_other_sizes(all_kernels, kind, sizes, normalized) -> None:
    case = Case(all_kernels, kind, sizes, normalized)
    for _ in range(3):
        case.step()
