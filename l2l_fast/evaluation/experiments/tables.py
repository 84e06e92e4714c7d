"""One setting of an experiment as a Markdown table, with what it says about its claims."""

from __future__ import annotations

import math

import torch

from ...meta.evaluation import interval
from ...problems.data.mnist import EMBEDDED
from ..baselines import final_losses, final_window
from ..comparison import LEARNED, Comparison, data_set, when
from .config import Setting, paper_curves

STEPS = (20, 100)


def sum_from_start(comparison: Comparison, name: str) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of the sum of the losses at steps 0..horizon-1, theta_0 included: what
    an unrolled loop that evaluates, then updates, adds up."""
    mean, half_width = interval(comparison.losses[name][:, :-1].sum(1))
    return mean.item(), half_width.item()


def section(setting: Setting, comparison: Comparison, tuning: int) -> list[str]:
    """Title, table and verdicts of a setting."""
    paper = paper_curves(setting.paper) if setting.paper else {}
    split = "" if getattr(comparison.problem, "data", None) is None else f", {setting.split} images"
    columns = _columns(setting, comparison, paper)
    more = "".join(f", {name}={value}" for name, value in setting.tuning_problem.items())
    lines = [
        f"## {setting.title}",
        "",
        f"{comparison.tasks()}{split}; baselines tuned on {tuning} tasks{more}; {data_set(comparison.problem)}; "
        f"`{comparison.problem!r}`" + ("; the optimizer was not trained for this." if setting.transfer else "."),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lowest = min(comparison.losses, key=lambda name: _mean(comparison, name))
    for name in comparison.losses:
        cells = [column[name] for column in columns.values()]
        if name == lowest:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_verdicts(setting, comparison, paper)]


def _columns(
    setting: Setting, comparison: Comparison, paper: dict[str, tuple[list[int], list[float]]]
) -> dict[str, dict[str, str]]:
    """The cells of every column, by optimizer."""
    names = list(comparison.losses)
    summaries = comparison.summaries()
    steps = sorted({step for step in STEPS if step < setting.horizon} | {setting.horizon})
    columns = {"optimizer": {name: comparison.plain_label(name) for name in names}}
    columns["tuned"] = {name: comparison.setting(name) for name in names}
    for step in steps:
        columns[f"step {step}"] = {name: number(summaries[name].mean[step].item()) for name in names}
    finals = {name: comparison.finals(name) for name in names}
    columns[f"final ({when(setting.horizon)})"] = {name: _with_width(interval(finals[name])) for name in names}
    columns["median"] = {name: number(finals[name].median().item()) for name in names}
    if LEARNED in finals:
        others = [name for name in names if name != LEARNED]
        columns["learned minus it"] = {LEARNED: "", **{n: _with_width(comparison.difference(n)) for n in others}}
        columns["learned lower on"] = {LEARNED: "", **{n: "{} of {}".format(*comparison.wins(n)) for n in others}}
        wins = {name: comparison.problem_wins(name) for name in others}
        if any(wins.values()):
            shares = {name: f"{100 * both[0] / both[1]:.0f} %" if both else "" for name, both in wins.items()}
            columns["problems"] = {LEARNED: "", **shares}
    if comparison.by_problem:
        ends = comparison.by_problem
        columns["median problem"] = {n: number(ends[n].median().item()) if n in ends else "" for n in names}
    if comparison.errors:
        wrong = comparison.errors
        columns["test error"] = {n: _percent(interval(wrong[n])) if n in wrong else "" for n in names}
    columns["sum"] = {name: _with_width(sum_from_start(comparison, name)) for name in names}
    if paper:
        last = f"paper, step {setting.horizon}"
        columns[last] = {name: number(paper[name][1][-1]) if name in paper else "" for name in names}
    return columns


def _verdicts(setting: Setting, comparison: Comparison, paper: dict[str, tuple[list[int], list[float]]]) -> list[str]:
    if LEARNED not in comparison.losses:
        return []
    best = comparison.best_baseline()
    final, other = _mean(comparison, LEARNED), _mean(comparison, best)
    difference, half_width = comparison.difference(best)
    rival = f"{comparison.plain_label(best)}, {number(other)}"
    if abs(difference) <= half_width:
        words = f"on par with the best baseline ({rival})"
    elif final < other:
        words = f"below the best baseline ({rival})"
    else:
        words = f"**not below the best baseline ({rival})**"
    lines = [f"- final loss {number(final)}: {words}"]
    several = comparison.over_networks()
    if several is not None:
        mean, width, count = several
        finals = {name: final_losses(losses).mean().item() for name, losses in comparison.others.items()}
        each = ", ".join(f"{name} {number(value)}" for name, value in finals.items())
        lines.append(
            f"- {count} networks trained alike from other seeds: final loss {number(mean)} ± {number(width)} (95 % "
            f"interval over networks; {each})"
        )
    return lines + [_published(setting, comparison, paper, step, value) for step, value in setting.target.items()]


def _published(
    setting: Setting,
    comparison: Comparison,
    paper: dict[str, tuple[list[int], list[float]]],
    step: str,
    value: float,
) -> str:
    """How a published number compares: below, on par (within the interval over tasks) or above; or why it cannot."""
    losses, what = comparison.losses[LEARNED], f"step {step}"
    if step == "sum":
        mean, half_width = sum_from_start(comparison, LEARNED)
        what = "sum"
    elif int(step) == setting.horizon and LEARNED in paper:
        # One step is a minibatch for each task: the last 5 %, of the paper's curve as of ours.
        mean, half_width = (each.item() for each in interval(comparison.finals(LEARNED)))
        window = final_window(setting.horizon)
        value = sum(paper[LEARNED][1][-window:]) / window
        what = f"mean of {when(setting.horizon)}" if window > 1 else what
    else:
        mean, half_width = (each[int(step)].item() for each in interval(losses))
    data = getattr(comparison.problem, "data", None)
    if comparison.problem.config().get("data") == EMBEDDED:
        return f"- published {what} {value:.4g}: not comparable, these are the embedded images ({number(mean)})"
    if data is not None and setting.split != "train":
        return (
            f"- published {what} {value:.4g}: not like for like, {len(data.split(setting.split)):,} images are "
            f"memorised sooner than the paper's ({number(mean)})"
        )
    verdict = "on par" if abs(mean - value) <= half_width else "below" if mean < value else "ABOVE"
    return f"- published {what} {value:.4g}: {verdict} ({number(mean)} ± {number(half_width)})"


def _mean(comparison: Comparison, name: str) -> float:
    return comparison.finals(name).mean().item()


def _with_width(both: tuple[float | torch.Tensor, float | torch.Tensor]) -> str:
    mean, half_width = (float(each) for each in both)
    if not math.isfinite(mean):
        return "diverged" if mean > 0 or math.isnan(mean) else "it diverged"
    return f"{number(mean)} ± {number(half_width)}" if math.isfinite(half_width) else number(mean)


def _percent(both: tuple[torch.Tensor, torch.Tensor]) -> str:
    mean, half_width = (100 * float(each) for each in both)
    return f"{mean:.2f} ± {half_width:.2f} %" if math.isfinite(mean) else "diverged"


def number(value: float) -> str:
    """With the digits that tables show."""
    if not math.isfinite(value):
        return "diverged"
    for size, digits in ((100, ".1f"), (10, ".2f"), (1e-3, ".4f")):
        if abs(value) >= size:
            return f"{value:{digits}}"
    return f"{value:.2g}"
