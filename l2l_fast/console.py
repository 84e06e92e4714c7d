"""What the commands share: messages, errors that are the user's to put right, optimizers by file or by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import pretrained, trained
from .meta import is_checkpoint, load_best
from .meta.networks import Networks

PROGRAM = "python -m l2l_fast"


class UserError(Exception):
    """Something the user can put right; shown without a traceback, exit status 2."""


@contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Inside, what the library says about its arguments is the user's to put right."""
    try:
        yield
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise UserError(f"{prefix}{error}") from error


def say(text: str) -> None:
    """Print a result."""
    print(text, flush=True)


def network(path: str) -> Networks:
    """The optimizer in a file (a trained one, or the best of a checkpoint), or a pretrained one by name."""
    with user_errors("--optimizer: "):
        if path in pretrained.names() and not Path(path).exists():
            return pretrained.load_pretrained(path)
        return load_best(path) if is_checkpoint(path) else trained.load(path)


def write_json(path: str | None, value: Any) -> None:
    """Write ``value`` to the file that the option ``--json`` names, if it names one."""
    if path is None:
        return
    with user_errors("--json: "):
        Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
