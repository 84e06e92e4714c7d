"""The meta-gradient of networks with global averages whose coordinates are sharded over a mesh, through the reference.

The kernel takes a whole segment in one launch, and averages have to come from other processes in each layer of each
step, forwards and backwards. So every process goes through its own coordinates in autograd, in float64, and adds up in
between. Copies that another process counts (:mod:`l2l_fast.optim.sharding`) take part without coordinates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.state import LogicalState, State
from .segment_backward import Given, coefficients, like
from .sharding import Adder, counts_here, from_counted
from .tape import Part, Tape


def part_backward(tape: Tape, part: Part, given: Given, mesh: Any) -> tuple[Tensor, list[State]]:
    """As :func:`l2l_fast.optim.segment_backward.part_backward`, of this process's shards: dL/dphi through them, to be
    added up over ``mesh``, and the gradients of their start states."""
    steps, params = [tape.steps[index] for index in part.indices], part.params
    counts = [counts_here(param, mesh) for param in params]
    starts = [given.start_states[param] for param in params]
    sizes = [start.numel if counted else 0 for start, counted in zip(starts, counts, strict=True)]
    grads: list[list[Tensor | None]] = []
    for step in steps:
        moved = {*step.params}
        kept = [step.gradient(param, tape.tiles) if param in moved else None for param in params]
        grads.append([None if g is None else g[:size].double() for g, size in zip(kept, sizes, strict=True)])
    final = [given.final.get(param) for param in params]
    grads.append([None if g is None else g.reshape(-1)[:size].double() for g, size in zip(final, sizes, strict=True)])
    zeros = [like(start, torch.zeros_like(start.data)) for start in starts]
    ends = [given.end_grads.get(param, zero) for param, zero in zip(params, zeros, strict=True)]
    grad_phi, grad_starts = reference.segment_backward(
        [_first(start, size) for start, size in zip(starts, sizes, strict=True)],
        grads,
        *coefficients(tape, part, given.w),
        tape.phi.double(),
        tape.config,
        [_first(end, size) for end, size in zip(ends, sizes, strict=True)],
        add=Adder(mesh),
    )
    if not given.need_grad_start:
        return grad_phi, []
    found = []
    for param, zero, counted, logical in zip(params, zeros, counts, grad_starts, strict=True):
        data = State.from_logical(logical).data.to(zero.dtype) if counted else zero.data
        found.append(like(zero, from_counted(data, param, mesh)))
    return grad_phi, found


def _first(state: State, size: int) -> LogicalState:
    """The first coordinates of a state, in float64."""
    return [(h[:size], c[:size]) for h, c in state.to(torch.float64).to_logical()]
