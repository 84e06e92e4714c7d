"""The shipped optimizer ``general`` on the CUDA kernels: what LearnedOptimizer asks of the CPU in a training, with what
it found out about each tensor, it asks of them, too; and both must answer alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor as TorchTensor

import l2l_fast as l2l
from l2l_fast.kernels import operators, state_types

from .kernels import Kernels, StoredSegment, Tensor
from .normalized_kernels import Network, NormalizedKernels
from .test_stored_step import TYPES

TOLERANCE = 3e-5
DEVICE = "sm_90,multiprocessors=2"  # for the fixture `kernels`
SHAPES = [(1,), (7, 9), (64,), (5, 13), (0,), (20, 30)]


def on_device(phi: TorchTensor, config: Any) -> Network:
    sizes = config.hidden_size, config.num_layers, config.tensor_inputs
    return Network(*sizes, phi.detach().numpy(), config.output_scale, config.betas)


def rows_of(*given: TorchTensor | None) -> tuple[np.ndarray | None, ...]:
    return tuple(None if each is None else each.numpy() for each in given)


def coordinates(tiles: TorchTensor, numel: int) -> np.ndarray:
    return np.swapaxes(tiles.numpy(), 1, 2).reshape(-1, tiles.shape[1])[:numel]


def close_states(got: np.ndarray, expected: np.ndarray) -> None:
    """h and c; and averages, by their coordinate's scale."""
    np.testing.assert_allclose(got[:, :8], expected[:, :8], rtol=0, atol=TOLERANCE)
    scale = np.abs(expected[:, 8:]).max(axis=1, keepdims=True) + 1e-30
    np.testing.assert_allclose(got[:, 8:] / scale, expected[:, 8:] / scale, rtol=0, atol=1e-6)


class Both:
    """The operators of the CPU, each call of which is made to the CUDA kernels as well and compared."""

    def __init__(self, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels, self.calls, self.codes = kernels, {"step_": 0, "segment_backward": 0}, [0, 0]
        self.originals = {name: getattr(operators, name) for name in self.calls}
        for name in self.calls:
            monkeypatch.setattr(operators, name, getattr(self, name))

    def step_(self, params, grads, states, phi, config, lr, weight_decay, maximize, **options) -> None:
        arguments = (params, grads, states, phi, config, lr, weight_decay, maximize)
        if options["check_only"]:
            return self.originals["step_"](*arguments, **options)
        library, net = self.kernels.library, on_device(phi, config)
        targets = [Tensor(library, param.detach().numpy()) for param in params]
        sources = [Tensor(library, grad.numpy()) for grad in grads]
        common = options["ages"], *rows_of(options["tensor_inputs"], options["nominal"])
        assert common[1].any() and common[2].any()
        scalars, decay = {"lr": lr, "maximize": maximize}, 1.0 - lr * weight_decay
        held = [library.array(state.view(torch.uint8).numpy()) for state in states]
        if states[0].dtype == torch.float32:
            NormalizedKernels(library).step(net, targets, sources, held, *common, decay=decay, **scalars)
        else:
            kind = next(kind for kind, dtype in state_types.STATE_DTYPES.items() if dtype == states[0].dtype)
            self._stored_step(net, kind, targets, sources, held, options["seeds"], common, lr, decay, maximize)
        self.originals["step_"](*arguments, **options)
        self.calls["step_"] += 1
        for param, target, state, bytes_held in zip(params, targets, states, held, strict=True):
            np.testing.assert_allclose(target.numpy(), param.detach().numpy(), rtol=0, atol=TOLERANCE)
            if param.numel() == 0:
                continue
            got = torch.from_numpy(bytes_held.numpy()).view(state.dtype).view(state.shape)
            if state.dtype == torch.float32:
                close_states(*(coordinates(x, param.numel()) for x in (got, state)))
                continue
            # A number that was summed in another order may be rounded to the code beside.
            pair = [coordinates(state_types.decode(x, config), param.numel()) for x in (got, state)]
            self.codes[0] += int((pair[0] != pair[1]).sum())
            self.codes[1] += pair[0].size

    def _stored_step(self, net, kind, targets, sources, held, seeds, common, lr, decay, maximize) -> None:
        library, (ages, inputs, nominal) = self.kernels.library, common
        rows, stream = NormalizedKernels(library)._rows(inputs, nominal), []
        for k, (param, grad) in enumerate(zip(targets, sources, strict=True)):
            seed = seeds[k] - 2**64 if seeds[k] >= 2**63 else seeds[k]
            stream += [param.array.pointer, param.dtype, grad.array.pointer, grad.dtype, held[k].pointer, seed, 0]
            stream += [len(param.shape), *param.shape, *param.strides, *grad.strides, ages[k], *net.addresses(rows, k)]
        library.call(
            "stored_step",
            *net.arguments(),
            np.array([lr, decay], np.float32),
            library.array(net.phi),
            np.array([maximize, TYPES[kind], True, False], np.int64),
            len(targets),
            np.array(stream, np.int64),
        )

    def segment_backward(self, *arguments, **options) -> tuple[TorchTensor, list[TorchTensor]]:
        answer = self.originals["segment_backward"](*arguments[:12], True, **options)
        states, numels, places, records, _, *coefficients, phi, config, problems, ends, need_grad_start = arguments
        assert problems == 1 and not ends and not need_grad_start
        stored = StoredSegment(
            self.kernels.library, [s.numpy() for s in states], numels, places, [r.numpy() for r in records],
            *coefficients, None,
        )  # fmt: skip
        common = options["ages"], *rows_of(options["tensor_inputs"], options["nominal"])
        grad_phi, starts = NormalizedKernels(self.kernels.library).segment_backward(
            on_device(phi, config), stored, *common
        )
        self.calls["segment_backward"] += 1
        for got, expected in zip([grad_phi, *starts], [answer[0], *answer[1]], strict=True):
            scale = max(float(expected.abs().max()), 1e-6) if expected.numel() else 1.0
            np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=TOLERANCE * scale)
        return answer[0], []


class Training:
    """A sum of badly scaled quadratic functions of tensors of many sizes."""

    def __init__(self, network: l2l.CoordinatewiseLSTM, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(shape, generator=self.generator).requires_grad_() for shape in SHAPES]
        self.curvature = [10.0 ** (3 * torch.rand(shape, generator=self.generator) - 2) for shape in SHAPES]
        self.optimizer = l2l.LearnedOptimizer(self.params, network, total_steps=40, **options)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        noise = [torch.randn(p.shape, generator=self.generator) for p in self.params]
        terms = zip(self.params, self.curvature, noise, strict=True)
        sum((curvature * (p + 0.1 * e).square()).sum() for p, curvature, e in terms).backward()


@pytest.mark.parametrize("kind", ["float32", *TYPES])
def test_training(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    options = {} if kind == "float32" else {"state_dtype": kind}
    both, training = Both(kernels, monkeypatch), Training(l2l.load_pretrained("general"), **options)
    for _ in range(5):
        training.backward()
        training.optimizer.step()
    assert both.calls["step_"] == 5
    assert both.codes[0] <= 0.01 * both.codes[1] and (both.codes[1] > 0) == (kind != "float32")


@pytest.mark.parametrize("silent", [True, False])
def test_segments(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    """Two, the second from averages that are not zero. silent: with the shipped read-out of its LSTM, which is zero, or
    another."""
    network = l2l.load_pretrained("general")
    if not silent:
        with torch.no_grad():
            network.weight_out.normal_(generator=torch.Generator().manual_seed(1))
    both, training = Both(kernels, monkeypatch), Training(network)
    for steps in (3, 4):
        training.optimizer.start_segment()
        for _ in range(steps):
            training.backward()
            training.optimizer.step()
        training.backward()
        network.zero_grad()
        training.optimizer.backward_segment()
        assert network.weight_hh_l0.grad.any() != silent and network.bias_out.grad.any()
    assert both.calls == {"step_": 7, "segment_backward": 2}
