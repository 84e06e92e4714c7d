"""Hand-written optimizers at their best learning rates: what a learned optimizer is compared with.

As in Andrychowicz et al. 2016, section 3: the learning rate is tuned per optimizer and problem for the best *final*
loss, the other hyper-parameters are the defaults of Torch7's ``optim``. The search uses validation tasks, the
comparison fresh test tasks.

Reported losses are f at ``p``, the parameters that ``torch.optim`` holds, before each update: ``losses[:, 0]`` is
f(theta_0). For NAG, ``p`` is the look-ahead point theta + 0.9 v at which the gradient is taken; Torch7 reports it there
too (the two formulations give the same sequence), so the paper's NAG curves are of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.optim import SGD, Adam, Optimizer, RMSprop

from ..kernels import checks
from ..kernels.checks import as_float, chosen, positive_int
from ..kernels.surroundings import own_loop
from ..meta.rollout import finite_prefix, rollout
from ..problems.base import Problem, Task, horizon_of, seeds_of
from ..problems.theta import Theta

# Torch7 adds Adam's eps before the bias correction, PyTorch after it; at 1e-8 only gradients of that size could tell.
# The fused kernel is the same arithmetic without a Python loop.
_OPTIMIZERS: dict[str, Callable[[Iterable[torch.nn.Parameter], float], Optimizer]] = {
    "sgd": lambda parameters, lr: SGD(parameters, lr=lr),
    "nag": lambda parameters, lr: SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda parameters, lr: RMSprop(parameters, lr=lr, alpha=0.99, eps=1e-8),
    "adam": lambda parameters, lr: Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True),
}
NAMES = tuple(_OPTIMIZERS)

# Where a search starts, as powers of ten; it goes on from there as far as it has to.
_START = {"sgd": (-2.0, 0.0), "nag": (-2.0, 0.0), "rmsprop": (-2.5, -0.5), "adam": (-2.5, -0.5)}
_LIMIT = (-9.0, 5.0)


def make_optimizer(name: str, parameters: Iterable[torch.nn.Parameter], lr: float) -> Optimizer:
    """The ``torch.optim`` optimizer "sgd", "nag", "rmsprop" or "adam" with Torch7's hyper-parameters.

    Raises:
        ValueError: there is no baseline of that name, or ``lr`` is not positive and finite.
        TypeError: ``lr`` is not a number.
    """
    _check_name(name)
    number = as_float(lr)
    if number is None:
        raise TypeError(f"lr must be a number, got {lr!r}")
    if not 0.0 < number < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    return _OPTIMIZERS[name](parameters, number)


def run(
    problem: Problem,
    name: str,
    lr: float,
    seeds: Iterable[int],
    horizon: int,
    *,
    split: str = "test",
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Optimise the tasks ``problem.sample(seed, split)`` for ``horizon`` steps each, one after the other.

    Returns:
        float64 ``[episodes, horizon + 1]``: f(theta_t) for t = 0..horizon, divided by the task's ``num_problems``.
        From the first infinite or NaN loss on, an episode counts as +inf.

    Raises:
        ValueError: an unknown ``name`` or ``split``, no seeds, ``lr`` or ``horizon`` out of range, or a task without
            anything to optimise. Frozen parameters (requires_grad=False) stay where they are.
    """
    horizon, seeds = horizon_of(horizon), seeds_of("seeds", seeds)
    device = None if device is None else checks.device("device", device)
    with own_loop():
        episodes = [_episode(problem.sample(seed, split, device), name, lr, horizon) for seed in seeds]
    return torch.tensor(episodes, dtype=torch.float64, device="cpu")


def _episode(task: Task, name: str, lr: float, horizon: int) -> list[float]:
    theta = Theta(task)
    optimizer = make_optimizer(name, theta.parameters.values(), lr)
    losses = []
    for loss in rollout(theta, optimizer, horizon):
        losses.append(loss)
        if not loss.isfinite():  # a search tries many learning rates that are far too large
            break
    else:
        losses.append(theta.value())
    found = finite_prefix(losses, task.num_problems)
    return found + [math.inf] * (horizon + 1 - len(found))


@dataclass(frozen=True)
class Search:
    """A finished search: the chosen ``lr``, and the mean final loss of every learning rate tried, in rising order."""

    name: str
    lr: float
    final_losses: dict[float, float]


def search(
    problem: Problem,
    name: str,
    horizon: int,
    *,
    seeds: Iterable[int] = range(10),
    points_per_decade: int = 4,
    split: str = "validation",
    device: torch.device | str | None = None,
    on_trial: Callable[[float, float], None] | None = None,
) -> Search:
    """Find the learning rate with the lowest mean final loss on the tasks ``seeds`` of ``split``.

    A logarithmic grid of two decades is extended until its best point has neighbours on both sides; then the two
    midpoints beside the best are tried too. All learning rates see the same tasks. A mean with a diverged run is +inf.

    Args:
        on_trial: called with (learning rate, mean final loss) after every trial, for a progress display.

    Raises:
        ValueError: an argument is out of range, see ``run``.
        RuntimeError: the best learning rate is still at an edge at 1e-9 or 1e5.
    """
    _check_name(name)
    points_per_decade = positive_int("points_per_decade", points_per_decade)
    seeds = seeds_of("seeds", seeds)
    # Keys are exponents counted in half steps of the grid, so that the midpoints are integers as well.
    unit = 2 * points_per_decade
    trials: dict[int, float] = {}

    def trial(key: int) -> None:
        lr = 10.0 ** (key / unit)
        trials[key] = run(problem, name, lr, seeds, horizon, split=split, device=device)[:, -1].mean().item()
        if on_trial is not None:
            on_trial(lr, trials[key])

    def best() -> int:
        # Among equals the smallest learning rate, so that a grid on which every run diverges grows downwards.
        return min(sorted(trials), key=trials.__getitem__)

    low, high = (round(edge * points_per_decade) * 2 for edge in _START[name])
    for key in range(low, high + 1, 2):
        trial(key)
    while best() in (low, high):
        if best() == low:
            low = key = low - 2
        else:
            high = key = high + 2
        if not _LIMIT[0] <= key / unit <= _LIMIT[1]:
            raise RuntimeError(
                f"no best learning rate for {name} on {problem.name} between 1e{_LIMIT[0]:.0f} and 1e{_LIMIT[1]:.0f}: "
                f"the lowest mean final loss, {trials[best()]:g}, is at the edge {10.0 ** (best() / unit):g}"
            )
        trial(key)
    for key in (best() - 1, best() + 1):
        trial(key)
    return Search(name, 10.0 ** (best() / unit), {10.0 ** (key / unit): trials[key] for key in sorted(trials)})


def tune(problem: Problem, name: str, horizon: int, **options: object) -> float:
    """The best learning rate; ``search(...).lr``, with the same arguments and errors."""
    return search(problem, name, horizon, **options).lr  # type: ignore[arg-type]


@dataclass(frozen=True)
class Baseline:
    """A tuned optimizer's result: its search, and its losses (see ``run``) on the test tasks."""

    search: Search
    losses: torch.Tensor


def compare(
    problem: Problem,
    horizon: int,
    seeds: Iterable[int],
    *,
    names: Iterable[str] = NAMES,
    tuning_seeds: Iterable[int] = range(10),
    split: str = "test",
    device: torch.device | str | None = None,
    on_trial: Callable[[str, float, float], None] | None = None,
) -> dict[str, Baseline]:
    """Tune each optimizer on validation tasks (``tuning_seeds``), then run it on the tasks
    ``seeds`` of ``split``.

    Args:
        on_trial: called with (name, learning rate, mean final loss) after every trial of a search.

    Raises:
        ValueError, RuntimeError: see ``search`` and ``run``.
    """
    seeds, tuning_seeds = seeds_of("seeds", seeds), seeds_of("tuning_seeds", tuning_seeds)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names: expected some of {NAMES}, got {names!r}")
    names = list(names)
    if not names:
        raise ValueError(f"names: expected at least one of {NAMES}, got none")
    for name in names:
        _check_name(name)
    results = {}
    for name in names:
        report = None if on_trial is None else _bind(on_trial, name)
        found = search(problem, name, horizon, seeds=tuning_seeds, device=device, on_trial=report)
        results[name] = Baseline(found, run(problem, name, found.lr, seeds, horizon, split=split, device=device))
    return results


def _bind(on_trial: Callable[[str, float, float], None], name: str) -> Callable[[float, float], None]:
    return lambda lr, loss: on_trial(name, lr, loss)


def _check_name(name: str) -> None:
    if not chosen(name, _OPTIMIZERS):
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
