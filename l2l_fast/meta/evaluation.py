"""Evaluation with phi frozen: learning curves on fresh tasks, and their means with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import checks
from ..kernels.surroundings import own_loop
from ..networks.several import Networks, as_networks
from ..problems import Problem, Task
from ..problems.base import horizon_of, seeds_of
from ..problems.theta import Theta
from .assignment import optimizer_for
from .mismatch import warn_of_mismatch
from .rollout import finite_prefix, rollout


def evaluate(
    net: Networks,
    problem: Problem,
    seeds: Iterable[int],
    horizon: int,
    *,
    split: str = "test",
    device: torch.device | str | None = None,
    on_end: Callable[[Task], None] | None = None,
) -> Tensor:
    """Optimise the tasks ``problem.sample(seed, split)`` for ``horizon`` steps each, phi frozen.

    A network that knows how it was trained warns (:class:`ProtocolWarning`) where that differs from this evaluation.
    Autocast, ``no_grad`` and inference mode around the call make no difference: the loop has its own
    (:func:`l2l_fast.kernels.surroundings.own_loop`).
    ``on_end``: called with every task that was finished without a loss that is not finite, at its last theta.
    The tasks, minibatches and conventions are those of :func:`l2l_fast.baselines.run`, so the curves can be compared.

    Returns:
        float64 ``[episodes, horizon + 1]``: f(theta_t) for t = 0..horizon, divided by the task's ``num_problems``.
        From the first infinite or NaN loss on, an episode counts as +inf.

    Raises:
        TypeError: no networks, no problem, or seeds that are not integers.
        ValueError: an unknown ``split`` or ``device``, no seeds, ``horizon`` out of range, or a task without anything
            to optimise.
    """
    net, horizon, seeds = as_networks(net), horizon_of(horizon), seeds_of("seeds", seeds)
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: expected a Problem, got {type(problem).__name__} (ModuleProblem wraps a module)")
    device = None if device is None else checks.device("device", device)
    warn_of_mismatch(net, problem, horizon)
    with own_loop():
        curves = [_episode(net, problem.sample(seed, split, device), horizon, on_end) for seed in seeds]
    return torch.tensor(curves, dtype=torch.float64, device="cpu")


def _episode(net: Networks, task: Task, horizon: int, on_end: Callable[[Task], None] | None = None) -> list[float]:
    theta = Theta(task)
    optimizer = optimizer_for(task, net, horizon)
    losses = [*rollout(theta, optimizer, horizon), theta.value()]
    curve = finite_prefix(losses, task.num_problems)
    if on_end is not None and math.isfinite(curve[-1]):
        on_end(task)
    return curve


@dataclass(frozen=True)
class Summary:
    """Over episodes: the mean learning curve and the half width of its 95 % interval, both float64 ``[horizon + 1]``,
    and the same of the sum of the losses at steps 1..horizon. Half widths are NaN for a single episode."""

    mean: Tensor
    half_width: Tensor
    total: float
    total_half_width: float
    episodes: int


def summarize(losses: Tensor) -> Summary:
    """Summarise the result of :func:`evaluate` or :func:`l2l_fast.baselines.run`, ``[episodes, horizon + 1]``.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses: expected a tensor [episodes, horizon + 1], got {type(losses).__name__}")
    if losses.dim() != 2 or losses.shape[0] < 1 or losses.shape[1] < 2:
        raise ValueError(f"losses: expected shape [episodes, horizon + 1], got {tuple(losses.shape)}")
    losses = losses.double()
    mean, half_width = interval(losses)
    total, total_half_width = interval(losses[:, 1:].sum(1, keepdim=True))
    return Summary(mean, half_width, total.item(), total_half_width.item(), losses.shape[0])


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the first dimension and half the width of its 95 % interval (Student's t; NaN for one value)."""
    count = values.shape[0]
    mean = values.mean(0)
    if count == 1:
        return mean, torch.full_like(mean, math.nan)
    return mean, student_t95(count - 1) * values.std(0) / math.sqrt(count)


def student_t95(freedom: int) -> float:
    """The two-sided 95 % point of Student's t (Cornish-Fisher series; within 1 % from 3 degrees of freedom on)."""
    if freedom <= 2:
        return (math.nan, 12.706, 4.303)[freedom]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))
