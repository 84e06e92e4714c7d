"""Pictures of learning curves. Needs matplotlib (``pip install l2l_fast[train]``), imported only when drawing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .comparison import LEARNED, Comparison, data_set

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind safe (Okabe and Ito); the learned optimizer stands out by weight, too.
_COLOURS = {LEARNED: "#D55E00", "sgd": "#999999", "nag": "#0072B2", "rmsprop": "#009E73", "adam": "#CC79A7"}
_SPREAD = (0.1, 0.9)


def learning_curves(
    comparisons: Sequence[Comparison],
    path: str | os.PathLike[str],
    *,
    titles: Sequence[str] | None = None,
    heading: str | None = None,
) -> Path:
    """Draw one panel per comparison: median loss over the test tasks and the band from the 10th to the 90th percentile,
    on a logarithmic axis. The file's ending chooses the format. Returns the path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing to draw, or another number of titles.
    """
    comparisons = list(comparisons)
    if not comparisons:
        raise ValueError("comparisons: expected at least one, got none")
    if titles is not None and len(titles) != len(comparisons):
        raise ValueError(f"titles: expected {len(comparisons)}, got {len(titles)}")
    figure = _figure(len(comparisons))
    for k, (comparison, axes) in enumerate(zip(comparisons, figure.axes)):
        _panel(axes, comparison, titles[k] if titles is not None else comparison.problem.name)
    if heading is not None:
        figure.suptitle(heading, fontsize=13, fontweight="bold")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _figure(panels: int) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install matplotlib (or l2l_fast[train])", name="matplotlib"
        ) from error
    # Not through pyplot: no window system, no global state.
    figure = Figure(figsize=(7.0 * panels, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(1, panels)
    return figure


def _panel(axes: Axes, comparison: Comparison, title: str) -> None:
    steps = torch.arange(comparison.horizon + 1)
    # The learned curve last, so that it lies on top.
    for name in sorted(comparison.losses, key=lambda key: key == LEARNED):
        losses = comparison.losses[name]
        learned = name == LEARNED
        colour = _COLOURS.get(name)
        median = losses.median(0).values
        low, high = (losses.quantile(q, 0) for q in _SPREAD)
        (line,) = axes.plot(
            steps,
            _finite(median),
            color=colour,
            linewidth=2.6 if learned else 1.5,
            linestyle="-" if learned else "--",
            label=comparison.label(name),
            zorder=4 if learned else 3,
        )
        axes.fill_between(steps, _finite(low), _finite(high), color=line.get_color(), alpha=0.15, linewidth=0, zorder=2)
    axes.set_yscale("log")
    axes.set_xlim(0, comparison.horizon)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(f"{title}\n{data_set(comparison.problem)}", fontsize=10)
    axes.grid(True, which="major", color="0.88")
    axes.grid(True, which="minor", color="0.95", linewidth=0.6)
    _plain_numbers(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        title=f"median and 10-90 % band over\n{comparison.tasks()}",
        title_fontsize=8,
        fontsize=9,
        frameon=False,
    )


def _plain_numbers(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogFormatter

    # Within about a decade the powers of ten alone would leave the axis nearly without numbers.
    low, high = axes.get_ylim()
    number = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(number)
    if high / low < 200:
        chosen = LogFormatter(minor_thresholds=(2, 0.5))
        chosen.set_axis(axes.yaxis)
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))


def _finite(values: torch.Tensor) -> torch.Tensor:
    # A gap in the line where episodes have diverged.
    return torch.where(values.isfinite(), values, torch.nan)
