"""A learned optimizer against hand-written ones at their best learning rates, on the same fresh test tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.checks import positive_int
from ..meta.evaluation import Summary, evaluate, summarize
from ..networks.several import Networks
from ..problems import Problem
from . import baselines

LEARNED = "learned"
_LABELS = {"sgd": "SGD", "nag": "NAG", "rmsprop": "RMSprop", "adam": "Adam", LEARNED: "learned LSTM"}
_STEPS = (1, 10, 20, 40, 60, 80, 100, 200, 500, 1000, 2000, 5000, 10000)


@dataclass(frozen=True)
class Comparison:
    """Learning curves by optimizer (``"learned"`` first, if it took part): float64 ``[episodes, horizon + 1]``, all on
    the same test tasks; and the tuned learning rates of the others. A task's loss is the mean of ``problems_per_task``
    problems."""

    problem: Problem
    losses: dict[str, Tensor]
    learning_rates: dict[str, float]
    problems_per_task: int = 1

    @property
    def horizon(self) -> int:
        return next(iter(self.losses.values())).shape[1] - 1

    @property
    def episodes(self) -> int:
        return next(iter(self.losses.values())).shape[0]

    def summaries(self) -> dict[str, Summary]:
        """Mean curve and 95 % interval of every optimizer."""
        return {name: summarize(losses) for name, losses in self.losses.items()}

    def best_baseline(self) -> str:
        """The hand-written optimizer with the lowest mean final loss."""
        finals = {name: losses[:, -1].mean().item() for name, losses in self.losses.items() if name != LEARNED}
        return min(finals, key=finals.__getitem__)

    def tasks(self) -> str:
        """How many test tasks, in words."""
        each = f" (the mean of {self.problems_per_task} problems each)" if self.problems_per_task > 1 else ""
        return f"{self.episodes} fresh test tasks{each}"

    def plain_label(self, name: str) -> str:
        """Name for tables."""
        return _LABELS.get(name, name)

    def label(self, name: str) -> str:
        """Name for tables and legends, with the learning rate."""
        rate = self.learning_rates.get(name)
        return _LABELS.get(name, name) + (f", lr {rate:.3g}" if rate is not None else "")

    def to_json(self) -> dict[str, Any]:
        """Everything in the table and more, JSON-able (infinite losses are null)."""
        results = {}
        for name, summary in self.summaries().items():
            results[name] = {
                "learning_rate": self.learning_rates.get(name),
                "mean": _numbers(summary.mean.tolist()),
                "half_width_95": _numbers(summary.half_width.tolist()),
                "sum": _numbers([summary.total, summary.total_half_width]),
            }
        return {
            "problem": self.problem.config(),
            "data": data_set(self.problem),
            "horizon": self.horizon,
            "test_tasks": self.episodes,
            "problems_per_task": self.problems_per_task,
            "results": results,
        }


def compare(
    net: Networks,
    problem: Problem,
    horizon: int = 100,
    episodes: int = 20,
    *,
    tuning_episodes: int = 10,
    names: Iterable[str] = baselines.NAMES,
    device: torch.device | str | None = None,
    on_trial: Callable[[str, float, float], None] | None = None,
) -> Comparison:
    """Evaluate ``net`` and the tuned baselines on the test tasks 0..episodes-1.

    The baselines' learning rates are searched on ``tuning_episodes`` validation tasks for the best final loss
    (:func:`l2l_fast.baselines.search`, which also calls ``on_trial``). ``device``: of the tasks; default: the CPU.

    Raises:
        ValueError, TypeError: an argument out of range.
    """
    seeds = range(positive_int("episodes", episodes))
    losses = {LEARNED: evaluate(net, problem, seeds, horizon, device=device)}
    rates = {}
    tuned = baselines.compare(
        problem,
        horizon,
        seeds,
        names=names,
        tuning_seeds=range(positive_int("tuning_episodes", tuning_episodes)),
        device=device,
        on_trial=on_trial,
    )
    for name, baseline in tuned.items():
        losses[name] = baseline.losses
        rates[name] = baseline.search.lr
    return Comparison(problem, losses, rates, problem.sample(0, "test").side_by_side)


def data_set(problem: Problem) -> str:
    """One phrase: where the numbers come from."""
    data = getattr(problem, "data", None)
    if data is None:
        return "random problems, drawn afresh"
    sizes = ", ".join(f"{name} {len(data.split(name)):,}" for name in ("train", "validation", "test"))
    return f"{data.name} (images: {sizes})"


def table(comparison: Comparison) -> str:
    """The comparison as text: losses at a few steps and their sum; below each mean, half its 95 % interval."""
    steps = [t for t in _STEPS if t < comparison.horizon] + [comparison.horizon]
    header = ["step", *(str(t) for t in steps), "sum"]
    rows = [header]
    for name, summary in comparison.summaries().items():
        means = [*(summary.mean[t].item() for t in steps), summary.total]
        widths = [*(summary.half_width[t].item() for t in steps), summary.total_half_width]
        rows.append([comparison.label(name), *map(_number, means)])
        rows.append(["", *("±" + _number(width) for width in widths)])
    columns = [max(len(row[k]) for row in rows) for k in range(len(header))]
    lines = [
        f"{comparison.problem!r}",
        f"data: {data_set(comparison.problem)}; means over {comparison.tasks()}, ± 95 % interval",
    ]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], columns[1:])]
        lines.append("  ".join([row[0].ljust(columns[0]), *cells]))
    lines.insert(3, "-" * len(lines[2]))
    return "\n".join(lines)


def verdict(comparison: Comparison) -> tuple[bool, str]:
    """Whether the learned optimizer ends below every baseline, and a sentence that says so or not."""
    learned = comparison.losses[LEARNED][:, -1]
    best = comparison.best_baseline()
    other = comparison.losses[best][:, -1]
    mean, other_mean = learned.mean().item(), other.mean().item()
    wins = int((learned < other).sum())
    below = mean < other_mean
    sentence = (
        f"step {comparison.horizon}: the learned optimizer ends at {_number(mean)}, the best baseline "
        f"({_LABELS.get(best, best)}) at {_number(other_mean)}"
    )
    if math.isfinite(mean) and other_mean > 0:
        difference = 100 * (mean / other_mean - 1)
        sentence += f" ({difference:+.0f} %); lower on {wins} of {comparison.episodes} test tasks"
    return below, sentence


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "inf" if value > 0 else "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 4 if abs(value) < 1 else 3
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def _numbers(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
