"""The gradient that crosses a segment's boundary by way of theta itself: injected at theta_T, returned at theta_0.

With every grad f(theta_t) held constant, A_t = d loss / d theta_t obeys

    A_T = w_T g_T + (d loss / d theta_T from beyond)        A_t = w_t g_t + decay_t A_{t+1}        A_0 = decay_0 A_1

so a gradient from beyond is one more addend of the last recorded gradient. It is put there, with a loss weight of 1:
no kernel has to know of it. w * g alone is rounded as the kernels round it, so injecting zeros changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.checks import check_gradient
from ..kernels.state import State
from .sharding import is_dtensor, local, local_gradient
from .tape import Step, Tape


class StartGradients(NamedTuple):
    """What crosses a segment's beginning: by parameter, dL/d(state at the start), if that was asked for, and
    dL/d theta_0, of the shape of the parameter (of a DTensor: of this process's shard), in float64 for float64
    parameters, else in float32."""

    states: dict[Tensor, State] | None
    params: dict[Tensor, Tensor]


def check_end_params(grad_end_params: Mapping[Tensor, Tensor] | None, params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The given gradients of theta_T, of this process's shards; TypeError or ValueError unless they are of ``params``,
    all parameters of the optimizer, and like them."""
    if grad_end_params is None:
        return {}
    if not isinstance(grad_end_params, Mapping):
        raise TypeError(
            f"grad_end_params: expected a mapping from parameters to tensors, got {type(grad_end_params).__name__}"
        )
    known, found = set(params), {}
    for param, given in grad_end_params.items():
        if param not in known:
            raise ValueError("grad_end_params: a key is not a parameter of this optimizer")
        check_gradient("grad_end_params", given)
        shard = is_dtensor(param) and not is_dtensor(given)  # as start_params returns it
        shape = local(param).shape if shard else param.shape
        if given.shape != shape:
            raise ValueError(
                f"grad_end_params: expected a gradient of the {'shard' if shard else 'parameter'}'s shape "
                f"{tuple(shape)}, got {tuple(given.shape)}"
            )
        if given.device != param.device:
            raise ValueError(f"grad_end_params: expected device {param.device}, got {given.device}")
        found[param] = given.detach() if shard else local_gradient(param, given.detach())
    return found


def with_injected(
    tapes: Mapping[int, Tape],
    finals: dict[int, dict[Tensor, Tensor]],
    w: Sequence[float],
    end_params: Mapping[Tensor, Tensor],
) -> tuple[dict[int, dict[Tensor, Tensor]], list[float]]:
    """The gradients at theta_T by tape, times w_T, with what is injected added to them; and the weights that go with
    them, of which the last is 1. Both as they were if nothing is injected."""
    if not end_params:
        return finals, list(w)
    together: dict[int, dict[Tensor, Tensor]] = {}
    for key, tape in tapes.items():
        exact = {param for step in tape.steps for param in step.exact}
        last = {}
        for param in {param: None for step in tape.steps for param in (*step.params, *step.exact)}:
            dtype = torch.float64 if param in exact else torch.float32
            total = None if param not in finals[key] else finals[key][param].to(dtype) * w[-1]
            if param in end_params:
                injected = end_params[param].to(dtype)
                total = injected if total is None else total + injected
            if total is not None:
                last[param] = total
        together[key] = last
    return together, [*w[:-1], 1.0]


def start_params(
    params: Iterable[Tensor],
    tapes: Iterable[Tape],
    w: Sequence[float],
    end_params: Mapping[Tensor, Tensor],
) -> dict[Tensor, Tensor]:
    """dL/d theta_0 of all parameters. One that never moved has the gradient of f at theta_T alone, if it has one there,
    as at all other steps it had none."""
    steps_of: dict[Tensor, list[tuple[Tape, Step]]] = {}
    for tape in tapes:
        for step in tape.steps:
            for param in (*step.params, *step.exact):
                steps_of.setdefault(param, []).append((tape, step))
    found = {}
    for param in params:
        held, grad = local(param), None if param.grad is None else local_gradient(param, param.grad)
        exact = param.dtype is torch.float64 or any(param in step.exact for _, step in steps_of.get(param, ()))
        dtype = torch.float64 if exact else torch.float32
        adjoint = torch.zeros(held.numel(), dtype=dtype, device=held.device)
        if grad is not None:
            adjoint += w[-1] * grad.detach().reshape(-1).to(dtype)
        if param in end_params:
            adjoint += end_params[param].reshape(-1).to(dtype)
        for tape, step in reversed(steps_of.get(param, ())):
            if step.decay != 1.0:
                adjoint *= step.decay
            if step.t > 0:
                adjoint += (step.sign * w[step.t - 1]) * step.gradient(param, tape.tiles).to(dtype)
        found[param] = adjoint.view(held.shape)
    return found
