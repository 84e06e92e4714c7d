"""A hand-written optimizer on tasks: the counterpart of :func:`l2l_fast.meta.evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from ...kernels import checks
from ...kernels.surroundings import own_loop
from ...meta.rollout import finite_prefix, rollout
from ...problems.base import Problem, Task, horizon_of, seeds_of
from ...problems.theta import Theta
from .rules import check_name, make_optimizer, options_of
from .schedules import SCHEDULES, factor


def run(
    problem: Problem,
    name: str,
    lr: float,
    seeds: Iterable[int],
    horizon: int,
    *,
    options: Mapping[str, float] | None = None,
    schedule: str = "constant",
    split: str = "test",
    device: torch.device | str | None = None,
    on_end: Callable[[Task], None] | None = None,
) -> torch.Tensor:
    """Optimise the tasks ``problem.sample(seed, split)`` for ``horizon`` steps each, one after the other.

    Args:
        options: hyper-parameters besides the learning rate, see :func:`make_optimizer`; default: Torch7's.
        schedule: how the learning rate falls, see :func:`~.schedules.factor`.
        on_end: called with every task that was finished without a loss that is not finite, at its last theta.

    Returns:
        float64 ``[episodes, horizon + 1]``: f(theta_t) for t = 0..horizon, divided by the task's ``num_problems``.
        From the first infinite or NaN loss on, an episode counts as +inf.

    Raises:
        ValueError: an unknown ``name``, ``split`` or ``schedule``, no seeds, ``lr``, an option or ``horizon`` out of
            range, or a task without anything to optimise. Frozen parameters (requires_grad=False) stay where they are.
    """
    horizon, seeds = horizon_of(horizon), seeds_of("seeds", seeds)
    device = None if device is None else checks.device("device", device)
    checks.one_of("schedule", schedule, SCHEDULES)
    check_name(name)
    found = options_of(name, options)
    with own_loop():
        episodes = []
        for seed in seeds:
            task = problem.sample(seed, split, device)
            episodes.append(_episode(task, name, lr, found, schedule, horizon))
            if on_end is not None and math.isfinite(episodes[-1][-1]):
                on_end(task)
    return torch.tensor(episodes, dtype=torch.float64, device="cpu")


def _episode(
    task: Task, name: str, lr: float, options: Mapping[str, float], schedule: str, horizon: int
) -> list[float]:
    theta = Theta(task)
    optimizer = make_optimizer(name, theta.parameters.values(), lr, **options)
    (group,) = optimizer.param_groups
    first = group["lr"]
    losses = []
    for step, loss in enumerate(rollout(theta, optimizer, horizon)):
        losses.append(loss)
        if not loss.isfinite():  # a search tries many learning rates that are far too large
            break
        group["lr"] = first * factor(schedule, step, horizon)
    else:
        losses.append(theta.value())
    found = finite_prefix(losses, task.num_problems)
    return found + [math.inf] * (horizon + 1 - len(found))


def final_window(horizon: int) -> int:
    """How many of the last losses make the *final* one: 5 % of the steps. A single minibatch is noise."""
    return max(1, round(0.05 * horizon))


def final_losses(losses: torch.Tensor) -> torch.Tensor:
    """The mean of the last 5 % of the losses of each episode, ``[episodes]`` from ``[episodes, horizon + 1]``."""
    return losses[:, -final_window(losses.shape[1] - 1) :].mean(1)
