"""The recurrent state of the learned optimizer and its blocked memory layout.

Every coordinate owns ``2 * num_layers * hidden_size`` numbers: h and c of each layer; and, of networks with normalized
inputs, the moving averages of its gradient. They are stored in tiles of 64 coordinates, ``[tiles, numbers, 64]``, so
that one row of one tile is contiguous for SIMD lanes and GPU warps, and one tile is a contiguous block of memory. Lane
j of tile i is coordinate ``64 * i + j`` of the tensor in row-major (logical) order, whatever its strides; the lanes
past the last coordinate are padding and never reach a result. The layout is private: everything outside the kernels
talks through :meth:`State.to_logical` and :meth:`State.from_logical`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TILE = 64


class Averages(NamedTuple):
    """The moving averages of one tensor's gradients, the last entry of the logical state of a network that has them:
    ``rows`` ``[numel, 4]`` (:mod:`l2l_fast.kernels.normalized`), and how many steps they are of."""

    rows: Tensor
    age: int


LogicalState = list[Any]
"""One pair ``(h, c)`` per layer, each ``[numel, hidden_size]``; then :class:`Averages`, if the network has them."""


def num_tiles(numel: int) -> int:
    """Number of 64-coordinate tiles that hold ``numel`` coordinates."""
    return (numel + TILE - 1) // TILE


class State:
    """Recurrent state of the coordinatewise LSTM for one tensor of ``numel`` coordinates.

    Args:
        data: ``[ceil(numel / 64), 2 * num_layers * hidden_size + averages, 64]``, float32 (float64 only for the
            reference path).
        numel: number of coordinates.
        hidden_size: H, units per layer.
        num_layers: number of LSTM layers.
        averages: rows of moving averages, :attr:`Config.averages`.
        age: steps that the averages are of; 0 where there are none.

    Raises:
        TypeError: ``data`` is not a float32 or float64 tensor.
        ValueError: ``data`` does not have the shape above.

    A state is a pytree node: it passes through ``torch.compile``, ``torch.utils.checkpoint`` and the like, and
    gradients with respect to a state travel as a :class:`State` too.
    """

    data: Tensor
    numel: int
    hidden_size: int
    num_layers: int
    averages: int = 0
    age: int = 0

    def __init__(
        self, data: Tensor, numel: int, hidden_size: int, num_layers: int, averages: int = 0, age: int = 0
    ) -> None:
        if not isinstance(data, Tensor) or data.dtype not in (torch.float32, torch.float64):
            got = data.dtype if isinstance(data, Tensor) else type(data).__name__
            raise TypeError(f"data: expected a float32 or float64 tensor, got {got}")
        expected = (num_tiles(numel), 2 * num_layers * hidden_size + averages, TILE)
        if tuple(data.shape) != expected:
            more = f", averages={averages}" if averages else ""
            raise ValueError(
                f"data: expected shape {expected} for numel={numel}, hidden_size={hidden_size}, "
                f"num_layers={num_layers}{more}, got {tuple(data.shape)}"
            )
        if age < 0 or (age and not averages):
            raise ValueError(f"age: expected a number >= 0, and 0 without averages, got {age}")
        self.data = data
        self.numel = numel
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        if averages:
            self.averages, self.age = averages, age

    @classmethod
    def zeros(
        cls,
        numel: int,
        hidden_size: int,
        num_layers: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        averages: int = 0,
    ) -> State:
        """The all-zero state that every coordinate starts from (Andrychowicz et al. 2016 do not train it)."""
        if numel < 0:
            raise ValueError(f"numel: expected a number >= 0, got {numel}")
        shape = (num_tiles(numel), 2 * num_layers * hidden_size + averages, TILE)
        return cls(torch.zeros(shape, device=device, dtype=dtype), numel, hidden_size, num_layers, averages)

    @classmethod
    def from_logical(cls, layers: Sequence[Any]) -> State:
        """Build a state from one ``(h, c)`` pair per layer, each ``[numel, hidden_size]``, and perhaps
        :class:`Averages` behind them. Differentiable.

        Raises:
            TypeError: not a sequence of pairs of float32 or float64 tensors of one dtype.
            ValueError: no layers, or shapes or devices that differ.
        """
        averages = layers[-1] if isinstance(layers, Sequence) and layers and type(layers[-1]) is Averages else None
        if averages is not None and len(layers) == 1:
            pairs, (numel, hidden_size) = [], (averages.rows.shape[0], 0)
        else:
            pairs = _check_logical(layers if averages is None else layers[:-1])
            numel, hidden_size = pairs[0][0].shape
        parts = [part for pair in pairs for part in pair] + ([] if averages is None else [averages.rows])
        rows = torch.cat(parts, dim=1)
        tiles = num_tiles(numel)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, tiles * TILE - numel))
        data = padded.view(tiles, TILE, rows.shape[1]).transpose(1, 2).contiguous()
        more = () if averages is None else (averages.rows.shape[1], averages.age)
        return cls(data, numel, hidden_size, len(pairs), *more)

    def to_logical(self) -> LogicalState:
        """One ``(h, c)`` pair per layer, each ``[numel, hidden_size]``, free of padding, and :class:`Averages`, if
        there are any. Differentiable copy."""
        # contiguous() always copies here; reshape() alone would hand out views of a state of one tile.
        rows = self.data.transpose(1, 2).contiguous().view(-1, self.data.shape[1])[: self.numel]
        parts = rows[:, : rows.shape[1] - self.averages].split(max(self.hidden_size, 1), dim=1)
        pairs: LogicalState = [(parts[2 * k], parts[2 * k + 1]) for k in range(self.num_layers)]
        return [*pairs, Averages(rows[:, -self.averages :], self.age)] if self.averages else pairs

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def clone(self) -> State:
        """A copy with its own memory (differentiable, as :meth:`torch.Tensor.clone`)."""
        return self._like(self.data.clone())

    def detach(self) -> State:
        """The same memory, cut off from the autograd graph: what carries a state across unrolled segments."""
        return self._like(self.data.detach())

    def to(self, *args: Any, **kwargs: Any) -> State:
        """Convert device or dtype, with the arguments of :meth:`torch.Tensor.to`."""
        return self._like(self.data.to(*args, **kwargs))

    def _like(self, data: Tensor) -> State:
        return State(data, *_flatten(self)[1])

    def __repr__(self) -> str:
        more = f"averages={self.averages}, age={self.age}, " if self.averages else ""
        return (
            f"State(numel={self.numel}, hidden_size={self.hidden_size}, num_layers={self.num_layers}, {more}"
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )


def _check_logical(layers: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    if isinstance(layers, (Tensor, str)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected a sequence of (h, c) pairs, got {type(layers).__name__}")
    if len(layers) == 0:
        raise ValueError("layers: expected at least one (h, c) pair, got none")
    pairs: list[tuple[Tensor, Tensor]] = []
    for k, pair in enumerate(layers):
        if isinstance(pair, Tensor) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"layers[{k}]: expected a pair (h, c), got {type(pair).__name__}")
        for name, part in zip(("h", "c"), pair, strict=True):
            if not isinstance(part, Tensor):
                raise TypeError(f"layers[{k}] {name}: expected a tensor, got {type(part).__name__}")
        pairs.append((pair[0], pair[1]))
    first = pairs[0][0]
    if first.dim() != 2:
        raise ValueError(f"layers[0] h: expected shape [numel, hidden_size], got {tuple(first.shape)}")
    if first.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"layers[0] h: expected float32 or float64, got {first.dtype}")
    for k, pair in enumerate(pairs):
        for name, part in zip(("h", "c"), pair, strict=True):
            if part.shape != first.shape:
                raise ValueError(f"layers[{k}] {name}: expected shape {tuple(first.shape)}, got {tuple(part.shape)}")
            if part.dtype != first.dtype:
                raise TypeError(f"layers[{k}] {name}: expected {first.dtype}, got {part.dtype}")
            if part.device != first.device:
                raise ValueError(f"layers[{k}] {name}: expected device {first.device}, got {part.device}")
    return pairs


def _flatten(state: State) -> tuple[list[Any], tuple[int, ...]]:
    more = (state.averages, state.age) if state.averages else ()
    return [state.data], (state.numel, state.hidden_size, state.num_layers, *more)


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], tuple[int, ...]]:
    leaves, context = _flatten(state)
    return [(pytree.GetAttrKey("data"), leaves[0])], context


def _unflatten(leaves: Any, context: tuple[int, ...]) -> State:
    # No checks: tree_map may put anything in the leaf's place.
    state = State.__new__(State)
    (state.data,) = leaves
    state.numel, state.hidden_size, state.num_layers, *more = context
    if more:
        state.averages, state.age = more
    return state


pytree.register_pytree_node(
    State,
    _flatten,
    _unflatten,
    serialized_type_name="l2l_fast.State",
    # Through JSON a tuple comes back as a list, which would be another tree: an exported program would refuse states.
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
# A tensor and three numbers: an exported program with states as example inputs loads with weights_only=True.
torch.serialization.add_safe_globals([State])
