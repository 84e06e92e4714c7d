"""The command ``train``: a run in a folder, which can be stopped at any moment, resumed, and extended."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..evaluation import comparison
from ..meta import MetaTrainer, TensorBoardLog, estimators, recipes
from ..meta import checkpoint as checkpoints
from ..meta.log import TrainingLog
from ..meta.settings import problem_of
from ..networks import trained, writing
from ..networks.several import Networks, members
from ..problems import Problem
from ..problems.scaled import Scaled
from .console import PROGRAM, UserError, command_line, problem_options, say, user_errors
from .console import network as started
from .console import problem as named_problem
from .options import Commands, add_command
from .train_options import ESTIMATOR, NETWORK, PLACES, add_options, dashed, given

_LOG = "log.jsonl"


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "train",
        train,
        "meta-train an optimizer; can be killed and resumed at any time",
        "--problem mnist --out runs/mnist --tensorboard",
        "--out runs/mnist --resume --episodes 900",
        "--problem quadratic --gac-cells 4 --estimator pes --pairs 8 --out runs/pes",
        usage="(--problem NAME | --resume) --out DIR [option ...]",
    )
    add_options(parser)


def train(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status (0; 130: interrupted; 143: terminated)."""
    with user_errors():
        out = writing.checked_folder(arguments.out, "--out")
    checkpoint, optimizer = out / "checkpoint.safetensors", out / "optimizer.safetensors"
    # Everything is checked before anything is created.
    if arguments.resume:
        trainer, episodes = _resumed(arguments, checkpoint, optimizer)
    else:
        if os.path.lexists(checkpoint):
            raise UserError(f"--out: {out} already holds a run; --resume continues it, or name another folder")
        if os.path.lexists(optimizer):
            raise UserError(
                f"--out: {out} holds {optimizer.name} of a run whose checkpoint is gone: it cannot be resumed, and a "
                "new run would take its place; move the file away or name another folder"
            )
        trainer, episodes = _new(arguments)
        with user_errors("--out: "):
            leftover = TrainingLog(out / _LOG)
            leftover.check_removable()
    with user_errors(), writing.folder(arguments.out, "--out"):
        for path in (checkpoint, optimizer):
            writing.check_writable(path, "--out")
        if not arguments.resume and leftover.remove():
            print(f"{leftover.path}: of a run that was stopped before it saved anything; begun anew", file=sys.stderr)
        return _run(trainer, episodes, checkpoint, optimizer, arguments)


def _log(arguments: argparse.Namespace) -> TrainingLog:
    path = Path(arguments.out, _LOG)
    if arguments.tensorboard is None:
        return TrainingLog(path)
    return TensorBoardLog(path, arguments.tensorboard or path.with_name("tensorboard"))


def _run(trainer: MetaTrainer, episodes: int, checkpoint: Path, optimizer: Path, arguments: argparse.Namespace) -> int:
    say(f"{trainer.problem!r}\ndata: {comparison.data_set(trainer.problem)}\n{trainer.net!r}")
    if trainer.counters.stopped:
        say(f"nothing left to train: the run stopped early at episode {trainer.episode}, by --patience")
    elif trainer.episode == episodes:
        say(f"nothing left to train: the run has its {episodes} episodes; a larger --episodes extends it")
    else:
        say(f"episodes {trainer.episode}..{episodes}, into {optimizer.parent}")
        with _termination() as received:
            try:
                trainer.fit(episodes, checkpoint=checkpoint, progress=not arguments.quiet)
            except KeyboardInterrupt:
                return _interrupted(arguments.out, checkpoint, bool(received))
    trained.save(trainer.best_net(), optimizer)
    _report(trainer)
    say(f"trained optimizer: {optimizer}")
    if trainer.problem.name == "zoo":
        say(f"measure it with:   {command_line(PROGRAM.split(), 'suite', str(optimizer))}")
    else:
        say(f"compare it with:   {_compare_command(optimizer, trainer, arguments)}")
    return 0


def _new(arguments: argparse.Namespace) -> tuple[MetaTrainer, int]:
    if arguments.problem is None:
        raise UserError("--problem is needed: only --resume takes it from a checkpoint")
    problem = _rescaled(named_problem(arguments), arguments)
    recipe = recipes.get(problem)
    episodes = recipe.episodes if arguments.episodes is None else arguments.episodes
    options = given(arguments)
    seed = options.pop("seed", 0)
    network = {name: options.pop(name) for name in NETWORK if name in options}
    if arguments.start is not None and network:
        raise UserError(f"{dashed(next(iter(network)))}: with --start the network is the one there, in every respect")
    with user_errors():
        options.update(_estimator(options, recipe))
        net: Networks
        if arguments.start is None:
            net = recipe.make_network(seed, **network).to(arguments.device)
        else:
            net = started(arguments.start, arguments.device, option="--start")
        _check_scales(problem, net)
        return recipe.make_trainer(net, problem, episodes, seed=seed, log=_log(arguments), **options), episodes


def _estimator(options: dict[str, Any], recipe: recipes.Recipe) -> dict[str, Any]:
    """The trainer's argument ``estimator``, if options say something of it; they are taken out."""
    own = {name: options.pop(name) for name in ESTIMATOR if name in options}
    name = options.pop("estimator", None)
    if name is None and not own:
        return {}
    if name is None:
        usual = recipe.trainer.get("estimator", "bptt")
        name = usual if isinstance(usual, str) else usual.config()["estimator"]
    return {"estimator": estimators.make(name, **own)}


def _rescaled(problem: Problem, arguments: argparse.Namespace) -> Problem:
    if arguments.scale_tensors is None and arguments.scale_loss is None:
        return problem
    with user_errors("--scale-tensors, --scale-loss: "):
        return Scaled(problem, arguments.scale_tensors or 0.0, tuple(arguments.scale_loss or (0.0, 0.0)))


def _check_scales(problem: Problem, net: Networks) -> None:
    together = any(member.communicates for member in members(net).values())
    if together and isinstance(problem, Scaled) and problem.loss != (0.0, 0.0):
        raise UserError("--scale-loss: expected a network whose coordinates do not communicate (--gac-cells, --memory)")


def _resumed(arguments: argparse.Namespace, checkpoint: Path, optimizer: Path) -> tuple[MetaTrainer, int]:
    if arguments.start is not None:
        raise UserError("--start: a run that is resumed goes on from its checkpoint")
    if not checkpoint.is_file():
        if os.path.lexists(optimizer):
            raise UserError(
                f"--resume: there is no checkpoint in {checkpoint.parent}, only {optimizer.name}, which cannot be "
                "trained further; move it away to begin a run there, or name another folder"
            )
        raise UserError(f"--resume: there is no checkpoint in {checkpoint.parent}; without --resume a run begins there")
    with user_errors("--resume: "):
        saved = checkpoints.read(checkpoint)
        problem = _same_problem(arguments, saved.settings)
        different = []
        for name, value in given(arguments).items():
            found = _setting(saved.settings, name)
            if found != value:
                place = ".".join(PLACES[name])
                different.append(f"{dashed(name)} {value}: the run has {'none' if found is None else found} ({place})")
        if different:
            raise ValueError(f"{str(checkpoint)!r} belongs to another run:\n  " + "\n  ".join(different))
        trainer = MetaTrainer.from_checkpoint(checkpoint, problem, log=_log(arguments), device=arguments.device)
    planned = trainer.counters.planned or trainer.decay_episodes or recipes.get(problem).episodes
    episodes = max(planned, trainer.episode) if arguments.episodes is None else arguments.episodes
    if episodes < trainer.episode:
        raise UserError(f"--episodes {episodes}: the run has {trainer.episode} already; the number is of all episodes")
    return trainer, episodes


def _setting(settings: Any, name: str) -> Any:
    """What a run's settings say of an option; None if nothing (a network without memory has no read heads)."""
    for key in PLACES[name]:
        settings = settings.get(key)
    return "bptt" if name == "estimator" and settings is None else settings


def _same_problem(arguments: argparse.Namespace, settings: dict[str, Any]) -> Problem:
    config = settings["problem"]
    if arguments.problem not in (None, config["name"]):
        raise ValueError(f"--problem {arguments.problem}: the run is on {config['name']}")
    problem = problem_of(settings, **problem_options(arguments, config["name"]))
    if arguments.scale_tensors is not None or arguments.scale_loss is not None:
        problem = _rescaled(problem.problem if isinstance(problem, Scaled) else problem, arguments)
    different = checkpoints.differences(config, json.loads(json.dumps(problem.config())), "problem")
    if different:
        raise ValueError("--option, --data: not those of the run:\n  " + "\n  ".join(different))
    return problem


@contextmanager
def _termination() -> Iterator[list[int]]:
    """Inside, SIGTERM is an interrupt like Ctrl-C; the list then holds the signal. A second one ends the process as it
    always would."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGTERM, before)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(out: str, checkpoint: Path, terminated: bool) -> int:
    try:
        saved = f"{checkpoints.read(checkpoint).counters.episode} episodes are saved"
        following = command_line(PROGRAM.split(), "train", ("--out", out), "--resume")
        print(f"\ninterrupted; {saved}; continue with\n  {following}", file=sys.stderr)
    except (FileNotFoundError, ValueError):
        print("\ninterrupted; nothing was saved yet", file=sys.stderr)
    return 128 + signal.SIGTERM if terminated else 130


def _report(trainer: MetaTrainer) -> None:
    counters = trainer.counters
    if counters.best_loss is not None:
        say(f"best final validation loss {counters.best_loss:.4g}, at episode {counters.best_episode}")
    elif 0 < trainer.validation.every <= trainer.episode:
        say("no validation ended with a finite loss: the network is the last one, not the best")
    if counters.stopped:
        say(f"stopped early at episode {trainer.episode}: no better validation for {trainer.patience} times")
    if counters.skipped_updates:
        say(f"{counters.skipped_updates} meta-updates were left out: their gradient was not finite")


def _compare_command(optimizer: Path, trainer: MetaTrainer, arguments: argparse.Namespace) -> str:
    options = arguments.option or []
    if arguments.resume:
        config = trainer.problem.config()
        options = [(key, value) for key, value in config.items() if key not in ("name", "data", "training_scales")]
    data = arguments.data or (trainer.problem.config().get("data") if arguments.resume else None)
    parts: list[str | tuple[str, str]] = ["compare", ("--optimizer", str(optimizer))]
    parts.append(("--problem", trainer.problem.config()["name"]))
    for key, value in options:
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        parts.append(("--option", f"{key}={text}"))
    if data is not None:
        parts.append(("--data", data))
    return command_line(PROGRAM.split(), *parts)
