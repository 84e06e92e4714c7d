"""A cheaper, unbiased meta-gradient: back-propagate through a random part of the coordinates only.

All coordinates of a tensor run the same network and d L / d phi is a sum over them, so a random subset, scaled up,
estimates it. The subset consists of whole tiles of 64 coordinates, drawn anew in every segment; tensors of a few tiles
(biases, small layers) always take part. The optimizee's own steps are not affected.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import checks, operators
from ..kernels.state import TILE

if TYPE_CHECKING:
    from .segment import Segment
    from .segment_tape import Tape

SMALL = 16  # a tensor of at most so many tiles is never sampled


class Sampling:
    """Which coordinates a segment's backward pass visits, for :meth:`l2l_fast.LearnedOptimizer.start_segment`.

    Args:
        fraction: about this part of the tiles of every large tensor.
        generator: on the CPU; chooses them.

    Raises:
        TypeError, ValueError: ``fraction`` is not a number in (0, 1], or ``generator`` not such a generator.
    """

    def __init__(self, fraction: float, generator: torch.Generator) -> None:
        self.fraction = checks.real("fraction", fraction, above=0.0, high=1.0)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != "cpu":
            raise ValueError(f"generator: expected one on the CPU, got one on {generator.device}")
        self.generator = generator

    def backward(
        self,
        segment: Segment,
        tape: Tape,
        indices: tuple[int, ...],
        params: list[Tensor],
        final: dict[Tensor, Tensor],
        w: list[float],
    ) -> Tensor:
        """An estimate of d L / d phi through ``params``, which moved in the steps ``indices`` of one tape."""
        small = [param for param in params if _tiles(segment, param) <= SMALL]
        if len(small) == len(params):
            return segment.kernel_backward(tape, indices, params, final, w, {}, False)[0]
        total = torch.zeros_like(tape.phi, dtype=torch.float32)
        if small:
            total += segment.kernel_backward(tape, indices, small, final, w, {}, False)[0]
        for param in params:
            tiles = _tiles(segment, param)
            if tiles > SMALL:
                count = math.ceil(self.fraction * tiles)
                chosen = torch.randperm(tiles, generator=self.generator, device="cpu")[:count].sort().values
                # Each tile is chosen with probability count / tiles.
                total += _part(segment, tape, indices, param, final.get(param), w, chosen) * (tiles / count)
        return total


def _tiles(segment: Segment, param: Tensor) -> int:
    return segment.start_states[param].data.shape[0]


def _part(
    segment: Segment,
    tape: Tape,
    indices: tuple[int, ...],
    param: Tensor,
    final: Tensor | None,
    w: list[float],
    chosen: Tensor,
) -> Tensor:
    """d L / d phi through the ``chosen`` tiles of one tensor, whose records are gathered into small buffers."""
    chosen = chosen.to(tape.phi.device)
    place, tiles = tape.tiles[param], _tiles(segment, param)
    records = [tape.steps[index].record for index in indices]
    last = torch.zeros(tiles * TILE, dtype=torch.float32, device=tape.phi.device)
    if final is not None:
        last[: param.numel()].view(param.shape).copy_(final)
    rows = [record.view(-1, TILE)[place : place + tiles] for record in records if record is not None]
    rows.append(last.view(-1, TILE))
    # Only the last tile may be partly filled, and the chosen ones are in order.
    unfilled = tiles * TILE - param.numel() if int(chosen[-1]) == tiles - 1 else 0
    grad_phi, _ = operators.segment_backward(
        [segment.start_states[param].data.index_select(0, chosen)],
        [chosen.numel() * TILE - unfilled],
        [0],
        [row.index_select(0, chosen).view(-1) for row in rows],
        [],
        *segment.coefficients(tape, indices, w),
        tape.phi.float(),
        tape.config,
    )
    return grad_phi
