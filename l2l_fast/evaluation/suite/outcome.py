"""A contender's runs beside the baselines', and every figure that the suite prints of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import measures
from .contenders import Contender
from .curves import Run, equivalent_step
from .keeping import Keeper, MissingRun
from .networks import Network
from .tuning import STAGES, USUAL, Baselines

USUAL_NAME = "Adam 0.001"
TUNED = "adam constant"  # Adam at its best constant rate
ADAMS = tuple(f"{rule} {schedule}" for rule, schedule in STAGES if rule.startswith("adam"))
NAGS = tuple(f"{rule} {schedule}" for rule, schedule in STAGES if rule == "nag")
MUONS = tuple(f"{rule} {schedule}" for rule, schedule in STAGES if rule == "muon")


@dataclass(frozen=True)
class Baseline:
    """A tuned baseline on one network: its setting in words, its runs on the test seeds, whether its rate is at an edge
    of what was searched."""

    label: str
    runs: list[Run]
    edge: bool = False

    @property
    def final(self) -> float:
        """Geometric mean over the seeds."""
        return measures.geometric_mean([run.final for run in self.runs])


@dataclass(frozen=True)
class Row:
    """One network: the contender's runs and the baselines, by rule and schedule ("adam cosine")."""

    network: Network
    data: str
    runs: list[Run]
    baselines: dict[str, Baseline]

    def best(self, names: Iterable[str]) -> str | None:
        """Which of these baselines ends lowest; None if none of them is there."""
        there = {name: self.baselines[name].runs for name in names if name in self.baselines}
        return measures.lowest(there) if there else None

    def ratios(self, name: str, loss: Callable[[Run], float] = lambda run: run.final) -> list[float]:
        """ln(the contender's loss / the baseline's), seed by seed."""
        return measures.log_ratios(self.runs, self.baselines[name].runs, loss)

    @property
    def final(self) -> float:
        """Geometric mean over the seeds."""
        return measures.geometric_mean([run.final for run in self.runs])

    @property
    def diverged(self) -> int:
        """How many of the contender's runs."""
        return sum(run.diverged for run in self.runs)

    def adam_steps(self) -> float:
        """When tuned Adam gets where the contender ends; inf: not within its run."""
        return equivalent_step(self.baselines[TUNED].runs, self.final)


@dataclass(frozen=True)
class Summary:
    """Ratios over all networks: interquartile mean with its 95 % interval, the worst and where, wins."""

    iqm: float
    low: float
    high: float
    worst: float
    worst_on: str
    wins: int
    clear_wins: int
    networks: int


def summary(ratios: dict[str, list[float]]) -> Summary:
    """Of ratios by network and seed."""
    means = {name: measures.mean(values) for name, values in ratios.items()}
    worst = max(means, key=lambda name: means[name])
    low, high = measures.interval(ratios)
    return Summary(
        measures.interquartile_mean(list(means.values())),
        low, high, means[worst], worst, *measures.wins(ratios), len(ratios),
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A contender at one length of runs."""

    contender: str
    steps: int
    rows: dict[str, Row]
    missing: list[str] = field(default_factory=list)  # baselines that are not there for every network

    def diverged(self) -> dict[str, int]:
        """Diverged runs by network, where there are any."""
        return {name: row.diverged for name, row in self.rows.items() if row.diverged}

    def not_below_usual(self) -> list[str]:
        """The networks where it does not end below Adam at 1e-3."""
        return [name for name, row in self.rows.items() if not measures.mean(row.ratios(USUAL_NAME)) < 0]

    def against(self, names: Iterable[str]) -> Summary | None:
        """Final losses against the lowest of these baselines, network by network; None without them."""
        chosen = {name: row.best(names) for name, row in self.rows.items()}
        if not all(chosen.values()):
            return None
        return summary({name: row.ratios(chosen[name] or "") for name, row in self.rows.items()})

    def early(self, step: int) -> Summary | None:
        """Losses around ``step`` against tuned Adam's there; None where runs are too short."""
        if any(step not in run.early for row in self.rows.values() for run in row.runs):
            return None
        return summary({name: row.ratios(TUNED, lambda run: run.early[step]) for name, row in self.rows.items()})

    def adam_steps(self) -> dict[str, float]:
        """By network, see :meth:`Row.adam_steps`."""
        return {name: row.adam_steps() for name, row in self.rows.items()}

    def median_adam_steps(self) -> float:
        """Over networks; inf: more than half are beyond Adam's run."""
        return float(np.quantile(list(self.adam_steps().values()), 0.5, method="higher"))

    def to_json(self) -> dict[str, Any]:
        """All figures; what is infinite is null."""
        named: dict[str, Iterable[str]] = {"tuned Adam": [TUNED], "best Adam(W)": ADAMS, "NAG": NAGS, "Muon": MUONS}
        named["Adam 0.001"] = [USUAL_NAME]
        sums = {name: self.against(names) for name, names in named.items()}
        sums.update({f"tuned Adam, step {step}": self.early(step) for step in (100, 300)})
        return {
            "contender": self.contender,
            "steps": self.steps,
            "diverged": self.diverged(),
            "not below Adam 0.001": self.not_below_usual(),
            "ln ratios": {name: _plain(vars(each)) for name, each in sums.items() if each is not None},
            "median Adam-equivalent steps": _finite(self.median_adam_steps()),
            "missing baselines": self.missing,
            "networks": {name: _row_json(row) for name, row in self.rows.items()},
        }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "data": row.data,
        "version": row.network.version,
        "finals": [_finite(run.final) for run in row.runs],
        "starts": [_finite(run.start) for run in row.runs],
        "Adam-equivalent steps": _finite(row.adam_steps()),
        "baselines": {
            name: {
                "setting": each.label,
                "edge": each.edge,
                "finals": [_finite(run.final) for run in each.runs],
                "ln ratios": [_finite(value) for value in row.ratios(name)],
            }
            for name, each in row.baselines.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _finite(value) if isinstance(value, float) else value for key, value in values.items()}


def baselines_of(network: Network, steps: int, seeds: Iterable[int], baselines: Baselines) -> dict[str, Baseline]:
    """Those that are there; Adam, tuned and at 1e-3, must be.

    Raises:
        MissingRun: one of these two is not kept, and the keeper is frozen.
    """
    seeds = list(seeds)
    found = {USUAL_NAME: Baseline(USUAL.describe(), baselines.usual(network, steps, seeds))}
    for rule, schedule in STAGES:
        name = f"{rule} {schedule}"
        try:
            tuned = baselines.search(network, rule, schedule, steps)
            runs = [baselines.measure(network, tuned.setting, seed, steps) for seed in seeds]
        except MissingRun:
            if name == TUNED:
                raise
            continue
        found[name] = Baseline(tuned.setting.describe(), runs, tuned.edge)
    return found


def measure(
    contender: Contender,
    networks: Iterable[Network],
    steps: int,
    seeds: Iterable[int],
    baselines: Baselines,
    keeper: Keeper,
) -> Outcome:
    """Run ``contender`` on the networks and set it beside the baselines.

    Args:
        keeper: of the contender's runs; its data sets must be those of the baselines.

    Raises:
        MissingRun: Adam's baselines are not there; before anything is run.
    """
    networks, seeds = list(networks), list(seeds)
    beside = {network.name: baselines_of(network, steps, seeds, baselines) for network in networks}
    rows = {}
    for network in networks:
        runs = [
            keeper.run(network, seed, steps, contender.make, contender.identity, schedule=contender.schedule)
            for seed in seeds
        ]
        rows[network.name] = Row(network, keeper.folder.name(network.kind), runs, beside[network.name])
    names = [f"{rule} {schedule}" for rule, schedule in STAGES]
    return Outcome(contender.name, steps, rows, [n for n in names if any(n not in each for each in beside.values())])
