"""Run an experiment: train its candidates, keep the best on validation tasks, measure it, report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...kernels import checks
from ...meta import MetaTrainer, recipes
from ...meta.log import TrainingLog
from ...meta.progress import note
from ...networks import trained, writing
from ...networks.lstm import CoordinatewiseLSTM
from ...networks.record import attach, record_of
from ...networks.several import Networks, device_of
from ...problems import Problem
from .config import Candidate, Experiment, Stage
from .measuring import OPTIMIZER, Outcome, curves_of, evaluate_experiment, tests_of

_SELECTION_SEEDS = range(10_000, 10_020)  # validation tasks that no trainer has used to pick its best network


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
        tests_of(experiment, optimizer, data, device)
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
        note(f"candidate {k} ({candidate}): final validation losses {finals}", progress)
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
        for tuning in (False, True):
            experiment.problem_of(setting, data, tuning)
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
    parts: list[Candidate | Stage] = [candidate, *candidate.stages]
    for k, part in enumerate(parts):
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
        losses = curves_of(net, problem, _SELECTION_SEEDS, setting.horizon, "validation", device_of(net), quietly=True)
        finals[name] = losses[:, -1].mean().item()
    if not finals:
        return 0.0, finals
    score = sum(math.log(value) if value > 0 else -math.inf for value in finals.values()) / len(finals)
    return (score if not math.isnan(score) else math.inf), finals
