"""A cheaper, unbiased meta-gradient: back-propagate through a random part of the coordinates only.

All coordinates of a tensor run the same network and d L / d phi is a sum over them, so a random subset, scaled up,
estimates it. The subset consists of whole tiles of 64 coordinates, drawn anew in every segment; tensors of a few tiles
(biases, small layers) always take part. The optimizee's own steps are not affected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import checks, operators
from ..kernels.state import TILE, State
from .segment_backward import Given, coefficients, common_arguments, part_backward
from .tape import Part, Tape

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

    def part_backward(self, tape: Tape, part: Part, given: Given) -> tuple[Tensor, list[State]]:
        """An estimate of what :func:`l2l_fast.optim.segment_backward.part_backward` gives, without gradients of start
        states."""
        small = [param for param in part.params if _tiles(given, param) <= SMALL]
        if part.exact or tape.joint or len(small) == len(part.params):
            return part_backward(tape, part, given)
        total = torch.zeros_like(tape.phi, dtype=torch.float32)
        if small:
            total += part_backward(tape, part._replace(params=small), given)[0]
        for param in part.params:
            tiles = _tiles(given, param)
            if tiles > SMALL:
                count = math.ceil(self.fraction * tiles)
                chosen = torch.randperm(tiles, generator=self.generator, device="cpu")[:count].sort().values
                # Each tile is chosen with probability count / tiles.
                total += _part(tape, part._replace(params=[param]), given, chosen) * (tiles / count)
        return total, []


def _tiles(given: Given, param: Tensor) -> int:
    return given.start_states[param].data.shape[0]


def _part(tape: Tape, part: Part, given: Given, chosen: Tensor) -> Tensor:
    """d L / d phi through the ``chosen`` tiles of the one tensor of a part, whose gradients are gathered into small
    buffers."""
    (param,) = part.params
    chosen = chosen.to(tape.phi.device)
    place, tiles = tape.tiles[param], _tiles(given, param)
    gradients = [tape.steps[index].gradients for index in part.indices]
    last = torch.zeros(tiles * TILE, dtype=torch.float32, device=tape.phi.device)
    if param in given.final:
        final = given.final[param]
        last[: final.numel()].view(final.shape).copy_(final)
    rows = [each.view(-1, TILE)[place : place + tiles] for each in gradients if each is not None]
    rows.append(last.view(-1, TILE))
    # Only the last tile may be partly filled, and the chosen ones are in order.
    unfilled = tiles * TILE - given.start_states[param].numel if int(chosen[-1]) == tiles - 1 else 0
    grad_phi, _ = operators.segment_backward(
        [given.start_states[param].data.index_select(0, chosen)],
        [chosen.numel() * TILE - unfilled],
        [0],
        [row.index_select(0, chosen).view(-1) for row in rows],
        [],
        *coefficients(tape, part, given.w),
        tape.phi.float(),
        tape.config,
        **common_arguments(tape, part, [param]),
    )
    return grad_phi
