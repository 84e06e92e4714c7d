"""What an estimator of the meta-gradient is, and what a custom meta-loss sees.

All follow one protocol (:class:`l2l_fast.meta.Protocol`). theta and the state travel from segment to segment by value.
f is evaluated once at each theta_t, t = 0..horizon, on one minibatch; at a segment's boundary that evaluation gives the
last loss and gradient of the segment and the first gradient of the next one, so neither is paid for twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...networks.lstm import CoordinatewiseLSTM
from ...networks.several import Networks
from ...problems import Task
from ..protocol import Protocol

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


def weighted_sum(trace: SegmentTrace) -> Tensor:
    """The paper's meta-loss (equation 3): ``sum_t w_t f(theta_t)``."""
    return torch.dot(trace.weights, trace.losses[1:])


def accumulate(parameters: Iterable[torch.nn.Parameter], gradient: Tensor) -> None:
    """Add a flat gradient, of all of these one after the other, to their ``.grad``."""
    start = 0
    for parameter in parameters:
        part = gradient[start : start + parameter.numel()].view_as(parameter).to(parameter)
        parameter.grad = part.clone() if parameter.grad is None else parameter.grad + part
        start += parameter.numel()


class Estimator(ABC):
    """Runs episodes, and finds the meta-gradient of their segments.

    One may carry something from episode to episode (perturbations, a predictor that learns): :meth:`state_dict` is then
    a part of checkpoints, and of what an interrupted run goes back to. Its settings belong into :meth:`config`.

    Attributes:
        autograd, coordinate_fraction, meta_loss: the arguments of :class:`l2l_fast.MetaTrainer` that it serves.
    """

    autograd: bool = False
    coordinate_fraction: float = 1.0
    meta_loss: MetaLoss | None = None

    @abstractmethod
    def episode(
        self,
        task: Task,
        net: Networks,
        protocol: Protocol,
        meta_step: MetaStep,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """Optimise the task with the present phi, from its theta_0 and a zero state.

        Calls ``meta_step``, which changes phi, whenever the network's ``.grad`` holds the gradient of a segment's
        meta-loss; the default is the mean loss per problem, ``sum_t w_t f(theta_t) / num_problems``. A segment whose
        weights are all zero has none.

        Args:
            generator: of everything random but the task's own; one that is seeded anew for every episode makes a run
                a function of its seed.

        Returns:
            f(theta_0) ... f(theta_horizon), see :func:`l2l_fast.meta.rollout.finite_prefix`.
        """

    def config(self) -> dict[str, Any]:
        """JSON-able; what a checkpoint stores and checks, beside the protocol."""
        loss = self.meta_loss
        name = None if loss is None else getattr(loss, "__qualname__", type(loss).__name__)
        return {"meta_loss": name, "autograd": self.autograd, "coordinate_fraction": self.coordinate_fraction}

    def follows(self, member: CoordinatewiseLSTM) -> bool:
        """Whether the meta-gradient is right although this network's weights may change whenever they are looked at."""
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """What it carries from episode to episode, by name; a snapshot. Empty for those that carry nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` took.

        Raises:
            ValueError: ``state`` is not of such an estimator; nothing has been changed then.
        """
        if state:
            raise ValueError(f"checkpoint: unknown tensors of the estimator: {sorted(state)}")
