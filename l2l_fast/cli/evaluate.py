"""The command ``evaluate``: the learning curve of a trained optimizer."""

from __future__ import annotations

import argparse

from ..evaluation import comparison as comparisons
from ..meta import evaluate
from .console import STDOUT, check_outputs, network, problem, say, user_errors, write_json
from .options import Commands, add_command, add_protocol


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "learning curve of a trained optimizer on fresh test tasks"
    parser = add_command(commands, "evaluate", _run, text, "--optimizer quadratic --problem quadratic")
    add_protocol(parser)


def _run(arguments: argparse.Namespace) -> int:
    check_outputs(json=arguments.json)
    net, task = network(arguments.optimizer, arguments.device), problem(arguments)
    with user_errors():
        losses = evaluate(net, task, range(arguments.episodes), arguments.horizon, device=arguments.device)
    problems_per_task = task.sample(0, "test").side_by_side
    result = comparisons.Comparison(task, {comparisons.LEARNED: losses}, {}, problems_per_task)
    write_json(arguments.json, result.to_json())  # first: what was computed must not hang on a terminal
    if arguments.json != STDOUT:
        say(comparisons.table(result))
    return 0
