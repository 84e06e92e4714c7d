"""The command ``compare``: a trained optimizer beside hand-written ones that are tuned for the problem."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..evaluation import baselines
from ..evaluation import comparison as comparisons
from .console import STDOUT, check_outputs, draw, network, problem, say, user_errors, write_json
from .options import Commands, add_command, add_protocol, add_quiet, count


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "a trained optimizer against hand-written ones at their best"
    example = "--optimizer mnist-mlp --problem mnist --baselines adam nag --plot curves.png"
    parser = add_command(commands, "compare", _run, text, example)
    add_protocol(parser)
    parser.add_argument(
        "--tuning-episodes", type=count, default=10, metavar="N", help="validation tasks to tune on (%(default)s)"
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        default=baselines.NAMES,
        choices=baselines.NAMES,
        metavar="NAME",
        help=f"some of {', '.join(baselines.NAMES)} (default: all)",
    )
    parser.add_argument("--cache", metavar="DIR", help="keep the searches' trials there: the same command goes on")
    parser.add_argument("--plot", default="compare.png", metavar="FILE", help="learning curves (%(default)s)")
    add_quiet(parser)


def _run(arguments: argparse.Namespace) -> int:
    check_outputs(json=arguments.json, plot=arguments.plot)
    net, task = network(arguments.optimizer, arguments.device), problem(arguments)
    with user_errors():
        result = comparisons.compare(
            net,
            task,
            arguments.horizon,
            arguments.episodes,
            tuning_episodes=arguments.tuning_episodes,
            names=arguments.baselines,
            cache=arguments.cache,
            device=arguments.device,
            on_trial=None if arguments.quiet else _show_trial,
        )
    write_json(arguments.json, result.to_json())  # first: what took hours must not hang on a terminal
    if arguments.json != STDOUT:
        say(comparisons.table(result))
        say(comparisons.verdict(result)[1])
    draw(
        [result],
        arguments.plot,
        quiet=arguments.json == STDOUT,
        titles=[repr(task)],
        heading=f"{Path(arguments.optimizer).name} against tuned baselines",
    )
    return 0


def _show_trial(name: str, lr: float, loss: float) -> None:
    print(f"tuning {name}: lr {lr:.3g}, final validation loss {loss:.4g}", file=sys.stderr)
