"""The command line: ``python -m l2l_fast COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ..kernels.version import VERSION
from . import (
    bench,
    compare,
    decisions,
    demo,
    evaluate,
    evidence,
    experiment,
    importing,
    info,
    pretrained,
    suite,
    train,
)
from .console import PROGRAM, UserError, unbreakable_streams
from .options import Parser

# In the order of the help: what most people need comes first.
_COMMANDS = (
    train,
    evaluate,
    compare,
    experiment,
    evidence,
    pretrained,
    decisions,
    importing,
    suite,
    bench,
    info,
    demo,
)
_MAX_THREADS = 1024  # far beyond any machine's processors; a process that starts too many ends without a word


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0; 1: a whole demo in which a baseline won; 2: a user's mistake; 130:
    interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with unbreakable_streams():
        return _main(argv)


def _main(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:  # whose threads are a list
        return bench.run(argv[1:])
    arguments = _parser().parse(argv)
    try:
        if arguments.threads is not None:
            if arguments.threads > _MAX_THREADS:
                raise UserError(f"--threads: expected 1..{_MAX_THREADS}, got {arguments.threads}")
            torch.set_num_threads(arguments.threads)
        return arguments.command(arguments)
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Learned optimizers (Andrychowicz et al. 2016): meta-train them, measure them, use them.",
        epilog=f"{PROGRAM} COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"l2l_fast {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    return parser
