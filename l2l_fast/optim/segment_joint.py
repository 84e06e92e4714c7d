"""The meta-gradient of a segment of a parameter group whose coordinates communicate.

Global averages tie all tensors of the group together, so they are back-propagated as one. Where the same tensors moved
in every step, one launch does it, with the means recorded in the steps; else the reference does, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import operators, reference
from ..kernels.state import State

if TYPE_CHECKING:
    from .segment import Segment, Tape


def backward(
    segment: Segment,
    tape: Tape,
    final: Mapping[Tensor, Tensor],
    w: list[float],
    end_grads: Mapping[Tensor, State],
    need_grad_start: bool,
) -> tuple[Tensor, dict[Tensor, State]]:
    """dL/dphi of one tape and, on request, dL/d(start state) of its parameters."""
    patterns = tape.patterns(False)
    if any(step.exact for step in tape.steps) or len(patterns) != 1:
        return _through_reference(segment, tape, final, w, end_grads, need_grad_start)
    ((indices, params),) = patterns.items()
    starts = [segment.start_states[param] for param in params]
    grad_phi, grad_starts = operators.segment_backward(
        [start.data for start in starts],
        [param.numel() for param in params],
        [tape.tiles[param] for param in params],
        segment.records(tape, indices, params, final),
        [means for index in indices if (means := tape.steps[index].means) is not None],
        *segment.coefficients(tape, indices, w),
        tape.phi.float(),
        tape.config,
        tape.num_problems,
        segment.injected(params, end_grads),
        need_grad_start,
    )
    return grad_phi, {p: start._like(data) for p, start, data in zip(params, starts, grad_starts)}


def _through_reference(
    segment: Segment,
    tape: Tape,
    final: Mapping[Tensor, Tensor],
    w: list[float],
    end_grads: Mapping[Tensor, State],
    need_grad_start: bool,
) -> tuple[Tensor, dict[Tensor, State]]:
    # A step in which no tensor moved is left out, as the loss there does not reach any update.
    indices = [k for k, step in enumerate(tape.steps) if step.params or step.exact]
    members = [(step := tape.steps[k], {*step.params, *step.exact}) for k in indices]
    params = list({param: None for step, _ in members for param in (*step.params, *step.exact)})
    if not params:
        return torch.zeros_like(tape.phi), {}
    grads: list[list[Tensor | None]] = [
        [step.recorded(param, tape.tiles).double() if param in moved else None for param in params]
        for step, moved in members
    ]
    grads.append([final[param].reshape(-1).double() if param in final else None for param in params])
    starts = [segment.start_states[param] for param in params]
    injected = [
        end_grads.get(param, start._like(torch.zeros_like(start.data))).to_logical()
        for param, start in zip(params, starts)
    ]
    grad_phi, grad_starts = reference.segment_backward(
        [[(h.double(), c.double()) for h, c in start.to_logical()] for start in starts],
        grads,
        *segment.coefficients(tape, indices, w),
        tape.phi.double(),
        tape.config,
        [[(h.double(), c.double()) for h, c in pairs] for pairs in injected],
        tape.num_problems,
    )
    if not need_grad_start:
        return grad_phi, {}
    return grad_phi, {
        param: State.from_logical(logical).to(start.dtype) for param, start, logical in zip(params, starts, grad_starts)
    }
