"""One episode of meta-training: optimise a task with the present phi, and after every segment hand over d L / d phi.

Both ways of doing it follow one protocol. theta and the state travel from segment to segment by value. f is evaluated
once at each theta_t, t = 0..horizon, on one minibatch; at a segment's boundary that evaluation gives the last loss and
gradient of the segment and the first gradient of the next one, so neither is paid for twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optimizer import LearnedOptimizer
from ..problems import Task
from .functional import walkers
from .networks import Networks, optimizer_groups
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
    parameters = list(task.parameters())
    optimizer = LearnedOptimizer(optimizer_groups(task, net))
    generator = torch.Generator() if generator is None else generator
    losses: list[Tensor] = []

    def evaluate() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss = task()
        loss.backward()
        losses.append(loss.detach())

    evaluate()
    for start, end in protocol.segments():
        start_sampled_segment(optimizer, coordinate_fraction, generator)
        for _ in range(start, end):
            optimizer.step()
            evaluate()
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
    ``meta_loss``. Without them it gives the gradients of :func:`fused_episode`.
    """
    theta = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    steppers = walkers(task, net, theta)
    history: list[Tensor] = []
    loss, grads = _value_and_grad(task, _leaves(theta), create_graph=False)
    history.append(loss.detach())
    for start, end in protocol.segments():
        theta = _leaves(theta)
        for walker in steppers:
            walker.detach()
        losses = [loss.detach()]
        grads = [None if grad is None else grad.detach() for grad in grads]
        for t in range(start, end):
            by_name = dict(zip(theta, grads))
            theta = {**theta, **{name: value for w in steppers for name, value in w.step(theta, by_name).items()}}
            # Beyond the boundary nothing depends on the segment's phi, so its last gradient is a mere value.
            loss, grads = _value_and_grad(task, theta, create_graph=protocol.second_derivatives and t + 1 < end)
            losses.append(loss)
            history.append(loss.detach())
        weights = torch.tensor(protocol.weights[start:end], dtype=loss.dtype, device=loss.device)
        if not any(protocol.weights[start:end]):
            continue
        trace = SegmentTrace(torch.stack(losses) / task.num_problems, weights, start, end, theta, task)
        objective = weighted_sum(trace) if meta_loss is None else _checked(meta_loss(trace))
        objective.backward(inputs=list(net.parameters()))
        meta_step()
    return finite_prefix(history, task.num_problems)


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


def _leaves(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in theta.items()}


def _value_and_grad(task: Task, theta: dict[str, Tensor], create_graph: bool) -> tuple[Tensor, list[Tensor | None]]:
    loss = torch.func.functional_call(task, theta, ())
    # The graph of the loss stays: the meta-gradient walks it again, from the loss through theta to phi.
    grads = torch.autograd.grad(
        loss, list(theta.values()), create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return loss, list(grads)


def _checked(objective: Tensor) -> Tensor:
    if not isinstance(objective, Tensor) or objective.numel() != 1:
        got = f"a tensor of shape {tuple(objective.shape)}" if isinstance(objective, Tensor) else repr(objective)
        raise ValueError(f"meta_loss: must return a scalar tensor, got {got}")
    if not objective.requires_grad:
        raise ValueError("meta_loss: the returned value does not depend on the network's parameters")
    return objective.reshape(())
