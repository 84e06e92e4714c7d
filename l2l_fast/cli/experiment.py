"""The command ``experiment``: one of the paper's experiments, from training to tables and figures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..evaluation import experiments
from ..networks import pretrained
from .console import UserError, network, say, user_errors
from .options import Commands, add_command, add_data, add_device, add_quiet, count


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "one of the paper's experiments: train, compare, tabulate, plot"
    parser = add_command(commands, "experiment", _run, text, "--list", "mnist --evaluate-only", "mnist --device cuda")
    parser.add_argument("name", nargs="?", metavar="NAME", help="its name, or a .json file like those in the package")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--json", action="store_true", help="with --list: as JSON")
    parser.add_argument("--out", metavar="DIR", help="folder for checkpoints and results (runs/experiments/NAME)")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="no training: evaluate the pretrained optimizer (or --optimizer)"
    )
    parser.add_argument("--optimizer", metavar="FILE", help="evaluate this one; implies --evaluate-only")
    add_data(parser)
    add_device(parser)
    parser.add_argument("--episodes", type=count, metavar="N", help="training episodes of every candidate")
    parser.add_argument("--test-episodes", type=count, metavar="N", help="fresh test tasks per setting")
    add_quiet(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json and not arguments.list:
        raise UserError("--json: is of --list; a run writes results.json into --out")
    if arguments.list or arguments.name is None:
        _list(arguments.json)
        if not arguments.list:
            raise UserError("experiment: give one of these names")
        return 0
    with user_errors():
        experiment = experiments.load(arguments.name)
        optimizer = None
        if arguments.optimizer is not None:
            optimizer = network(arguments.optimizer, arguments.device)
        elif arguments.evaluate_only:
            if experiment.pretrained not in pretrained.names():
                raise UserError(f"--evaluate-only: {experiment.name} has no pretrained optimizer; give --optimizer")
            optimizer = pretrained.load_pretrained(experiment.pretrained, arguments.device)
        outcome = experiments.run(
            experiment,
            Path("runs", "experiments", experiment.name) if arguments.out is None else arguments.out,
            optimizer=optimizer,
            data=arguments.data,
            test_episodes=arguments.test_episodes,
            episodes=arguments.episodes,
            device=arguments.device,
            progress=not arguments.quiet,
        )
    say(outcome.table.read_text(encoding="utf-8"))
    say("\n".join(f"written: {path}" for path in (outcome.table, outcome.record, outcome.picture) if path is not None))
    if outcome.picture is None:
        print("no picture: plots need matplotlib", file=sys.stderr)
    return 0


def _list(as_json: bool) -> None:
    found = {name: experiments.load(name) for name in experiments.available()}
    if as_json:
        say(json.dumps({name: {"about": each.about, "source": each.source} for name, each in found.items()}, indent=1))
        return
    for name, experiment in found.items():
        say(f"{name:20} {experiment.about}\n{'':20} {experiment.source}")
