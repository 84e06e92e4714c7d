"""One episode of meta-training: optimise a task with the present phi, and after every segment hand over d L / d phi.

Both ways of doing it follow one protocol. theta and the state travel from segment to segment by value. f is evaluated
once at each theta_t, t = 0..horizon, on one minibatch; at a segment's boundary that evaluation gives the last loss and
gradient of the segment and the first gradient of the next one, so neither is paid for twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..networks.several import Networks
from ..optim.optimizer import LearnedOptimizer
from ..problems import Task
from ..problems.theta import Theta
from .assignment import optimizer_groups
from .functional import Rounded, as_theta, walkers, with_edits
from .protocol import Protocol
from .sampling import start_sampled_segment

MetaStep = Callable[[], None]


@dataclass
class SegmentTrace:
    """What a custom meta-loss sees of one segment; everything is differentiable with respect to phi.

    Attributes:
        losses: ``[T + 1]``, f(theta_start) ... f(theta_end), divided by the task's ``num_problems``; the first does not
            depend on phi.
        weights: ``[T]``, the w_t of the segment's steps.
        start, end: t of the segment's first and last theta.
        parameters: theta_end by name.
        task: the task, to evaluate anything else with ``torch.func.functional_call(task, parameters, ())``.
    """

    losses: Tensor
    weights: Tensor
    start: int
    end: int
    parameters: dict[str, Tensor]
    task: Task


MetaLoss = Callable[[SegmentTrace], Tensor]


def fused_episode(
    task: Task,
    net: Networks,
    protocol: Protocol,
    meta_step: MetaStep,
    coordinate_fraction: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[float]:
    """An ordinary training loop with :class:`LearnedOptimizer`; the meta-gradient is one fused launch per segment.

    Calls ``meta_step`` whenever the network's ``.grad`` holds the gradient of a segment's mean loss per problem,
    ``sum_t w_t f(theta_t) / num_problems``. Returns f(theta_0) ... f(theta_horizon), see :func:`finite_prefix`.
    ``coordinate_fraction`` and ``generator``: see :mod:`l2l_fast.meta.sampling`.
    """
    theta = Theta(task)
    optimizer = LearnedOptimizer(optimizer_groups(task, net))
    generator = torch.Generator() if generator is None else generator
    losses = [theta.evaluate()]
    for start, end in protocol.segments():
        start_sampled_segment(optimizer, coordinate_fraction, generator)
        for _ in range(start, end):
            optimizer.step()
            losses.append(theta.evaluate())
        weights = [w / task.num_problems for w in protocol.weights[start:end]]
        if any(weights):
            optimizer.backward_segment(weights)
            meta_step()
        else:
            optimizer.discard_segment()
    return finite_prefix(losses, task.num_problems)


def autograd_episode(
    task: Task,
    net: Networks,
    protocol: Protocol,
    meta_step: MetaStep,
    meta_loss: MetaLoss | None = None,
) -> list[float]:
    """The same episode unrolled in autograd: theta is a function of phi, updated by the functional step.

    Serves what the fused backward cannot: second derivatives of f (``protocol.second_derivatives``) and any
    ``meta_loss``. Without them it gives the gradients of :func:`fused_episode`: theta's values live in the task, where
    f and its gradient are taken in the very same way, and f(theta_t) enters the meta-loss through that gradient. What f
    does to its own parameters stays there, as a constant shift, see :func:`l2l_fast.meta.functional.with_edits`.

    Raises:
        NotImplementedError: second derivatives of, or a ``meta_loss`` that evaluates, a task that recomputes its
            activations in the backward pass (gradient checkpointing).
    """
    place = Theta(task)
    dtypes = {name: parameter.dtype for name, parameter in place.parameters.items()}
    theta = {name: as_theta(parameter) for name, parameter in place.parameters.items()}
    steppers = walkers(task, net, theta)
    loss = place.evaluate()
    theta = with_edits(theta, place.parameters)
    grads = place.grads()
    history = [loss]
    for start, end in protocol.segments():
        theta = {name: value.detach() for name, value in theta.items()}
        grads = {name: None if grad is None else grad.detach() for name, grad in grads.items()}
        for walker in steppers:
            walker.detach()
        losses = [loss]
        for t in range(start, end):
            moved = {name: value for w in steppers for name, value in w.step(theta, grads).items()}
            moved = {name: _rounded(value, dtypes[name]) for name, value in moved.items()}
            theta = {**theta, **moved}
            place.write(moved)
            # Beyond the boundary nothing depends on the segment's phi, so its last gradient is a mere value.
            if protocol.second_derivatives and t + 1 < end:
                values = {name: value.to(dtypes[name]) for name, value in _differentiable(theta).items()}
                loss, found = place.evaluate_differentiably(values)
                grads = dict(zip(values, found))
                theta = with_edits(theta, values)
            else:
                loss, grads = place.evaluate(), place.grads()
                theta = with_edits(theta, place.parameters)
            losses.append(_Loss.apply(loss, *theta.values(), *(grads[name] for name in theta)))
            history.append(loss)
        if not any(protocol.weights[start:end]):
            continue
        weights = torch.tensor(protocol.weights[start:end], dtype=loss.dtype, device=loss.device)
        present = {name: value.to(dtypes[name]) for name, value in theta.items()}
        trace = SegmentTrace(torch.stack(losses) / task.num_problems, weights, start, end, present, task)
        objective = weighted_sum(trace) if meta_loss is None else _checked(meta_loss(trace))
        with place.out_of_reach():
            objective.backward(inputs=[parameter for parameter in net.parameters() if parameter.requires_grad])
        meta_step()
    return finite_prefix(history, task.num_problems)


class _Loss(torch.autograd.Function):
    """f(theta) as a function of theta, whose gradient is known already: once is enough to evaluate f."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *theta_and_grads: Tensor | None) -> Tensor:
        half = len(theta_and_grads) // 2
        ctx.dtypes = [value.dtype for value in theta_and_grads[:half]]  # type: ignore[union-attr]
        ctx.save_for_backward(*theta_and_grads[half:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        products = [
            None if known is None else grad.to(dtype) * known.to(dtype)
            for known, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (None, *products, *[None] * len(products))


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else Rounded.apply(value, dtype)


def _differentiable(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    # A parameter that has not moved yet is a constant, of which autograd would give no gradient.
    return {name: value if value.requires_grad else value.requires_grad_() for name, value in theta.items()}


def weighted_sum(trace: SegmentTrace) -> Tensor:
    """The paper's meta-loss (equation 3): ``sum_t w_t f(theta_t)``."""
    return torch.dot(trace.weights, trace.losses[1:])


def finite_prefix(losses: list[Tensor], num_problems: int) -> list[float]:
    """Losses per problem as floats; from the first infinite or NaN one on, all count as +inf."""
    values = (torch.stack(losses).double() / num_problems).tolist()
    for t, value in enumerate(values):
        if not math.isfinite(value):
            return values[:t] + [math.inf] * (len(values) - t)
    return values


def _checked(objective: Tensor) -> Tensor:
    if not isinstance(objective, Tensor) or objective.numel() != 1:
        got = f"a tensor of shape {tuple(objective.shape)}" if isinstance(objective, Tensor) else repr(objective)
        raise ValueError(f"meta_loss: must return a scalar tensor, got {got}")
    if not objective.requires_grad:
        raise ValueError("meta_loss: the returned value does not depend on the network's parameters")
    return objective.reshape(())
