"""What the suite prints: for each length of runs a summary with a column per contender, then a table of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..experiments.tables import number
from .curves import EARLY
from .measures import mean
from .outcome import ADAMS, MUONS, NAGS, TUNED, USUAL_NAME, Outcome, Row, Summary
from .tuning import SWEPT_STEPS

EXPLAINED = (
    "Final: the mean training loss of the last 5 % of the steps. ln ratios: of the contender's final loss to the "
    "baseline's, from the same theta_0 and minibatches, averaged over seeds; below 0 the contender is lower (-0.69: "
    "half the loss). Over networks: the interquartile mean with its 95 % bootstrap interval over networks and seeds, "
    "and the worst. Tuned Adam: at its best constant rate for each network; best Adam(W): the lowest of Adam and AdamW "
    "with constant and cosine rates, each tuned; tuned NAG, tuned Muon: likewise. Adam's steps: when tuned Adam's "
    "smoothed curve is where the contender ends. Diverged: a loss that is not finite, or a final loss above that of "
    "theta_0."
)


def text(outcomes: Sequence[Outcome]) -> str:
    """Everything, as Markdown."""
    lines = [EXPLAINED]
    for steps in sorted({outcome.steps for outcome in outcomes}):
        alike = [outcome for outcome in outcomes if outcome.steps == steps]
        lines += ["", f"## {steps:,} steps", "", *summary_table(alike)]
        for outcome in alike:
            lines += ["", f"### {outcome.contender}, {steps:,} steps", "", *network_table(outcome)]
        lines += _notes(alike)
    return "\n".join(lines)


def summary_table(outcomes: Sequence[Outcome]) -> list[str]:
    """The measures, a column per contender."""
    runs = sum(len(row.runs) for row in outcomes[0].rows.values())
    rows = {f"diverged runs of {runs}": [_diverged(outcome) for outcome in outcomes]}
    rows["below Adam 0.001 on"] = [_below_usual(outcome) for outcome in outcomes]
    for step in EARLY if outcomes[0].steps <= SWEPT_STEPS else ():
        early = _ratio_rows(f"tuned Adam at step {step}", [outcome.early(step) for outcome in outcomes])
        rows |= {label: cells for label, cells in early.items() if "lower on" not in label}
    beside = {"tuned Adam": (TUNED,), "best Adam(W)": ADAMS, "tuned NAG": NAGS, "tuned Muon": MUONS}
    for label, names in beside.items():
        rows |= _ratio_rows(label, [outcome.against(names) for outcome in outcomes])
    rows["steps that tuned Adam needs, median"] = [_steps(o.median_adam_steps(), o.steps) for o in outcomes]
    header = ["measure", *(outcome.contender for outcome in outcomes)]
    return _table(header, [[label, *cells] for label, cells in rows.items()])


def network_table(outcome: Outcome) -> list[str]:
    """A row per network."""
    header = ["network", "start", "final", "Adam 0.001", "tuned Adam", "best Adam(W)", "tuned NAG", "tuned Muon"]
    header += ["ln to tuned Adam", "ln to best Adam(W)", "ln to NAG", "ln to Muon", "Adam's steps", "notes"]
    return _table(header, [_network_cells(name, row, outcome.steps) for name, row in outcome.rows.items()])


def _network_cells(name: str, row: Row, steps: int) -> list[str]:
    best = {TUNED: row.best((TUNED,)), "adams": row.best(ADAMS), "nags": row.best(NAGS), "muons": row.best(MUONS)}
    cells = [name, number(_start(row)), number(row.final), number(row.baselines[USUAL_NAME].final)]
    for chosen in best.values():
        found = None if chosen is None else row.baselines[chosen]
        cells.append("" if found is None else f"{number(found.final)} ({found.label})")
    cells += ["" if chosen is None else ratio(mean(row.ratios(chosen))) for chosen in best.values()]
    cells.append(_steps(row.adam_steps(), steps))
    notes = [f"{row.diverged} of {len(row.runs)} diverged"] if row.diverged else []
    notes += [f"{each.label} is at an edge of its search" for each in row.baselines.values() if each.edge]
    lost = [each.label for each in row.baselines.values() if any(run.diverged for run in each.runs)]
    return [*cells, "; ".join([*notes, *(f"{label} diverged on a test seed" for label in dict.fromkeys(lost))])]


def _start(row: Row) -> float:
    """The loss at theta_0, the mean over seeds."""
    return sum(run.start for run in row.runs) / len(row.runs)


def _ratio_rows(label: str, sums: Sequence[Summary | None]) -> dict[str, list[str]]:
    if all(each is None for each in sums):
        return {}
    rows: dict[str, list[str]] = {f"ln ratio to {label}": [], "... worst": [], "... lower on": []}
    for each in sums:
        if each is None:
            for cells in rows.values():
                cells.append("")
            continue
        spread = f" [{ratio(each.low)}, {ratio(each.high)}]"
        cells = [ratio(each.iqm) + spread, f"{ratio(each.worst)} ({each.worst_on})"]
        cells.append(f"{each.wins} of {each.networks}, every seed on {each.clear_wins}")
        for column, cell in zip(rows.values(), cells):
            column.append(cell)
    return {key if key.startswith("ln") else f"{key} ({label})": cells for key, cells in rows.items()}


def _diverged(outcome: Outcome) -> str:
    found = outcome.diverged()
    each = ", ".join(f"{name} {count}" for name, count in found.items())
    return f"{sum(found.values())}" + (f" ({each})" if each else "")


def _below_usual(outcome: Outcome) -> str:
    above = outcome.not_below_usual()
    return f"{len(outcome.rows) - len(above)} of {len(outcome.rows)}" + (f"; not: {', '.join(above)}" if above else "")


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    missing = outcomes[0].missing
    return ["", f"Not there for every network: {', '.join(missing)} (`--tune` measures them)."] if missing else []


def ratio(value: float) -> str:
    """A logarithm with its sign."""
    if not math.isfinite(value):
        return "diverged" if value > 0 or math.isnan(value) else "baseline diverged"
    return f"{value:+.2f}"


def _steps(value: float, steps: int) -> str:
    return f"{round(value):,}" if math.isfinite(value) else f">{steps:,}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
