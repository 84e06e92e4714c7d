"""The meta-gradient of a part of a segment: by the operator in one launch, or, where it is exact, by the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import normalized, operators, reference
from ..kernels.state import TILE, State
from .tape import Part, Tape


class Given(NamedTuple):
    """What :func:`part_backward` needs beside the tape: by parameter, the states at the start, the gradients at theta_T
    (of those that have one) and the given gradients of the states after the last step; the weights w_1 ... w_T; whether
    the gradients of the start states are asked for."""

    start_states: Mapping[Tensor, State]
    final: Mapping[Tensor, Tensor]
    w: Sequence[float]
    end_grads: Mapping[Tensor, State]
    need_grad_start: bool


def part_backward(tape: Tape, part: Part, given: Given) -> tuple[Tensor, list[State]]:
    """dL/dphi of one part ``[P]`` and, on request, dL/d(start state) of its parameters (else an empty list)."""
    if not part.params:
        return torch.zeros_like(tape.phi), []
    return (_through_reference if part.exact else _by_the_operator)(tape, part, given)


def like(state: State, data: Tensor) -> State:
    """A state of the same sizes with other contents."""
    return state._like(data)


def _by_the_operator(tape: Tape, part: Part, given: Given) -> tuple[Tensor, list[State]]:
    steps, params = [tape.steps[index] for index in part.indices], part.params
    starts = [given.start_states[param] for param in params]
    gradients = [step.gradients for step in steps if step.gradients is not None]
    # The buffers grow when a parameter joins during the segment; these parameters lie in all of them.
    size = min(each.numel() for each in gradients)
    last = torch.zeros(size, dtype=torch.float32, device=tape.phi.device)
    for param in params:
        if param in given.final:
            place = TILE * tape.tiles[param]
            final = given.final[param]
            last[place : place + final.numel()].view(final.shape).copy_(final)
    grad_phi, grad_starts = operators.segment_backward(
        [start.data for start in starts],
        [start.numel for start in starts],
        [tape.tiles[param] for param in params],
        [each[:size] for each in gradients] + [last],
        [step.means for step in steps if step.means is not None],
        *coefficients(tape, part, given.w),
        tape.phi.float(),
        tape.config,
        tape.num_problems,
        _injected(params, given),
        given.need_grad_start,
        **common_arguments(tape, part, params),
    )
    return grad_phi, [like(start, data) for start, data in zip(starts, grad_starts)]


def _through_reference(tape: Tape, part: Part, given: Given) -> tuple[Tensor, list[State]]:
    steps, params, final = [tape.steps[index] for index in part.indices], part.params, given.final
    moved = [{*step.params, *step.exact} for step in steps]
    grads: list[list[Tensor | None]] = [
        [step.gradient(param, tape.tiles).double() if param in those else None for param in params]
        for step, those in zip(steps, moved)
    ]
    grads.append([final[param].reshape(-1).double() if param in final else None for param in params])
    starts = [given.start_states[param] for param in params]
    ends = [
        given.end_grads.get(param, like(start, torch.zeros_like(start.data))) for param, start in zip(params, starts)
    ]
    common = common_arguments(tape, part, params)
    common.pop("ages", None)  # the states know them
    grad_phi, grad_starts = reference.segment_backward(
        [start.to(torch.float64).to_logical() for start in starts],
        grads,
        *coefficients(tape, part, given.w),
        tape.phi.double(),
        tape.config,
        [end.to(torch.float64).to_logical() for end in ends],
        tape.num_problems,
        **common,
    )
    if not given.need_grad_start:
        return grad_phi, []
    return grad_phi, [State.from_logical(logical).to(start.dtype) for logical, start in zip(grad_starts, starts)]


def coefficients(tape: Tape, part: Part, w: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """loss_weights, lrs and decays of a part's steps, as :func:`l2l_fast.reference.segment_backward` takes them."""
    # For parameters that moved only in some steps, the others drop out: theta stood still and f's gradient counts
    # as zero there. What was kept of step j is sign_j * grad f, so the sign goes into the weight.
    steps = [tape.steps[index] for index in part.indices]
    loss_weights = [step.sign * w[step.t - 1] for step in steps[1:]] + [w[-1]]
    return loss_weights, [step.lr for step in steps], [step.decay for step in steps]


def common_arguments(tape: Tape, part: Part, params: Sequence[Tensor]) -> dict[str, Any]:
    """ages, tensor_inputs and nominal of some parameters of a part in its steps, as
    :func:`l2l_fast.kernels.operators.segment_backward` takes them; none for networks without averages."""
    if not tape.config.averages:
        return {}
    steps = [tape.steps[index].common_of(params, part.exact) for index in part.indices]
    default = torch.tensor(normalized.NOMINAL, dtype=torch.float32, device=tape.phi.device).expand(len(params), -1)
    inputs = [step.tensor_inputs for step in steps if step.tensor_inputs is not None]
    nominal = [default if step.nominal is None else step.nominal for step in steps]
    return {
        "ages": steps[0].ages,
        "tensor_inputs": torch.stack(inputs) if inputs else None,
        "nominal": torch.stack(nominal),
    }


def _injected(params: Sequence[Tensor], given: Given) -> list[Tensor]:
    """The given gradients of the states after the last step, or an empty list."""
    if not any(param in given.end_grads for param in params):
        return []
    found = []
    for param in params:
        if param in given.end_grads:
            state = given.end_grads[param]
            data = state.data.clone(memory_format=torch.contiguous_format)
            if state.numel % TILE:
                data[-1, :, state.numel % TILE :] = 0.0  # the padding of a gradient from elsewhere may hold anything
        else:
            data = torch.zeros_like(given.start_states[param].data)
        found.append(data)
    return found
