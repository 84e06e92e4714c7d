"""Run an experiment: train its candidates, keep the best on validation tasks, compare it on test tasks, report."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import checks
from ...meta import MetaTrainer, ProtocolWarning, evaluate, recipes
from ...meta.assignment import check_fits
from ...meta.log import TrainingLog
from ...networks import trained, writing
from ...networks.lstm import CoordinatewiseLSTM
from ...networks.record import attach, record_of
from ...networks.several import Networks, device_of
from ...problems import Problem
from .. import baselines
from .. import comparison as comparisons
from ..comparison import Comparison
from . import pictures, report
from .config import Candidate, Experiment, Setting, Stage

OPTIMIZER = "optimizer.safetensors"
_SELECTION_SEEDS = range(10_000, 10_020)  # validation tasks that no trainer has used to pick its best network
_TRAIN_SEEDS = 1 << 40  # far from what trainers draw; with the split "train"

Trial = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Outcome:
    """The results of an evaluation, by setting, and the files that were written."""

    comparisons: dict[str, Comparison]
    table: Path
    record: Path
    picture: Path | None


def run(
    experiment: Experiment,
    out: str | os.PathLike[str],
    *,
    optimizer: Networks | None = None,
    data: str | None = None,
    test_episodes: int | None = None,
    episodes: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Outcome:
    """Train (unless ``optimizer`` is given), evaluate, and write tables, numbers and the picture into ``out``.

    Everything is resumable: a run that was stopped goes on from its checkpoints when started again with the same
    ``out``. ``episodes`` and ``test_episodes`` replace the experiment's counts, ``data`` its data set. ``device`` is
    where networks and tasks live. A run that fails before it has anything to keep leaves no folders.

    Raises:
        ValueError, TypeError, FileNotFoundError: see the problems and :class:`l2l_fast.MetaTrainer`.
    """
    out = writing.checked_folder(out, "out")
    if optimizer is None:
        _check(experiment, out, data, episodes)
    else:
        _tests_of(experiment, optimizer, data, device)
    with writing.folder(out, "out"):
        if optimizer is None:
            optimizer = train(experiment, out, data=data, episodes=episodes, device=device, progress=progress)
        return evaluate_experiment(
            experiment, optimizer, out, data=data, test_episodes=test_episodes, device=device, progress=progress
        )


def train(
    experiment: Experiment,
    out: Path,
    *,
    data: str | None = None,
    episodes: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Networks:
    """Train all candidates (resuming those that are under way) and return the best on validation tasks, which is also
    saved as ``out/optimizer.safetensors``, with the record of its training."""
    scores: list[dict[str, Any]] = []
    best: tuple[float, Networks] | None = None
    for k, candidate in enumerate(experiment.candidates):
        net = _train_candidate(experiment, candidate, out / f"candidate{k}", data, episodes, device, progress)
        score, finals = _score(experiment, net, data)
        scores.append({**asdict(candidate), "validation": finals})
        _note(f"candidate {k} ({candidate}): final validation losses {finals}", progress)
        if best is None or score < best[0]:
            best = score, net
    assert best is not None  # an experiment has candidates
    net = best[1]
    record = record_of(net)
    attach(net, {**(record or {}), "experiment": experiment.name, "candidates": json.loads(json.dumps(scores))})
    trained.save(net, out / OPTIMIZER)
    return net


def _check(experiment: Experiment, out: Path, data: str | None, episodes: int | None) -> None:
    """Raise now what the last candidate, stage or setting would raise after hours."""
    for setting in experiment.settings:
        experiment.problem_of(setting, data)
    for k, candidate in enumerate(experiment.candidates):
        net = make_networks(experiment, candidate.seed)
        for run in _runs(experiment, candidate, out / f"candidate{k}", data, episodes):
            if not run.checkpoint.exists():
                TrainingLog(run.log).check_removable()
            run.trainer(net)


def make_networks(experiment: Experiment, seed: int) -> Networks:
    """The untrained network, or one for each kind of parameter; a function of ``seed``."""
    seed = checks.integer("seed", seed, *recipes.SEEDS)
    made = {}
    for k, (kind, options) in enumerate(experiment.networks.items()):
        net = nn.utils.skip_init(CoordinatewiseLSTM, **options)
        net.reset_parameters(torch.Generator().manual_seed(seed + 1000 * k))
        made[kind] = net
    return made[""] if set(made) == {""} else nn.ModuleDict(made)


def _train_candidate(
    experiment: Experiment,
    candidate: Candidate,
    folder: Path,
    data: str | None,
    episodes: int | None,
    device: torch.device | str,
    progress: bool,
) -> Networks:
    """The best network of a training run's last stage; every stage starts from the best of the one before."""
    net = make_networks(experiment, candidate.seed).to(device)
    history: list[dict[str, Any]] = []
    for run in _runs(experiment, candidate, folder, data, episodes):
        trainer = run.begun(net).fit(run.episodes, checkpoint=run.checkpoint, progress=progress)
        net = trainer.best_net()
        history.append(record_of(net) or {})
    attach(net, {**history[-1], "earlier": history[:-1]})
    return net


@dataclass(frozen=True)
class _Run:
    """A candidate's training, or one of its stages: what its trainer is made of, its folder, and how many episodes."""

    problem: Problem
    seed: int
    options: dict[str, Any]
    folder: Path
    episodes: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def trainer(self, net: Networks, **options: Any) -> MetaTrainer:
        return MetaTrainer(net, self.problem, seed=self.seed, **self.options, **options)

    def begun(self, net: Networks) -> MetaTrainer:
        """The trainer in its folder, as far as it got."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.exists():
            TrainingLog(self.log).remove()  # of a run that was stopped before its first checkpoint
        trainer = self.trainer(net, log=self.log)
        return trainer.resume(self.checkpoint) if self.checkpoint.exists() else trainer


def _runs(
    experiment: Experiment, candidate: Candidate, folder: Path, data: str | None, episodes: int | None
) -> Iterator[_Run]:
    """The candidate and its stages."""
    for k, part in enumerate((candidate, *candidate.stages)):
        planned = part.episodes if isinstance(part, Stage) else experiment.episodes
        count = planned if episodes is None else episodes if part is candidate else min(episodes, planned)
        seed = part.seed if isinstance(part, Stage) and part.seed is not None else candidate.seed + 1000 * k
        options = {"decay_episodes": count, **experiment.training, **part.training}
        problem = experiment.training_problem(part, data)
        yield _Run(problem, seed, options, folder / f"stage{k}" if k else folder, count)


def _score(experiment: Experiment, net: Networks, data: str | None) -> tuple[float, dict[str, float]]:
    finals = {}
    for name in experiment.selection:
        setting = experiment.setting(name)
        problem = experiment.problem_of(setting, data)
        losses = _evaluated(net, problem, _SELECTION_SEEDS, setting.horizon, "validation", device_of(net), quietly=True)
        finals[name] = losses[:, -1].mean().item()
    if not finals:
        return 0.0, finals
    score = sum(math.log(value) if value > 0 else -math.inf for value in finals.values()) / len(finals)
    return (score if not math.isnan(score) else math.inf), finals


def _evaluated(
    net: Networks,
    problem: Problem,
    seeds: range,
    horizon: int,
    split: str,
    device: torch.device | str,
    quietly: bool,
) -> Tensor:
    with warnings.catch_warnings():
        if quietly:
            warnings.simplefilter("ignore", ProtocolWarning)
        return evaluate(net, problem, seeds, horizon, split=split, device=device)


def evaluate_experiment(
    experiment: Experiment,
    net: Networks,
    out: Path,
    *,
    data: str | None = None,
    test_episodes: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Outcome:
    """Compare ``net`` with the tuned baselines in every setting.

    Writes ``results.md``, ``results.json``, with matplotlib ``curves.png`` (and ``pictures.png`` of neural art), and
    the optimizer with its scores in its record into ``out``. The curves of everything finished are kept in
    ``out/curves`` and not computed again for the very same optimizer, problem and counts, so that a stopped
    evaluation goes on where it was.
    """
    tests = _tests_of(experiment, net, data, device)
    with writing.folder(out, "out") as out, writing.folder(out / "curves") as cache:
        results: dict[str, Comparison] = {}
        for setting in experiment.settings:
            begin = time.monotonic()
            tasks = _tasks(experiment, setting, *tests[setting.name], test_episodes, cache, str(device))
            others = tasks.baselines(progress)
            losses = {comparisons.LEARNED: tasks.learned(net), **others.losses}
            results[setting.name] = replace(others, losses=losses)
            _note(f"{setting.name}: {time.monotonic() - begin:.0f} s", progress)
            _note(comparisons.table(results[setting.name]) + "\n", progress)
        attach(net, {**(record_of(net) or {}), "score": report.scores(results)})
        trained.save(net, out / OPTIMIZER)
        table = report.write_table(experiment, net, results, out / "results.md")
        record = out / "results.json"
        content = {name: result.to_json() for name, result in results.items()}
        writing.write_atomically(record, json.dumps(content, indent=None, separators=(",", ":")) + "\n")
        pictures.draw(experiment, results, net, out / "pictures.png")
        return Outcome(results, table, record, report.draw(experiment, results, out / "curves.png"))


def baseline_curves(
    experiment: Experiment, out: Path, *, data: str | None = None, test_episodes: int | None = None
) -> None:
    """Only the baselines of all settings, into ``out/curves``, where :func:`evaluate_experiment` will find them."""
    cache = out / "curves"
    cache.mkdir(parents=True, exist_ok=True)
    for setting in experiment.settings:
        problem = experiment.problem_of(setting, data)
        side_by_side = problem.sample(0, "test").side_by_side
        _tasks(experiment, setting, problem, side_by_side, test_episodes, cache).baselines(True)


def _tests_of(
    experiment: Experiment, net: Networks, data: str | None, device: torch.device | str
) -> dict[str, tuple[Problem, int]]:
    """The problem of every setting, and how many problems a task of it holds; raises now if ``net`` does not fit."""
    found = {}
    for setting in experiment.settings:
        problem = experiment.problem_of(setting, data)
        found[setting.name] = problem, check_fits(net, problem, device).side_by_side
    return found


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

    def seeds(self) -> range:
        first = _TRAIN_SEEDS if self.setting.split == "train" else 0
        return range(first, first + self.count)

    def baselines(self, progress: bool) -> Comparison:
        """The tuned baselines, a comparison without the learned optimizer."""
        key = report.fingerprint(None, self.problem, self.setting, self.count, self.tuning, self.device)
        losses, rates = {}, {}
        for name in self.setting.baselines:
            found = self._kept(name, key, partial(self._compared, name, progress))
            losses[name], rates[name] = found.losses[name], found.learning_rates[name]
        return Comparison(self.problem, losses, rates, self.side_by_side)

    def learned(self, net: Networks) -> Tensor:
        """The learning curves of ``net``."""
        key = report.fingerprint(net, self.problem, self.setting, self.count, 0, self.device)
        return self._kept("learned", key, partial(self._learned, net)).losses[comparisons.LEARNED]

    def _kept(self, name: str, key: str, compute: Callable[[], Comparison]) -> Comparison:
        """The curves of that name from the folder, if they are of this very ``key``; else computed, and kept there."""
        path = self.cache / f"{self.setting.name}.{name}.safetensors"
        found = report.read_curves(path, key, self.problem)
        if found is None:
            found = compute()
            report.write_curves(path, key, found)
        return found

    def _compared(self, name: str, progress: bool) -> Comparison:
        tuned = baselines.compare(
            self.problem,
            self.setting.horizon,
            self.seeds(),
            names=(name,),
            tuning_seeds=range(self.tuning),
            split=self.setting.split,
            device=self.device,
            on_trial=_show_trial if progress else None,
        )[name]
        return Comparison(self.problem, {name: tuned.losses}, {name: tuned.search.lr})

    def _learned(self, net: Networks) -> Comparison:
        setting = self.setting
        losses = _evaluated(
            net, self.problem, self.seeds(), setting.horizon, setting.split, self.device, quietly=setting.transfer
        )
        return Comparison(self.problem, {comparisons.LEARNED: losses}, {})


def _tasks(
    experiment: Experiment,
    setting: Setting,
    problem: Problem,
    side_by_side: int,
    test_episodes: int | None,
    cache: Path,
    device: str = "cpu",
) -> _Tasks:
    count = experiment.tests(setting) if test_episodes is None else test_episodes
    return _Tasks(problem, setting, count, experiment.tuning(setting), cache, side_by_side, device)


def _show_trial(name: str, lr: float, loss: float) -> None:
    print(f"tuning {name}: lr {lr:.3g}, final validation loss {loss:.4g}", file=sys.stderr)


def _note(text: str, progress: bool) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)
