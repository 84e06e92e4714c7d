"""The way of an optimizer through a task: the one loop for training episodes, evaluation, baselines and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..problems.theta import Theta


def rollout(theta: Theta, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[Tensor]:
    """f(theta_0) ... f(theta_{steps - 1}), detached scalars, with theta_t and its gradient in place; the step from
    theta_t is taken when the loop goes on.

    At the end theta is theta_steps, and f there is the caller's: :meth:`Theta.value` is cheaper where its gradient is
    not wanted. To stop sooner, just leave the loop.

    Raises:
        ValueError: see :meth:`Theta.evaluate`.
    """
    for _ in range(steps):
        yield theta.evaluate()
        optimizer.step()


def finite_prefix(losses: list[Tensor], num_problems: int) -> list[float]:
    """Losses per problem as floats; from the first infinite or NaN one on, all count as +inf."""
    values = (torch.stack(losses).flatten().double() / num_problems).tolist()
    for t, value in enumerate(values):
        if not math.isfinite(value):
            return values[:t] + [math.inf] * (len(values) - t)
    return values
