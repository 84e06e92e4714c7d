"""The argument parser of all commands, and the options that several of them have."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from .. import problems
from ..kernels.checks import meant
from .console import PROGRAM, device

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """An argument parser that guesses what was meant by a wrong choice or option."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **options)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(action, error.message + meant(str(value), action.choices or ())) from None

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """As ``parse_args``; what no option of the command takes is told with the command's usage."""
        found, rest = self.parse_known_args(argv)
        if rest:
            (getattr(found, "parser", None) or self)._refuse(rest)
        return found

    def _refuse(self, words: Sequence[str]) -> NoReturn:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        guesses = [meant(word.partition("=")[0], known) for word in words if word.startswith("-")]
        self.error(f"unrecognized arguments: {' '.join(words)}{next(filter(None, guesses), '')}")


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str, *examples: str, usage: str = ""
) -> Parser:
    """Add a command: what it does in one phrase, and examples of what follows its name. ``usage``: what does, where the
    list of all options would be a wall."""
    lines = "\n".join(f"  {PROGRAM} {name} {example}".rstrip() for example in examples)
    parser = commands.add_parser(
        name,
        help=text,
        description=textwrap.fill(text[0].upper() + text[1:] + ".", 96),
        usage=f"{PROGRAM} {name} {usage}" if usage else None,
        epilog=f"example{'s' if len(examples) > 1 else ''}:\n{lines}",
    )
    parser.set_defaults(command=run, parser=parser)
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--device``."""
    text = "where tasks and networks live: cpu, cuda or cuda:N (%(default)s)"
    parser.add_argument("--device", type=device, default="cpu", metavar="DEVICE", help=text)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--data``."""
    text = "data set: a folder or a name (default: L2L_FAST_DATA or embedded)"
    parser.add_argument("--data", metavar="DATA", help=text)


def add_problem(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--problem``, ``--option`` and ``--data``, of which :func:`.console.problem` makes a problem."""
    parser.add_argument("--problem", required=required, choices=problems.available(), help="the optimizee")
    parser.add_argument(
        "--option",
        action="append",
        type=option,
        metavar="KEY=VALUE",
        help='an option of the problem, as often as needed: "hidden=[40,40]", activation=relu, dim=20',
    )
    add_data(parser)


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """Add what a command that measures an optimizer on test tasks needs to know."""
    text = "a trained optimizer, the checkpoint of a run (its best), or the name of a pretrained one"
    parser.add_argument("--optimizer", required=True, metavar="FILE", help=text)
    add_problem(parser)
    parser.add_argument("--episodes", type=count, default=20, metavar="N", help="test tasks (%(default)s)")
    parser.add_argument("--horizon", type=count, default=100, metavar="N", help="steps (%(default)s)")
    add_device(parser)
    parser.add_argument("--json", metavar="FILE", help="write the curves there; -: to stdout, in place of the table")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--quiet``."""
    parser.add_argument("--quiet", action="store_true", help="no progress")


def count(text: str) -> int:
    """A positive integer, for the argument parser."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return value


def option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, for the argument parser; the value is JSON if it can be read so, else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
