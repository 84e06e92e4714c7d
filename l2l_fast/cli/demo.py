"""The command ``demo``, the whole in a few minutes: meta-train on quadratics and on real digits, compare with tuned
baselines, plot."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..evaluation import comparison as comparisons
from ..evaluation import suite
from ..evaluation.baselines import RULES
from ..evaluation.comparison import Comparison
from ..meta import recipes
from ..meta.log import TrainingLog
from ..networks import trained, writing
from ..networks.files import load
from ..networks.writing import write_atomically
from ..problems import MNIST, Problem, Quadratic
from ..problems.data import EMBEDDED
from .console import command_line, draw, user_errors
from .options import Commands, add_command, add_device, add_quiet

# A minute's worth; `compare` and `experiment` search six optimizers, all schedules, on ten tasks.
_BASELINES = ("momentum", "nag", "rmsprop", "adam")
GENERAL = "general"
DROPPED_INTO = ("mlp-relu", "conv")
_SEARCH = {"schedules": ("constant", "cosine"), "points_per_decade": 8, "sweep_tasks": 1}


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "meta-train on quadratics and on real digits, compare with tuned baselines, plot"
    parser = add_command(commands, "demo", _run, text, "", "--quick --out /tmp/demo")
    parser.add_argument("--out", default="demo_output", metavar="DIR", help="folder for results (default: %(default)s)")
    parser.add_argument(
        "--data", metavar="DATA", help="MNIST: a folder or mnist-60k (default: the 10,000 embedded images)"
    )
    parser.add_argument("--quick", action="store_true", help="a few episodes, only to see that everything runs")
    add_device(parser)
    add_quiet(parser)


def _run(arguments: argparse.Namespace) -> int:
    with user_errors():
        halves = tasks(arguments.data, quick=arguments.quick)
        with writing.folder(arguments.out, "--out") as out:
            general = () if arguments.quick else DROPPED_INTO
            return run(halves, out, progress=not arguments.quiet, general=general, device=arguments.device)


@dataclass(frozen=True)
class DemoTask:
    """One half of the demo. Its counts are fixed beforehand: the results do not depend on the machine's speed."""

    title: str
    problem: Problem
    episodes: int
    test_episodes: int
    tuning_episodes: int
    horizon: int = 100
    claims: bool = True  # enough episodes to end below every baseline


def tasks(data: str | os.PathLike[str] | None = None, quick: bool = False) -> list[DemoTask]:
    """The two halves; ``data`` as for :class:`l2l_fast.problems.MNIST`, the embedded images by default.

    Raises:
        ValueError, TypeError, FileNotFoundError: see :class:`l2l_fast.problems.MNIST`.
    """
    quadratic, mnist = Quadratic(), MNIST(data=EMBEDDED if data is None else data)
    titles = (
        "10-dimensional quadratics ||W theta - y||^2, entries of W and y uniform in [0, 1)",
        "MNIST, 784-20-10 perceptron, sigmoid, minibatches of 128",
    )
    counts = (
        ((2, 3, 1, 10), (2, 3, 1, 10))
        if quick
        else (
            (recipes.get(quadratic).episodes, 30, 5, 100),
            (recipes.get(mnist).episodes, 30, 5, 100),
        )
    )
    return [
        DemoTask(title, problem, *count, claims=not quick)
        for title, problem, count in zip(titles, (quadratic, mnist), counts)
    ]


def run(
    halves: list[DemoTask],
    out: Path,
    progress: bool = True,
    general: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
) -> int:
    """Run the demo into the folder ``out``.

    Args:
        general: networks of the evaluation suite that the optimizer "general" trains at the end, on the CPU.
        device: where everything else is trained and compared.

    Raises:
        ValueError: a file of the name of a log is no run's log; nothing has been done then.

    Returns:
        1 if the learned optimizer does not end below every baseline on a problem where the demo claims so; else 0. A
        quick demo claims nothing: it shows that everything runs.
    """
    for half in halves:
        TrainingLog(_log(half, out)).check_removable(finished=True)
    begin = time.monotonic()
    results: list[Comparison] = []
    verdicts: list[tuple[bool, str]] = []
    suite.choose(general or None)  # a wrong name now, not after minutes
    for half in halves:
        optimizer = _train(half, out, progress, device)
        results.append(_compare(half, optimizer, device))
        verdicts.append(comparisons.verdict(results[-1]))
    print(flush=True)
    for result, (_, sentence) in zip(results, verdicts):
        print(comparisons.table(result) + "\n" + sentence + "\n", flush=True)
    outcome = _drop_in(general, progress) if general else None
    _write_results(results, outcome, out, time.monotonic() - begin)
    draw(
        results,
        out / "learning_curves.png",
        titles=[half.title for half in halves],
        heading="A learned optimizer against hand-tuned ones, on problems it has never seen",
    )
    seconds = time.monotonic() - begin
    print(f"results: {out / 'results.json'}\ntime: {seconds:.0f} s with {torch.get_num_threads()} threads")
    for half in halves:
        print(f"trained optimizer ({half.problem.name}): {_file(half, out)}")
    print("next, the same optimizer on a wider network:\n  " + _next_command(halves[-1], out), flush=True)
    failed = [half.problem.name for half, (below, _) in zip(halves, verdicts) if half.claims and not below]
    unclaimed = [half.problem.name for half in halves if not half.claims]
    if unclaimed:
        print(
            f"not shown: that the learned optimizer beats the baselines on {' and '.join(unclaimed)} (a quick demo "
            "trains too little for that); everything ran"
        )
    if failed:
        print(f"NOT reached: the learned optimizer does not end below every baseline on {' and '.join(failed)}")
    return 1 if failed else 0


def _train(half: DemoTask, out: Path, progress: bool, device: torch.device | str) -> Path:
    recipe = recipes.get(half.problem)
    log = _log(half, out)
    TrainingLog(log).remove(finished=True)
    print(f"== meta-training on: {half.title} ({half.episodes} episodes)", file=sys.stderr, flush=True)
    net = recipe.make_network().to(device)
    trainer = recipe.make_trainer(net, half.problem, half.episodes, log=log)
    trainer.fit(half.episodes, progress=progress)
    path = _file(half, out)
    trained.save(trainer.best_net(), path)
    return path


def _compare(half: DemoTask, optimizer: Path, device: torch.device | str) -> Comparison:
    labels = ", ".join(RULES[name].label for name in _BASELINES)
    print(f"== tuning {labels}; comparing on fresh test tasks", file=sys.stderr, flush=True)
    # From the file, so that what is shown is what is left behind.
    return comparisons.compare(
        load(optimizer, device),
        half.problem,
        half.horizon,
        half.test_episodes,
        tuning_episodes=half.tuning_episodes,
        names=_BASELINES,
        search_options=_SEARCH,
        device=device,
    )


def _drop_in(networks: tuple[str, ...], progress: bool) -> suite.Outcome:
    """What needs no meta-training: the package's general optimizer on networks that it has never seen, as they are."""
    print(f"== the optimizer {GENERAL!r}, as it comes, on networks that it has never seen", file=sys.stderr, flush=True)

    def told(key: Any, run: Any) -> None:
        if progress:
            print(f"   {key.network}, seed {key.seed}: {run.final:.4g}", file=sys.stderr, flush=True)

    outcome = suite.evaluate(GENERAL, networks=networks, on_run=told)
    print(
        f"{GENERAL!r} dropped in on networks with PyTorch's default initialisation, {outcome.steps:,} steps on MNIST "
        "digits, mean training loss of the last 5 % of the steps, geometric mean of three seeds:\n"
    )
    print("\n".join(suite.network_table(outcome)) + "\n", flush=True)
    return outcome


def _write_results(results: list[Comparison], outcome: suite.Outcome | None, out: Path, seconds: float) -> None:
    record = {
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "comparisons": [result.to_json() for result in results],
        GENERAL: None if outcome is None else outcome.to_json(),
    }
    write_atomically(out / "results.json", json.dumps(record, indent=1) + "\n")


def _file(half: DemoTask, out: Path) -> Path:
    return out / f"{half.problem.name}.safetensors"


def _log(half: DemoTask, out: Path) -> Path:
    return out / f"{half.problem.name}.jsonl"


def _next_command(half: DemoTask, out: Path) -> str:
    try:
        python = os.path.relpath(sys.executable)
    except ValueError:  # another drive
        python = sys.executable
    if python.startswith(".."):
        python = sys.executable
    return command_line(
        [python, "-m", "l2l_fast"],
        "compare",
        ("--optimizer", str(_file(half, out))),
        ("--problem", half.problem.name),
        ("--option", "hidden=[40]"),
        ("--plot", str(out / "wider.png")),
    )
