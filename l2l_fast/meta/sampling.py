"""A cheaper, unbiased meta-gradient: back-propagate through a random part of the coordinates only.

All coordinates of a tensor run the same network and d L / d phi is a sum over them, so a random subset, scaled up,
estimates it. The subset consists of whole tiles of 64 coordinates, drawn anew in every segment; tensors of a few tiles
(biases, small layers) always take part. The optimizee's own steps are not affected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import operators
from ..kernels.state import TILE, State
from ..optim.optimizer import LearnedOptimizer
from ..optim.segment import Segment, Tape

SMALL = 16  # a tensor of at most so many tiles is never sampled


class SampledSegment(Segment):
    """A segment whose :meth:`backward` visits about ``fraction`` of the tiles of every large tensor."""

    def __init__(self, fraction: float, generator: torch.Generator) -> None:
        super().__init__()
        self._fraction = fraction
        self._generator = generator

    def _kernel_backward(
        self,
        tape: Tape,
        indices: tuple[int, ...],
        params: list[Tensor],
        final: dict[Tensor, Tensor],
        w: list[float],
        end_grads: Mapping[Tensor, State],
        need_grad_start: bool,
    ) -> tuple[Tensor, list[State]]:
        small = [param for param in params if self._tiles(param) <= SMALL]
        if len(small) == len(params) or end_grads or need_grad_start:
            return super()._kernel_backward(tape, indices, params, final, w, end_grads, need_grad_start)
        total = torch.zeros_like(tape.phi, dtype=torch.float32)
        if small:
            total += super()._kernel_backward(tape, indices, small, final, w, {}, False)[0]
        for param in params:
            tiles = self._tiles(param)
            if tiles > SMALL:
                count = math.ceil(self._fraction * tiles)
                chosen = torch.randperm(tiles, generator=self._generator, device="cpu")[:count].sort().values
                # Each tile is chosen with probability count / tiles.
                total += self._part(tape, indices, param, final.get(param), w, chosen) * (tiles / count)
        return total, []

    def _tiles(self, param: Tensor) -> int:
        return self.start_states[param].data.shape[0]

    def _part(
        self,
        tape: Tape,
        indices: tuple[int, ...],
        param: Tensor,
        final: Tensor | None,
        w: list[float],
        chosen: Tensor,
    ) -> Tensor:
        """d L / d phi through the ``chosen`` tiles of one tensor, whose records are gathered into small buffers."""
        chosen = chosen.to(tape.phi.device)
        place, tiles = tape.tiles[param], self._tiles(param)
        records = [tape.steps[index].record for index in indices]
        last = torch.zeros(tiles * TILE, dtype=torch.float32, device=tape.phi.device)
        if final is not None:
            last[: param.numel()].view(param.shape).copy_(final)
        rows = [record.view(-1, TILE)[place : place + tiles] for record in records if record is not None]
        rows.append(last.view(-1, TILE))
        # Only the last tile may be partly filled, and the chosen ones are in order.
        unfilled = tiles * TILE - param.numel() if int(chosen[-1]) == tiles - 1 else 0
        grad_phi, _ = operators.segment_backward(
            [self.start_states[param].data.index_select(0, chosen)],
            [chosen.numel() * TILE - unfilled],
            [0],
            [row.index_select(0, chosen).view(-1) for row in rows],
            [],
            *self.coefficients(tape, indices, w),
            tape.phi.float(),
            tape.config,
        )
        return grad_phi


def start_sampled_segment(optimizer: LearnedOptimizer, fraction: float, generator: torch.Generator) -> None:
    """As :meth:`LearnedOptimizer.start_segment`, with a sampled backward pass; ``fraction=1`` is the exact one."""
    optimizer.start_segment()
    if fraction < 1.0:
        optimizer._segment = SampledSegment(fraction, generator)
