"""As kernels.py, for networks with normalized inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .kernels import AUTOMATIC, StoredSegment, StoredStep, Tensor
from .library import DeviceArray, Library

Rows = tuple[DeviceArray | None, DeviceArray | None]


class Network(NamedTuple):
    hidden_size: int
    num_layers: int
    tensor_inputs: int
    phi: np.ndarray
    output_scale: float = 0.5
    betas: tuple[float, ...] = (0.9, 0.99, 0.95, 0.999)

    def arguments(self) -> tuple[np.ndarray, np.ndarray]:
        rates = [1.0 - beta for beta in self.betas]
        return np.array(self[:3], np.int64), np.array([self.output_scale, *rates], np.float32)

    def addresses(self, rows: Rows, k: int) -> list[int]:
        """Of row k of inputs and nominal vectors."""
        sizes = self.tensor_inputs, 5
        return [0 if row is None else row.pointer + 4 * size * k for row, size in zip(rows, sizes, strict=True)]


class NormalizedKernels:
    """What the operators launch for a network with averages, on device arrays of a :class:`Library`."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def _rows(self, *arrays: np.ndarray | None) -> Rows:
        first, second = (None if each is None else self.library.array(each.astype(np.float32)) for each in arrays)
        return first, second

    def step(
        self,
        net: Network,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[DeviceArray],
        ages: Sequence[int],
        inputs: np.ndarray | None = None,
        nominal: np.ndarray | None = None,
        *,
        new_states: Sequence[DeviceArray] | None = None,
        records: Sequence[int] | None = None,
        lr: float = 1.0,
        decay: float = 1.0,
        maximize: bool = False,
        in_place: bool = True,
        mapping: int = AUTOMATIC,
    ) -> None:
        """``inputs`` and ``nominal``: a row per tensor; ``records``: an address per tensor."""
        rows = self._rows(inputs, nominal)
        stream: list[int] = []
        for k, (param, grad) in enumerate(zip(params, grads)):
            stream += [param.array.pointer, param.dtype, grad.array.pointer, grad.dtype, states[k].pointer]
            stream += [(new_states or states)[k].pointer, records[k] if records else 0, len(param.shape)]
            stream += [*param.shape, *param.strides, *grad.strides, ages[k], *net.addresses(rows, k)]
        self.library.call(
            "normalized_step",
            *net.arguments(),
            np.array([lr, decay], np.float32),
            self.library.array(net.phi.astype(np.float32)),
            np.array([maximize, in_place, mapping], np.int64),
            len(params),
            np.array(stream, np.int64),
        )

    def tensor_sums(
        self,
        net: Network,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[DeviceArray],
        types: Sequence[int],
        ages: Sequence[int],
        maximize: bool = False,
    ) -> np.ndarray:
        """``types``: of the states, 0 float32, 1 bfloat16, 2 int8."""
        stream: list[int] = []
        for k, (param, grad) in enumerate(zip(params, grads)):
            stream += [param.array.pointer, param.dtype, grad.array.pointer, grad.dtype, states[k].pointer, types[k]]
            stream += [ages[k], len(param.shape), *param.shape, *param.strides, *grad.strides]
        out = self.library.array(np.full((len(ages), 6), np.nan))
        stream_of_words = np.array(stream, np.int64)
        self.library.call("tensor_sums", *net.arguments(), int(maximize), len(ages), stream_of_words, out)
        return out.numpy()

    def segment_backward(
        self,
        net: Network,
        segment: StoredSegment,
        ages: Sequence[int],
        inputs: np.ndarray | None = None,
        nominal: np.ndarray | None = None,
        scratch_budget: int = 0,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """``ages``: of the first step; ``inputs`` and ``nominal``: ``[steps, tensors, ...]``."""
        rows = self._rows(inputs, nominal)
        stream = [np.array([*t, ages[k], *net.addresses(rows, k)], np.int64) for k, t in enumerate(segment.tensors)]
        grad_phi = self.library.array(np.full(net.phi.shape, np.nan, np.float32))
        self.library.call(
            "normalized_segment_backward",
            *net.arguments(),
            self.library.array(net.phi.astype(np.float32)),
            len(stream),
            np.concatenate([np.zeros(0, np.int64), *stream]),
            segment.steps,
            segment.addresses,
            segment.coefficients,
            grad_phi,
            scratch_budget,
        )
        return grad_phi.numpy(), [start.numpy() for start in segment.starts]

    def step_backward(
        self,
        net: Network,
        step: StoredStep,
        age: int,
        inputs: np.ndarray | None = None,
        nominal: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``inputs`` and ``nominal``: a row."""
        rows = self._rows(inputs, nominal)
        grad_phi = self.library.array(np.full(net.phi.shape, np.nan, np.float32))
        self.library.call(
            "normalized_step_backward",
            *net.arguments(),
            self.library.array(net.phi.astype(np.float32)),
            step.stream,
            np.array([age, *net.addresses(rows, 0)], np.int64),
            grad_phi,
        )
        return step.grad_grad.numpy(), step.grad_state.numpy(), grad_phi.numpy()
