"""Pictures of learning curves. Needs matplotlib (``pip install l2l_fast[train]``), imported only when drawing."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..networks import writing
from .comparison import LEARNED, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind safe (Okabe and Ito); the learned optimizer stands out by weight, too.
COLOURS = {
    LEARNED: "#D55E00",
    "sgd": "#999999",
    "momentum": "#56B4E9",
    "nag": "#0072B2",
    "rmsprop": "#009E73",
    "adam": "#CC79A7",
    "adamw": "#E69F00",
    "muon": "#332288",
}
_SPREAD = (0.1, 0.9)
_CENTRES = ("median", "mean")
_MARGIN, _BESIDE = 0.25, 0.8  # inches that are not for a text: of the figure; of a panel, with its numbers
_LABEL = 48  # characters in a line of the legend

Curve: TypeAlias = "tuple[Sequence[float], Sequence[float]]"


def learning_curves(
    comparisons: Sequence[Comparison],
    path: str | os.PathLike[str],
    *,
    titles: Sequence[str] | None = None,
    heading: str | None = None,
    centre: str = "median",
    references: Sequence[Mapping[str, Curve] | None] | None = None,
    columns: int | None = None,
) -> Path:
    """Draw one panel per comparison: median (or mean) loss over the test tasks and the band from the 10th to the 90th
    percentile, on a logarithmic axis. The file's ending chooses the format. Returns the path.

    Args:
        titles, heading: of the panels, of the figure.
        centre: "median" or "mean".
        references: for each panel, published curves by optimizer (steps and losses), dotted.
        columns: panels in a row; default: all.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing to draw, another number of titles or references, or another centre.
    """
    return save_figure(curves_figure(comparisons, titles, heading, centre, references, columns), path)


def curves_figure(
    comparisons: Sequence[Comparison],
    titles: Sequence[str] | None = None,
    heading: str | None = None,
    centre: str = "median",
    references: Sequence[Mapping[str, Curve] | None] | None = None,
    columns: int | None = None,
) -> Any:
    """The figure that :func:`learning_curves` writes; arguments and errors as there."""
    comparisons = list(comparisons)
    if not comparisons:
        raise ValueError("comparisons: expected at least one, got none")
    if titles is not None and len(titles) != len(comparisons):
        raise ValueError(f"titles: expected {len(comparisons)}, got {len(titles)}")
    if references is not None and len(references) != len(comparisons):
        raise ValueError(f"references: expected {len(comparisons)}, got {len(references)}")
    if centre not in _CENTRES:
        raise ValueError(f"centre: expected one of {_CENTRES}, got {centre!r}")
    figure = make_figure(len(comparisons), columns)
    for k, (comparison, axes) in enumerate(zip(comparisons, figure.axes)):
        reference = None if references is None else references[k]
        title = titles[k] if titles is not None else comparison.problem.name
        _panel(axes, comparison, title, centre, reference or {})
    _legend(figure, comparisons, centre, any(references or []))
    if heading is not None:
        set_heading(figure, heading)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str], dpi: int | None = None) -> Path:
    """Write a figure, whole or not at all; its folder is made. The ending chooses the format, without one it is PNG.

    Raises:
        ValueError: an ending that matplotlib does not know; the message lists those that it does.
        OSError: the file cannot be written.
    """
    text = writing.checked_path(path)
    content = io.BytesIO()
    figure.savefig(content, format=format_of(text), dpi=dpi or 150)
    with writing.folder(Path(text).parent):
        writing.write_atomically(text, content.getvalue())
    return Path(text)


def format_of(path: str | os.PathLike[str], name: str = "path") -> str:
    """The format of a picture by its file's ending.

    Raises:
        ValueError: matplotlib does not know it.
        ModuleNotFoundError: matplotlib is not installed.
    """
    ending = Path(os.fsdecode(path)).suffix[1:].lower() or "png"
    known = sorted(make_figure(1).canvas.get_supported_filetypes())
    if ending not in known:
        raise ValueError(f"{name}: expected a file that ends in one of {', '.join(known)}, got {os.fsdecode(path)!r}")
    return ending


def make_figure(panels: int, columns: int | None = None) -> Any:
    """A figure with ``panels`` axes, ``columns`` in a row.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install matplotlib (or l2l_fast[train])", name="matplotlib"
        ) from error
    # Not through pyplot: no window system, no global state.
    columns = min(columns or panels, panels)
    rows = -(-panels // columns)
    width, height = (5.2, 4.4) if rows == 1 and columns < 3 else (4.2, 3.4)
    figure = Figure(figsize=(width * columns, height * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for unused in list(axes)[panels:]:
        figure.delaxes(unused)
    return figure


def _panel(axes: Axes, comparison: Comparison, title: str, centre: str, reference: Mapping[str, Curve]) -> None:
    steps = torch.arange(comparison.horizon + 1)
    # The learned curve last, so that it lies on top.
    for name in sorted(comparison.losses, key=lambda key: key == LEARNED):
        losses = comparison.losses[name]
        learned = name == LEARNED
        colour = COLOURS.get(name)
        middle = losses.median(0).values if centre == "median" else losses.mean(0)
        low, high = (losses.quantile(q, 0) for q in _SPREAD)
        (line,) = axes.plot(
            steps,
            _finite(middle),
            color=colour,
            linewidth=2.6 if learned else 1.5,
            linestyle="-" if learned else "--",
            label=comparison.plain_label(name),
            zorder=4 if learned else 3,
        )
        if name in reference:
            axes.plot(*reference[name], color=line.get_color(), linewidth=1.6, linestyle=":", zorder=5)
        axes.fill_between(steps, _finite(low), _finite(high), color=line.get_color(), alpha=0.15, linewidth=0, zorder=2)
    for losses in comparison.others.values():
        middle = losses.median(0).values if centre == "median" else losses.mean(0)
        axes.plot(steps, _finite(middle), color=COLOURS[LEARNED], linewidth=0.7, alpha=0.7, zorder=3)
    axes.set_yscale("log")
    axes.set_xlim(0, comparison.horizon)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    set_title(axes, title)
    axes.grid(True, which="major", color="0.88")
    axes.grid(True, which="minor", color="0.95", linewidth=0.6)
    _plain_numbers(axes)


def set_heading(figure: Any, text: str, fontsize: int = 13) -> None:
    """Put a text above a figure, in as many lines as its width asks for; call it when the figure has its size."""
    font = {"fontsize": fontsize, "fontweight": "bold"}
    figure.suptitle(_fitted(figure, text, figure.get_figwidth() - _MARGIN, font), **font)


def set_title(axes: Axes, text: str, fontsize: int = 10) -> None:
    """Put a text above a panel, in as many lines as its width asks for; call it when the figure has its size."""
    figure, grid = axes.get_figure(root=True), axes.get_gridspec()
    assert figure is not None and grid is not None
    width = figure.get_figwidth() / grid.ncols - _BESIDE
    axes.set_title(_fitted(figure, text, width, {"fontsize": fontsize}), fontsize=fontsize)


def _fitted(figure: Any, text: str, inches: float, font: dict[str, Any]) -> str:
    probe, renderer = figure.text(0, 0, "", **font), figure.canvas.get_renderer()
    try:
        for width in range(min(len(text), int(25 * inches)), 1, -1):
            lines = "\n".join(textwrap.wrap(text, width))
            probe.set_text(lines)
            if probe.get_window_extent(renderer).width <= inches * figure.dpi:
                return lines
    finally:
        probe.remove()
    return text


def add_legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int = 4, fontsize: int = 9) -> None:
    """One for all panels, below them, in as many columns, up to these, as the figure's width holds."""
    labels = [textwrap.fill(label, _LABEL) for label in labels]
    options = {"loc": "outside lower center", "fontsize": fontsize, "frameon": False}
    for ncols in range(columns, 0, -1):
        legend = figure.legend(handles, labels, ncols=ncols, **options)
        if ncols == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width < figure.bbox.width:
            break
        legend.remove()  # wider than the figure: it would be cut off


def _legend(figure: Any, comparisons: Sequence[Comparison], centre: str, paper: bool) -> None:
    """Optimizers, and what band and dots are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    first = comparisons[0].plain_label(LEARNED)
    entries = {**({first: found[first]} if first in found else {}), **found}
    if any(comparison.others for comparison in comparisons):
        entries["trained alike, other seeds"] = Line2D([], [], color=COLOURS[LEARNED], linewidth=0.7)
    tasks = {comparison.tasks() for comparison in comparisons}
    over = tasks.pop() if len(tasks) == 1 else "the test tasks"
    entries[f"10-90 % of {over} (line: {centre})"] = Patch(color="0.5", alpha=0.25, linewidth=0)
    if paper:
        entries["the paper's mean"] = Line2D([], [], color="0.3", linewidth=1.6, linestyle=":")
    add_legend(figure, list(entries.values()), list(entries), max(2, int(figure.get_figwidth() / 2.2)))


def _plain_numbers(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogFormatter

    # Within about a decade the powers of ten alone would leave the axis nearly without numbers.
    low, high = axes.get_ylim()
    number = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(number)
    if high / low < 200:
        chosen = LogFormatter(minor_thresholds=(2, 0.5))
        chosen.set_axis(axes.yaxis)
        shown = "25" if high / low > 12 else "23457"
        minor = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else "")
        axes.yaxis.set_minor_formatter(minor)


def _finite(values: torch.Tensor) -> torch.Tensor:
    # A gap in the line where episodes have diverged.
    return torch.where(values.isfinite(), values, torch.nan)
