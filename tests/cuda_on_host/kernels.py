"""The device kernels of csrc/cuda, compiled by g++, called with numpy arrays. No torch, so that it runs sanitized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .library import DeviceArray, Library

SOURCE = Path(__file__).parent / "kernels.cu"
TILE = 64
FLOAT32, BFLOAT16, FLOAT16 = range(3)
AUTOMATIC, NARROW, WIDE = range(3)
#: Three sizes compile in a fraction of the time of all; the full form builds the rest.
SHORT_FLAGS = ("-DL2L_CUDA_HIDDEN_SIZES(X)=X(4) X(8) X(20)", "-DL2L_CUDA_LAYERS(X)=X(1) X(2)")


class Config(NamedTuple):
    hidden_size: int = 20
    num_layers: int = 2
    preprocess: str = "log_sign"
    p: float = 10.0
    output_scale: float = 0.1

    @property
    def rows(self) -> int:
        return 2 * self.num_layers * self.hidden_size

    def sizes(self) -> np.ndarray:
        return np.array([self.hidden_size, self.num_layers, self.preprocess == "log_sign", 0, 0, 1, 1], np.int64)


def to_bits(values: np.ndarray, dtype: int) -> np.ndarray:
    """float32 values in the memory format of a dtype, rounded to nearest even."""
    values = np.asarray(values, np.float32)
    if dtype == FLOAT16:
        return values.astype(np.float16)
    if dtype == BFLOAT16:
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values


def from_bits(stored: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BFLOAT16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


class Tensor:
    """A tensor in device memory with a dtype, strides and a misalignment.

    ``permutation`` is the order of its dimensions in memory, ``step`` the distance of neighbours, ``offset`` the
    elements before the first.
    """

    def __init__(
        self,
        library: Library,
        values: np.ndarray,
        dtype: int = FLOAT32,
        permutation: Sequence[int] | None = None,
        step: int = 1,
        offset: int = 0,
    ) -> None:
        order = tuple(range(values.ndim)) if permutation is None else tuple(permutation)
        stored = to_bits(np.ascontiguousarray(np.transpose(values, order)), dtype)
        spread = np.zeros(max(stored.size * step - (step - 1), 0), stored.dtype)
        spread[::step] = stored.reshape(-1)
        self.array: DeviceArray = library.array(spread, offset)
        self.dtype, self.shape, self.order, self.step = dtype, values.shape, order, step
        strides, size = [0] * values.ndim, step
        for d in reversed(order):
            strides[d], size = size, size * values.shape[d]
        self.strides = strides

    def numpy(self) -> np.ndarray:
        stored = self.array.numpy()[:: self.step].reshape([self.shape[d] for d in self.order])
        return from_bits(np.transpose(stored, np.argsort(self.order)), self.dtype)


class StoredSegment:
    """What a segment's backward is given, in device memory. tensors: the numbers of each that kernels.cu reads."""

    def __init__(
        self,
        library: Library,
        states: Sequence[np.ndarray],
        numels: Sequence[int],
        record_tiles: Sequence[int],
        records: Sequence[np.ndarray],
        loss_weights: Sequence[float],
        lrs: Sequence[float],
        decays: Sequence[float],
        grad_ends: Sequence[np.ndarray] | None,
    ) -> None:
        held = [library.array(state) for state in states]
        ends = [library.array(end) for end in grad_ends] if grad_ends else None
        self.starts = [library.array(np.full_like(state, np.nan)) for state in states]
        self.tensors = []
        for k in range(len(states)):
            addresses = [held[k].pointer, ends[k].pointer if ends else 0, self.starts[k].pointer]
            self.tensors.append(np.array([numels[k], record_tiles[k], *addresses], np.int64))
        recorded = [library.array(record) for record in records]
        self.steps = len(records) - 1
        self.coefficients = np.zeros((self.steps + 1, 3), np.float32)
        self.coefficients[1:, 0] = loss_weights
        self.coefficients[: self.steps, 1] = lrs
        self.coefficients[: self.steps, 2] = decays
        self.addresses = np.array([record.pointer for record in recorded], np.int64)
        self._held = (held, ends, recorded)


class StoredStep:
    """What the functional step's backward is given, in device memory."""

    def __init__(
        self, library: Library, grad: Tensor, grad_update: np.ndarray, state: np.ndarray, grad_new_state: np.ndarray
    ) -> None:
        self.grad_grad = Tensor(library, np.full(grad.shape, np.nan, np.float32), grad.dtype)
        self.grad_state = library.array(np.full_like(state, np.nan))
        held, end = library.array(state), library.array(grad_new_state)
        above = library.array(np.ascontiguousarray(grad_update, np.float32).reshape(-1))
        stream = [grad.array.pointer, grad.dtype, self.grad_grad.array.pointer, grad.dtype, 0, above.pointer]
        stream += [held.pointer, end.pointer, 0, self.grad_state.pointer, len(grad.shape), *grad.shape, *grad.strides]
        self.stream = np.array(stream, np.int64)
        self._held = (grad, held, end, above)


class Kernels:
    """What the operators launch, on device arrays of a :class:`Library`."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def step(
        self,
        config: Config,
        phi: np.ndarray,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[DeviceArray],
        new_states: Sequence[DeviceArray] | None = None,
        records: Sequence[int] | None = None,
        *,
        lr: float = 1.0,
        decay: float = 1.0,
        maximize: bool = False,
        in_place: bool = True,
        mapping: int = AUTOMATIC,
        tensor_cores: bool = False,
    ) -> None:
        """``records``: an address per tensor."""
        stream: list[int] = []
        for k, (param, grad) in enumerate(zip(params, grads)):
            stream += [param.array.pointer, param.dtype, grad.array.pointer, grad.dtype, states[k].pointer]
            stream += [(new_states or states)[k].pointer, records[k] if records else 0, len(param.shape)]
            stream += [*param.shape, *param.strides, *grad.strides]
        self.library.call(
            "step",
            config.sizes(),
            np.array([config.p, config.output_scale, lr, decay], np.float32),
            self.library.array(phi.astype(np.float32)),
            np.array([maximize, in_place, mapping, 0, 0, tensor_cores], np.int64),
            len(params),
            np.array(stream, np.int64),
            *(None, None, None, None),
        )

    def segment_backward(
        self,
        config: Config,
        phi: np.ndarray,
        states: Sequence[np.ndarray],
        numels: Sequence[int],
        record_tiles: Sequence[int],
        records: Sequence[np.ndarray],
        loss_weights: Sequence[float],
        lrs: Sequence[float],
        decays: Sequence[float],
        grad_ends: Sequence[np.ndarray] | None = None,
        scratch_budget: int = 0,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        places = states, numels, record_tiles, records
        segment = StoredSegment(self.library, *places, loss_weights, lrs, decays, grad_ends)
        grad_phi = self.library.array(np.full(phi.shape, np.nan, np.float32))
        self.library.call(
            "segment_backward",
            config.sizes(),
            np.array([config.p, config.output_scale], np.float32),
            self.library.array(phi.astype(np.float32)),
            len(states),
            np.concatenate([np.zeros(0, np.int64), *segment.tensors]),
            segment.steps,
            segment.addresses,
            None,
            segment.coefficients,
            grad_phi,
            scratch_budget,
        )
        return grad_phi.numpy(), [start.numpy() for start in segment.starts]

    def step_backward(
        self,
        config: Config,
        phi: np.ndarray,
        grad: Tensor,
        grad_update: np.ndarray,
        state: np.ndarray,
        grad_new_state: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stored = StoredStep(self.library, grad, grad_update, state, grad_new_state)
        grad_phi = self.library.array(np.full(phi.shape, np.nan, np.float32))
        self.library.call(
            "step_backward",
            config.sizes(),
            np.array([config.p, config.output_scale], np.float32),
            self.library.array(phi.astype(np.float32)),
            stored.stream,
            grad_phi,
        )
        return stored.grad_grad.numpy(), stored.grad_state.numpy(), grad_phi.numpy()

    def math(self, function: int, x: np.ndarray) -> np.ndarray:
        y = self.library.array(np.full_like(x, np.nan))
        self.library.call("math", function, self.library.array(x), y, x.size)
        return y.numpy()
