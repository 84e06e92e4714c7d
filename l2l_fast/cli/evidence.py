"""The command ``evidence``: sealed test tasks, measured once, into a ledger."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluation import experiments
from .console import UserError, say, user_errors
from .options import Commands, add_command, add_data, add_quiet


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "measure the package's optimizers on the sealed test tasks of this release, once, into the ledger"
    parser = add_command(commands, "evidence", _run, text, "mnist --ledger evidence.jsonl")
    parser.add_argument("name", nargs="+", metavar="NAME", help="of an experiment, or its .json file")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="some of the experiment's (default: all)")
    parser.add_argument("--out", metavar="DIR", help="folder for tables, figures and what is kept (runs/evidence/NAME)")
    parser.add_argument(
        "--ledger", default="docs/evidence.jsonl", metavar="FILE", help="where every measurement is noted (%(default)s)"
    )
    add_data(parser)
    add_quiet(parser)


def _run(arguments: argparse.Namespace) -> int:
    if len(arguments.name) > 1 and arguments.out is not None:
        raise UserError("--out: one experiment at a time, or none of it: they would write the same files")
    for name in arguments.name:
        with user_errors():
            experiment = experiments.load(name)
            outcome, said = experiments.measure(
                experiment,
                Path("runs", "evidence", experiment.name) if arguments.out is None else arguments.out,
                arguments.ledger,
                data=arguments.data,
                settings=arguments.settings,
                progress=not arguments.quiet,
            )
        say(outcome.table.read_text(encoding="utf-8"))
        say("\n".join(said))
    return 0
