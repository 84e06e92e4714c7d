"""The command ``decisions``: what an optimizer does with gradients, drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluation import baselines, comparison, decisions
from ..kernels import checks
from ..meta.assignment import optimizer_groups
from ..problems import Problem
from ..problems.base import horizon_of
from ..problems.theta import trainable
from .console import UserError, check_outputs, network, say, user_errors
from .console import problem as named_problem
from .options import Commands, add_command, add_device, add_problem, count

_MAX_ROWS = 50  # of panels in a picture


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "draw what an optimizer does with gradients, beside Adam and SGD (appendix B)"
    parser = add_command(commands, "decisions", _run, text, "quadratic --problem quadratic --plot decisions.png")
    parser.add_argument("optimizer", metavar="OPTIMIZER", help="a file, or the name of a pretrained optimizer")
    add_problem(parser)
    add_device(parser)
    parser.add_argument("--horizon", type=count, default=100, metavar="N", help="steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the test task (%(default)s)")
    parser.add_argument("--coordinates", type=count, metavar="N", help="how many (2, or the one that there is)")
    parser.add_argument("--adam-lr", type=float, metavar="X", help="default: tuned on the problem")
    parser.add_argument("--sgd-lr", type=float, metavar="X", help="default: tuned on the problem")
    parser.add_argument("--plot", default="decisions.png", metavar="FILE", help="the picture (%(default)s)")


def _run(arguments: argparse.Namespace) -> int:
    check_outputs(plot=arguments.plot)
    net, problem = network(arguments.optimizer, arguments.device), named_problem(arguments)
    with user_errors():
        if (arguments.coordinates or 0) > _MAX_ROWS:
            rows = f"expected 1..{_MAX_ROWS}, one row of panels each, got {arguments.coordinates}"
            raise UserError(f"--coordinates: {rows}")
        given = {"adam": arguments.adam_lr, "sgd": arguments.sgd_lr}
        # Before the searches, which take longer than anything that follows.
        for name, rate in given.items():
            if rate is not None:
                checks.real(f"learning_rates[{name!r}]", rate, 0.0)
        horizon_of(arguments.horizon)
        task = problem.sample(arguments.seed, "test", arguments.device)
        optimizer_groups(task, net)
        if arguments.coordinates is not None:
            sizes = {name: value.numel() for name, value in trainable(task).items()}
            decisions.check_count(sizes, arguments.coordinates)
        rates = {name: lr if lr is not None else _tuned(problem, name, arguments) for name, lr in given.items()}
        made = decisions.decide(
            net,
            task,
            rates,
            horizon=arguments.horizon,
            coordinates=arguments.coordinates,
        )
        heading = f"{Path(arguments.optimizer).stem} on {problem.name} ({comparison.data_set(problem)})"
        say(f"decisions: {decisions.draw(made, arguments.plot, heading)}")
    say(f"learning rates: Adam {rates['adam']:.3g}, SGD {rates['sgd']:.3g}")
    return 0


def _tuned(problem: Problem, name: str, arguments: argparse.Namespace) -> float:
    # Of the same kind as in the figures of the paper: a constant rate, the default betas.
    given: dict[str, Any] = {"options": {}, "schedules": ["constant"], "points_per_decade": 8}
    return baselines.tune(problem, name, arguments.horizon, seeds=range(5), device=arguments.device, **given)
