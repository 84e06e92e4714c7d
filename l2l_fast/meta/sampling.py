"""A cheaper, unbiased meta-gradient: back-propagate through a random part of the coordinates only.

All coordinates of a tensor run the same network and d L / d phi is a sum over them, so a random subset, scaled up,
estimates it. The subset consists of whole tiles of 64 coordinates, drawn anew in every segment; tensors of a few tiles
(biases, small layers) always take part. The optimizee's own steps are not affected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import operators
from ..kernels.state import TILE, State
from ..optim.optimizer import LearnedOptimizer
from ..optim.segment import Segment
from ..optim.segment_backward import Given, coefficients
from ..optim.tape import Part, Tape

SMALL = 16  # a tensor of at most so many tiles is never sampled


class SampledSegment(Segment):
    """A segment whose :meth:`backward` visits about ``fraction`` of the tiles of every large tensor."""

    def __init__(self, fraction: float, generator: torch.Generator) -> None:
        super().__init__()
        self._fraction = fraction
        self._generator = generator

    def part_backward(self, tape: Tape, part: Part, given: Given) -> tuple[Tensor, list[State]]:
        small = [param for param in part.params if self._tiles(param) <= SMALL]
        whole = part.exact or tape.joint or len(small) == len(part.params)
        if whole or given.end_grads or given.need_grad_start:
            return super().part_backward(tape, part, given)
        total = torch.zeros_like(tape.phi, dtype=torch.float32)
        if small:
            total += super().part_backward(tape, part._replace(params=small), given)[0]
        for param in part.params:
            tiles = self._tiles(param)
            if tiles > SMALL:
                count = math.ceil(self._fraction * tiles)
                chosen = torch.randperm(tiles, generator=self._generator, device="cpu")[:count].sort().values
                # Each tile is chosen with probability count / tiles.
                total += self._part(tape, part._replace(params=[param]), given, chosen) * (tiles / count)
        return total, []

    def _tiles(self, param: Tensor) -> int:
        return self.start_states[param].data.shape[0]

    def _part(self, tape: Tape, part: Part, given: Given, chosen: Tensor) -> Tensor:
        """d L / d phi through the ``chosen`` tiles of the one tensor of a part, whose gradients are gathered into small
        buffers."""
        (param,) = part.params
        chosen = chosen.to(tape.phi.device)
        place, tiles = tape.tiles[param], self._tiles(param)
        gradients = [tape.steps[index].gradients for index in part.indices]
        last = torch.zeros(tiles * TILE, dtype=torch.float32, device=tape.phi.device)
        if param in given.final:
            last[: param.numel()].view(param.shape).copy_(given.final[param])
        rows = [each.view(-1, TILE)[place : place + tiles] for each in gradients if each is not None]
        rows.append(last.view(-1, TILE))
        # Only the last tile may be partly filled, and the chosen ones are in order.
        unfilled = tiles * TILE - param.numel() if int(chosen[-1]) == tiles - 1 else 0
        grad_phi, _ = operators.segment_backward(
            [self.start_states[param].data.index_select(0, chosen)],
            [chosen.numel() * TILE - unfilled],
            [0],
            [row.index_select(0, chosen).view(-1) for row in rows],
            [],
            *coefficients(tape, part, given.w),
            tape.phi.float(),
            tape.config,
        )
        return grad_phi


def start_sampled_segment(optimizer: LearnedOptimizer, fraction: float, generator: torch.Generator) -> None:
    """As :meth:`LearnedOptimizer.start_segment`, with a sampled backward pass; ``fraction=1`` is the exact one."""
    optimizer.start_segment()
    if fraction < 1.0:
        optimizer._segment = SampledSegment(fraction, generator)
