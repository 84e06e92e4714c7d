"""A learned optimizer against hand-written ones at their best learning rates, on the same fresh test tasks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.checks import positive_int
from ..meta.evaluation import Summary, evaluate, interval, summarize
from ..networks.several import Networks
from ..problems import Problem
from . import baselines
from .baselines import RULES, Setup, final_losses, final_window

LEARNED = "learned"
_LABELS = {**{name: rule.label for name, rule in RULES.items()}, LEARNED: "learned LSTM"}
_STEPS = (1, 10, 20, 40, 60, 80, 100, 200, 500, 1000, 2000, 5000, 10000)


@dataclass(frozen=True)
class Comparison:
    """Learning curves on the same test tasks, by optimizer.

    Attributes:
        losses: float64 ``[episodes, horizon + 1]``, ``"learned"`` first, if it took part. A task's loss is the mean of
            ``problems_per_task`` problems.
        learning_rates: the tuned ones of the hand-written optimizers; setups: all that was tuned of them.
        by_problem: where a task holds several problems, the last loss of each, ``[episodes, problems]``.
        errors: where a task has held-out examples, the share that the last theta gets wrong, ``[episodes]``.
        others: the losses of networks trained as ``"learned"`` was but from other seeds, by name.
    """

    problem: Problem
    losses: dict[str, Tensor]
    learning_rates: dict[str, float]
    problems_per_task: int = 1
    setups: dict[str, Setup] = field(default_factory=dict)
    by_problem: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def horizon(self) -> int:
        return next(iter(self.losses.values())).shape[1] - 1

    @property
    def episodes(self) -> int:
        return next(iter(self.losses.values())).shape[0]

    def summaries(self) -> dict[str, Summary]:
        """Mean curve and 95 % interval of every optimizer."""
        return {name: summarize(losses) for name, losses in self.losses.items()}

    def finals(self, name: str) -> Tensor:
        """The final loss of every episode: the mean of the last 5 % of its losses, ``[episodes]``."""
        return final_losses(self.losses[name])

    def best_baseline(self) -> str:
        """The hand-written optimizer with the lowest mean final loss."""
        finals = {name: self.finals(name).mean().item() for name in self.losses if name != LEARNED}
        return min(finals, key=finals.__getitem__)

    def difference(self, name: str) -> tuple[float, float]:
        """Mean and half width of the 95 % interval of the paired differences of final losses, learned minus ``name``:
        both had the same tasks. (inf, NaN) or (-inf, NaN) where one of them diverged."""
        mean, half_width = interval(self.finals(LEARNED) - self.finals(name))
        return mean.item(), half_width.item()

    def wins(self, name: str) -> tuple[int, int]:
        """On how many tasks the learned optimizer's final loss is lower than that of ``name``, and of how many."""
        return int((self.finals(LEARNED) < self.finals(name)).sum()), self.episodes

    def problem_wins(self, name: str) -> tuple[int, int] | None:
        """The same problem by problem (last loss), where tasks hold several."""
        if LEARNED not in self.by_problem or name not in self.by_problem:
            return None
        lower = self.by_problem[LEARNED] < self.by_problem[name]
        return int(lower.sum()), lower.numel()

    def over_networks(self) -> tuple[float, float, int] | None:
        """Mean final loss of networks trained alike, half the 95 % interval of that mean over the networks, and how
        many there are; None if there are not several."""
        if not self.others:
            return None
        each = torch.stack([final_losses(losses).mean() for losses in self.others.values()])
        if len(each) < 2:
            return None
        mean, half_width = interval(each)
        return mean.item(), half_width.item(), len(each)

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

    def setting(self, name: str) -> str:
        """What was tuned of a hand-written optimizer, in words; "" for a learned one."""
        if name in self.setups:
            return self.setups[name].describe()
        return f"lr {self.learning_rates[name]:.3g}" if name in self.learning_rates else ""

    def to_json(self) -> dict[str, Any]:
        """Everything in the table and more, JSON-able (infinite losses are null)."""
        results = {}
        for name, summary in self.summaries().items():
            results[name] = {
                "learning_rate": self.learning_rates.get(name),
                "setting": self.setting(name),
                "finals": _numbers(self.finals(name).tolist()),
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
            "other_networks": {name: _numbers(final_losses(each).tolist()) for name, each in self.others.items()},
        }


def compare(
    net: Networks,
    problem: Problem,
    horizon: int = 100,
    episodes: int = 20,
    *,
    tuning_episodes: int = 10,
    names: Iterable[str] = baselines.NAMES,
    search_options: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    cache: str | os.PathLike[str] | None = None,
    on_trial: Callable[[str, float, float], None] | None = None,
) -> Comparison:
    """Evaluate ``net`` and the tuned baselines on the test tasks 0..episodes-1.

    The baselines are tuned on ``tuning_episodes`` validation tasks for the best final loss
    (:func:`l2l_fast.baselines.search`, which gets ``search_options`` and also calls ``on_trial``; ``cache``: a folder
    that keeps its trials). ``device``: of the tasks; default: the CPU.

    Raises:
        ValueError, TypeError: an argument out of range.
    """
    seeds = range(positive_int("episodes", episodes))
    losses = {LEARNED: evaluate(net, problem, seeds, horizon, device=device)}
    rates, setups = {}, {}
    tuned = baselines.compare(
        problem,
        horizon,
        seeds,
        names=names,
        tuning_seeds=range(positive_int("tuning_episodes", tuning_episodes)),
        search_options=search_options,
        device=device,
        cache=cache,
        on_trial=on_trial,
    )
    for name, baseline in tuned.items():
        losses[name] = baseline.losses
        rates[name] = baseline.search.lr
        setups[name] = baseline.search.setup
    return Comparison(problem, losses, rates, problem.sample(0, "test").side_by_side, setups)


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
    tuned = [f"{comparison.plain_label(name)}: {comparison.setting(name)}" for name in comparison.setups]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], columns[1:])]
        lines.append("  ".join([row[0].ljust(columns[0]), *cells]))
    lines.insert(3, "-" * len(lines[2]))
    lines += ["tuned: " + "; ".join(tuned)] if tuned else []
    return "\n".join(lines)


def verdict(comparison: Comparison) -> tuple[bool, str]:
    """Whether the learned optimizer ends below every baseline, and a sentence that says so or not."""
    best = comparison.best_baseline()
    mean, other_mean = (comparison.finals(name).mean().item() for name in (LEARNED, best))
    sentence = (
        f"{when(comparison.horizon)}: the learned optimizer ends at {_number(mean)}, the best baseline "
        f"({_LABELS.get(best, best)}) at {_number(other_mean)}"
    )
    if math.isfinite(mean) and other_mean > 0:
        wins, tasks = comparison.wins(best)
        difference, half_width = comparison.difference(best)
        sentence += f" ({100 * (mean / other_mean - 1):+.0f} %"
        if math.isfinite(difference):
            paired = f"; paired difference {_number(difference)}"
            sentence += paired + (f" ± {_number(half_width)}" if math.isfinite(half_width) else "")
        sentence += f"); lower on {wins} of {tasks} test tasks"
    return mean < other_mean, sentence


def when(horizon: int) -> str:
    """When a final loss is taken, in words."""
    window = final_window(horizon)
    return f"step {horizon}" if window == 1 else f"steps {horizon - window + 1} to {horizon}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "inf" if value > 0 else "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 4 if abs(value) < 1 else 3
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def _numbers(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
