"""What the commands share: messages, errors that are the user's to put right, and what their common options name."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import problems
from ..evaluation.comparison import Comparison
from ..kernels.checks import meant
from ..meta import is_checkpoint, load_best
from ..networks import pretrained, trained, writing
from ..networks.several import Networks

PROGRAM = "python -m l2l_fast"
STDOUT = "-"  # as the name of a file that JSON goes to


class UserError(Exception):
    """Something the user can put right; shown in one line, without a traceback, exit status 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


@contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Inside, what the library says about its arguments is the user's to put right. RuntimeError is what torch raises
    where memory does not suffice, and a search that finds no learning rate."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, OverflowError, ImportError) as error:
        raise UserError(f"{prefix}{error or type(error).__name__}") from error


class _Unbreakable:
    """A stream whose reader may go away (``| head``): what is written after that is lost, and the command goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._alive():
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:  # a terminal, or a locale, without some character
                encoding = self._stream.encoding
                return self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._alive():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # The buffer would be tried again, by later writes and when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def unbreakable_streams() -> Iterator[None]:
    """Inside, a closed pipe behind stdout or stderr stops nothing."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            # None: the command was started with the stream closed.
            guarded = _Unbreakable(stream or stack.enter_context(open(os.devnull, "w")))
            stack.enter_context(redirect(guarded))
            stack.callback(guarded.flush)
        yield


def command_line(program: Sequence[str], *parts: str | tuple[str, str]) -> str:
    """A command to copy: words, and (option, value) pairs, quoted for the shell. A value that begins with a dash is
    joined to its option, of which it would pass for another one."""
    words = list(program)
    for part in parts:
        if isinstance(part, str):
            words.append(part)
        else:
            words += [f"{part[0]}={part[1]}"] if part[1].startswith("-") else part
    return shlex.join(words)


def say(text: str) -> None:
    """Print a result."""
    print(text, flush=True)


def network(path: str, device: torch.device | str = "cpu", option: str = "--optimizer") -> Networks:
    """The optimizer in a file (a trained one, or the best of a checkpoint), or a pretrained one by name."""
    with user_errors(f"{option}: "):
        names = pretrained.names()
        if path in names and not Path(path).exists():
            return pretrained.load_pretrained(path, device)
        if not os.path.lexists(path):
            raise UserError(
                f"{option}: no such file, and no pretrained optimizer of that name: {path!r}{meant(path, names)}; "
                f"pretrained are {', '.join(names)}"
            )
        if os.path.isdir(path):
            inside = sorted(each.name for each in Path(path).glob("*.safetensors"))
            hint = f"; there are {', '.join(inside)} in it" if inside else ""
            raise UserError(f"{option}: expected a file, and this is a folder: {path!r}{hint}")
        return load_best(path, device) if is_checkpoint(path) else trained.load(path, device)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows below a header, in columns; those with these indices are of numbers, and stand on the right."""
    lines = [header, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    cells = [
        [cell.rjust(width) if k in numbers else cell.ljust(width) for k, (cell, width) in enumerate(zip(line, widths))]
        for line in lines
    ]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in cells)


def problem(arguments: argparse.Namespace) -> problems.Problem:
    """The problem that ``--problem``, ``--option`` and ``--data`` name."""
    with user_errors(f"--problem {arguments.problem}: "):
        return problems.get(arguments.problem, **problem_options(arguments, arguments.problem))


def problem_options(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """What ``--option`` and ``--data`` say of the problem ``name``.

    Raises:
        ValueError: no problem of that name. UserError: an option that none has.
    """
    options, known = dict(arguments.option or []), problems.options(name)
    if arguments.data is not None:
        # Some problems take the name of a data set as "data" and its folder as "folder".
        is_folder = "folder" in known and arguments.data not in problems.conv.DATA_SETS
        options["folder" if is_folder else "data"] = arguments.data
    if "name" in options:
        raise UserError(f"--option: {name} has no option 'name'; expected some of {', '.join(known)}")
    return options


def device(text: str) -> torch.device:
    """A device for the argument parser: one that exists here."""
    try:
        found = torch.device(text)
    except (RuntimeError, ValueError, OverflowError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if found.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees no CUDA device here")
    if (found.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"expected cuda:0 to cuda:{count - 1}, got {text!r}")
    return found


def check_outputs(**outputs: str | None) -> None:
    """Say now, not after hours, that the files which options name cannot be written. ``plot`` may need folders."""
    for option, path in outputs.items():
        if path is None or (option == "json" and path == STDOUT):
            continue
        with user_errors():
            writing.check_writable(path, f"--{option}", make_folder=option == "plot")
            if option == "plot":
                from ..evaluation import plots

                with suppress(ModuleNotFoundError):
                    plots.format_of(path, "--plot")


def write_json(path: str | None, value: Any) -> None:
    """Write ``value`` to the file that the option ``--json`` names, if it names one; "-" is stdout."""
    if path is None:
        return
    text = json.dumps(value, indent=1)
    if path == STDOUT:
        say(text)
        return
    with user_errors():
        writing.write_atomically(path, text + "\n", "--json")


def draw(
    results: list[Comparison], path: str | os.PathLike[str] | None, *, quiet: bool = False, **options: Any
) -> None:
    """Draw the curves and say where, unless ``quiet``; without matplotlib say that there is no picture."""
    if path is None:
        return
    from ..evaluation import plots

    try:
        with user_errors():
            plots.learning_curves(results, path, **options)
        if not quiet:
            say(f"learning curves: {path}")
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)
