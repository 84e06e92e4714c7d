"""The suite's pictures: learning curves of every network, and all ln ratios at a glance."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import plots
from ..comparison import LEARNED
from . import measures
from .curves import Run, smoothed
from .outcome import ADAMS, MUONS, NAGS, TUNED, USUAL_NAME, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CONTENDERS = (plots.COLOURS[LEARNED], "#000000", "#009E73", "#F0E442")  # first the learned one's
_WORST = 3.0  # ln ratios beyond are drawn at the rim


def curves(outcomes: Sequence[Outcome], path: str | os.PathLike[str]) -> Path:
    """A panel per network: smoothed losses of the contenders and of the baselines, geometric means over the seeds.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no outcomes, or of different lengths.
    """
    if len({outcome.steps for outcome in outcomes}) != 1:
        raise ValueError(f"outcomes: expected some of one length, got {[outcome.steps for outcome in outcomes]}")
    first = outcomes[0]
    figure = plots.make_figure(len(first.rows), 4)
    for axes, (name, row) in zip(figure.axes, first.rows.items()):
        beside = (
            ("Adam 0.001", USUAL_NAME, "adam", ":"),
            ("tuned Adam", TUNED, "adam", "-"),
            ("best Adam(W)", row.best(ADAMS), "adamw", "--"),
            ("tuned NAG", row.best(NAGS), "nag", "--"),
            ("tuned Muon", row.best(MUONS), "muon", "-."),
        )
        for label, chosen, colour, style in beside:
            if chosen is not None:
                _line(axes, row.baselines[chosen].runs, label, plots.COLOURS[colour], style, 1.5)
        for outcome, colour in zip(outcomes, _colours(outcomes)):
            _line(axes, outcome.rows[name].runs, outcome.contender, colour, "-", 2.4)
        _frame(axes, first, name)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    plots.add_legend(figure, list(handles.values()), list(handles))
    plots.set_heading(figure, f"Training loss over {first.steps:,} steps, {len(row.runs)} seeds")
    return plots.save_figure(figure, path)


def _frame(axes: Axes, outcome: Outcome, name: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogFormatter

    row = outcome.rows[name]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, outcome.steps)
    # A contender that diverges must not press the other curves together.
    start = max(run.start for run in row.runs)
    lowest = [min(map(float, np.asarray(line.get_ydata())), default=start) for line in axes.get_lines()]
    low = min((value for value in lowest if math.isfinite(value) and value > 0), default=start)
    axes.set_ylim(low / 1.25, start * 1.6)
    number = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(number)
    if start / low < 50:
        chosen = LogFormatter(minor_thresholds=(2, 0.5))
        chosen.set_axis(axes.yaxis)
        minor = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
        axes.yaxis.set_minor_formatter(minor)
    axes.tick_params(which="both", labelsize=8)
    plots.set_title(axes, f"{name} ({row.data})" if row.data != "none" else name)
    axes.grid(True, which="major", color="0.9")
    axes.set_xlabel("step", fontsize=8)


def _line(axes: Axes, runs: Sequence[Run], label: str, colour: str, style: str, width: float) -> None:
    steps, values = smoothed(runs)
    values = np.where(np.isfinite(values), values, np.nan)
    axes.plot(steps + 1, values, color=colour, linestyle=style, linewidth=width, label=label)


def ratios(outcomes: Sequence[Outcome], path: str | os.PathLike[str]) -> Path:
    """A panel per length of runs: for every network the ln ratios to tuned Adam (filled; seeds small) and to the best
    Adam(W) (hollow).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no outcomes.
    """
    lengths = sorted({outcome.steps for outcome in outcomes})
    if not lengths:
        raise ValueError("outcomes: expected at least one, got none")
    figure = plots.make_figure(len(lengths))
    names = list(outcomes[0].rows)
    figure.set_size_inches(6.4 * len(lengths), 1.6 + 0.34 * len(names))
    for axes, steps in zip(figure.axes, lengths):
        alike = [outcome for outcome in outcomes if outcome.steps == steps]
        for k, (outcome, colour) in enumerate(zip(alike, _colours(alike))):
            shift = (k - (len(alike) - 1) / 2) * 0.6 / len(alike)
            _strip(axes, outcome, colour, shift)
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set_xlim(-_WORST * 0.6, _WORST * 1.05)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_xlabel("ln(final loss / baseline's); left of 0 the contender is lower")
        axes.set_title(f"{steps:,} steps", fontsize=11)
        axes.grid(True, color="0.92")
    _ratio_legend(figure, [outcome for outcome in outcomes if outcome.steps == lengths[0]])
    return plots.save_figure(figure, path)


def _strip(axes: Axes, outcome: Outcome, colour: str, shift: float) -> None:
    for place, row in enumerate(outcome.rows.values()):
        best = row.best(ADAMS) or TUNED
        axes.plot(_rim(measures.mean(row.ratios(best))), place + shift, "D", color=colour, mfc="white", ms=5, zorder=3)
        each = row.ratios(TUNED)
        axes.plot([_rim(value) for value in each], [place + shift] * len(each), ".", color=colour, ms=4, zorder=4)
        axes.plot(_rim(measures.mean(each)), place + shift, "o", color=colour, ms=7, alpha=0.85, zorder=4)
    summary = outcome.against((TUNED,))
    if summary is not None:
        axes.axvline(_rim(summary.iqm), color=colour, linewidth=1.4, linestyle="--", zorder=2)


def _rim(value: float) -> float:
    return min(_WORST, max(-_WORST * 0.58, value))


def _colours(outcomes: Sequence[Outcome]) -> list[Any]:
    from matplotlib import colormaps

    more = colormaps["tab20"](range(20))
    return [_CONTENDERS[k] if k < len(_CONTENDERS) else more[k % len(more)] for k in range(len(outcomes))]


def _ratio_legend(figure: Any, outcomes: Sequence[Outcome]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = [Patch(color=colour) for colour in _colours(outcomes)]
    labels = [outcome.contender for outcome in outcomes]
    entries += [
        Line2D([], [], marker="o", linestyle="", color="0.3"),
        Line2D([], [], marker="D", linestyle="", color="0.3", mfc="white"),
        Line2D([], [], linestyle="--", color="0.3"),
    ]
    labels += ["to tuned Adam (dots: seeds)", "to the best Adam(W)", f"interquartile mean; rim: {_WORST:g} or more"]
    plots.add_legend(figure, entries, labels)
