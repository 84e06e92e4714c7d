"""Measure trained optimizers in every setting of an experiment, beside tuned baselines."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...meta import ProtocolWarning, evaluate
from ...meta.assignment import check_fits
from ...meta.progress import note
from ...networks import trained, writing
from ...networks.record import attach, record_of
from ...networks.several import Networks
from ...problems import Problem, Task, sealed
from .. import baselines
from .. import comparison as comparisons
from ..baselines import Search
from ..comparison import LEARNED, Comparison
from . import pictures, report
from .config import Experiment, Setting

OPTIMIZER = "optimizer.safetensors"
TRAIN_SEEDS = 1 << 40  # far from what trainers draw; with the split "train"


@dataclass(frozen=True)
class Outcome:
    """The results of an evaluation, by setting, and the files that were written."""

    comparisons: dict[str, Comparison]
    table: Path
    record: Path
    picture: Path | None


def evaluate_experiment(
    experiment: Experiment,
    net: Networks,
    out: Path,
    *,
    others: Mapping[str, Networks] | None = None,
    data: str | None = None,
    test_episodes: int | None = None,
    release: str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Outcome:
    """Compare ``net`` with the tuned baselines in every setting.

    Writes ``results.md``, ``results.json``, with matplotlib ``curves.png`` (and ``pictures.png`` of neural art), and
    the optimizer with its scores in its record into ``out``. The curves of everything finished are kept in
    ``out/curves`` and not computed again for the very same optimizer, problem and counts, so that a stopped
    evaluation goes on where it was; so are the trials of the baselines' searches.

    Args:
        others: networks trained alike from other seeds, by name: for intervals over trained networks.
        release: on the sealed tasks of that release; only within :func:`l2l_fast.problems.sealed.opened`.
    """
    tests = tests_of(experiment, net, data, device)
    with writing.folder(out, "out") as out, writing.folder(out / "curves") as cache:
        results: dict[str, Comparison] = {}
        for setting in experiment.settings:
            begin = time.monotonic()
            tasks = _tasks(experiment, setting, *tests[setting.name], test_episodes, cache, data, str(device), release)
            results[setting.name] = tasks.compared(net, others or {}, progress)
            note(f"{setting.name}: {time.monotonic() - begin:.0f} s", progress)
            note(comparisons.table(results[setting.name]) + "\n", progress)
        attach(net, {**(record_of(net) or {}), "score": report.scores(results)})
        trained.save(net, out / OPTIMIZER)
        table = report.write_table(experiment, net, results, out / "results.md", release)
        record = out / "results.json"
        content = {name: result.to_json() for name, result in results.items()}
        writing.write_atomically(record, json.dumps(content, indent=None, separators=(",", ":")) + "\n")
        pictures.draw(experiment, results, net, out / "pictures.png")
        return Outcome(results, table, record, report.draw(experiment, results, out / "curves.png"))


def baseline_curves(
    experiment: Experiment,
    out: Path,
    *,
    data: str | None = None,
    test_episodes: int | None = None,
    release: str | None = None,
) -> None:
    """Only the baselines of all settings, into ``out/curves``, where :func:`evaluate_experiment` will find them; with a
    ``release`` their searches alone, since its tasks are not to be looked at."""
    cache = out / "curves"
    cache.mkdir(parents=True, exist_ok=True)
    for setting in experiment.settings:
        problem = experiment.problem_of(setting, data)
        side_by_side = problem.sample(0, "test").side_by_side
        tasks = _tasks(experiment, setting, problem, side_by_side, test_episodes, cache, data)
        for name in setting.baselines:
            found = tasks.searched(name, True)
            best = f"{found.setup.describe()}, final {found.final:.4g} ({found.trials} trials)"
            note(f"{setting.name}: {name}: {best}", True)
        if release is None:
            tasks.baselines(True)


def tests_of(
    experiment: Experiment, net: Networks, data: str | None, device: torch.device | str
) -> dict[str, tuple[Problem, int]]:
    """The problem of every setting, and how many problems a task of it holds; raises now if ``net`` does not fit."""
    found = {}
    for setting in experiment.settings:
        problem = experiment.problem_of(setting, data)
        experiment.problem_of(setting, data, tuning=True)
        found[setting.name] = problem, check_fits(net, problem, device).side_by_side
    return found


def curves_of(
    net: Networks,
    problem: Problem,
    seeds: range,
    horizon: int,
    split: str,
    device: torch.device | str,
    quietly: bool,
    on_end: Callable[[Task], None] | None = None,
) -> Tensor:
    """:func:`l2l_fast.meta.evaluate`; ``quietly``: without a warning where the network was trained for another task."""
    with warnings.catch_warnings():
        if quietly:
            warnings.simplefilter("ignore", ProtocolWarning)
        return evaluate(net, problem, seeds, horizon, split=split, device=device, on_end=on_end)


@dataclass
class _Endings:
    """What is to be known of tasks at their last theta, besides the loss."""

    by_problem: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def __call__(self, task: Task) -> None:
        losses, error = task.losses_by_problem(), task.held_out_error()
        if losses is not None:
            self.by_problem.append(losses.double().cpu())
        if error is not None:
            self.errors.append(error)

    def comparison(self, problem: Problem, name: str, losses: Tensor) -> Comparison:
        """With +inf for the tasks that diverged: they had no end."""
        finished = losses[:, -1].isfinite()
        by_problem, errors = {}, {}
        if self.by_problem:
            table = torch.full((len(losses), len(self.by_problem[0])), math.inf, dtype=torch.float64)
            table[finished] = torch.stack(self.by_problem)
            by_problem[name] = table
        if self.errors:
            row = torch.full((len(losses),), math.inf, dtype=torch.float64)
            row[finished] = torch.tensor(self.errors, dtype=torch.float64)
            errors[name] = row
        return Comparison(problem, {name: losses}, {}, by_problem=by_problem, errors=errors)


@dataclass(frozen=True)
class _Tasks:
    """The tasks of one setting, and the folder that keeps what was computed on them."""

    problem: Problem
    setting: Setting
    count: int
    tuning: int
    cache: Path
    side_by_side: int = 1
    device: str = "cpu"
    release: str | None = None
    tuned_on: Problem | None = None

    def seeds(self) -> range:
        if self.release is not None:
            return sealed.seeds(self.count, self.release)
        first = TRAIN_SEEDS if self.setting.split == "train" else 0
        return range(first, first + self.count)

    def compared(self, net: Networks, others: Mapping[str, Networks], progress: bool) -> Comparison:
        """Everybody on these tasks."""
        tuned, learned = self.baselines(progress), self.learned(net, LEARNED)
        return replace(
            tuned,
            losses={**learned.losses, **tuned.losses},
            by_problem={**learned.by_problem, **tuned.by_problem},
            errors={**learned.errors, **tuned.errors},
            others={name: self.learned(other, f"learned-{name}").losses[LEARNED] for name, other in others.items()},
        )

    def baselines(self, progress: bool) -> Comparison:
        """The tuned baselines, a comparison without the learned optimizer."""
        key = self._key(None)
        every = [self._kept(name, key, partial(self._run, name, progress)) for name in self.setting.baselines]
        joined = {
            part: {name: value for each in every for name, value in getattr(each, part).items()}
            for part in ("losses", "learning_rates", "setups", "by_problem", "errors")
        }
        return Comparison(self.problem, problems_per_task=self.side_by_side, **joined)

    def learned(self, net: Networks, name: str) -> Comparison:
        """The learning curves of ``net``, kept as ``name``."""
        return self._kept(name, self._key(net), partial(self._learned, net))

    def searched(self, name: str, progress: bool) -> Search:
        """The tuned setting of a baseline. Settings of the same problem and horizon share their searches' trials."""
        problem = self.problem if self.tuned_on is None else self.tuned_on
        about = json.dumps([problem.config(), self.setting.horizon, self.tuning, self.device])
        folder = self.cache / f"trials-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
        show = _ShowTrials(self.setting.name, name) if progress else None
        return baselines.search(
            problem,
            name,
            self.setting.horizon,
            seeds=range(self.tuning),
            device=self.device,
            cache=folder / f"{name}.jsonl",
            on_trial=show,
            **self.setting.search,
        )

    def _key(self, net: Networks | None) -> str:
        tuning = 0 if net is not None else self.tuning
        return report.fingerprint(net, self.problem, self.setting, self.count, tuning, self.device, self.release)

    def _kept(self, name: str, key: str, compute: Callable[[], Comparison]) -> Comparison:
        """The curves of that name from the folder, if they are of this very ``key``; else computed, and kept there."""
        path = self.cache / f"{self.setting.name}.{name}.safetensors"
        found = report.read_curves(path, key, self.problem)
        if found is None:
            found = compute()
            report.write_curves(path, key, found)
        return found

    def _run(self, name: str, progress: bool) -> Comparison:
        found, endings = self.searched(name, progress), _Endings()
        losses = baselines.run(
            self.problem,
            name,
            found.lr,
            self.seeds(),
            self.setting.horizon,
            options=found.options,
            schedule=found.schedule,
            split=self.setting.split,
            device=self.device,
            on_end=endings,
        )
        tuned = endings.comparison(self.problem, name, losses)
        return replace(tuned, learning_rates={name: found.lr}, setups={name: found.setup})

    def _learned(self, net: Networks) -> Comparison:
        setting, endings = self.setting, _Endings()
        arguments = (net, self.problem, self.seeds(), setting.horizon, setting.split, self.device, setting.transfer)
        return endings.comparison(self.problem, LEARNED, curves_of(*arguments, endings))


def _tasks(
    experiment: Experiment,
    setting: Setting,
    problem: Problem,
    side_by_side: int,
    test_episodes: int | None,
    cache: Path,
    data: str | None,
    device: str = "cpu",
    release: str | None = None,
) -> _Tasks:
    count = experiment.tests(setting) if test_episodes is None else test_episodes
    tuned_on = experiment.problem_of(setting, data, tuning=True)
    tuning = experiment.tuning(setting)
    return _Tasks(problem, setting, count, tuning, cache, side_by_side, device, release, tuned_on)


class _ShowTrials:
    """Progress of a search: every twentieth trial, and the best so far."""

    def __init__(self, setting: str, name: str) -> None:
        self.about, self.count, self.best = f"{setting}: tuning {name}", 0, (math.inf, math.nan)

    def __call__(self, lr: float, loss: float) -> None:
        self.count, self.best = self.count + 1, min(self.best, (loss, lr))
        if self.count % 20 == 0:
            best, rate = self.best
            print(f"{self.about}: {self.count} trials, best so far {best:.4g} at lr {rate:.3g}", file=sys.stderr)
