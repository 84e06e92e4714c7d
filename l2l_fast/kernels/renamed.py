"""Keyword arguments that have another name now: the former one is still understood, with a warning."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Since 0.2: "groups" are those of parameters, and of nothing else.
FORMER, PRESENT = "groups", "num_problems"


def warn(stacklevel: int) -> None:
    """Say that ``FORMER`` is called ``PRESENT`` now; ``stacklevel`` as for :func:`warnings.warn`, of the caller."""
    warnings.warn(f"{FORMER}: is called {PRESENT} now", DeprecationWarning, stacklevel=stacklevel + 1)


def frames_to_user() -> int:
    """The ``stacklevel`` at which the caller finds the first frame that is neither this package's nor torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("l2l_fast", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def refuse_both() -> None:
    """Raise the TypeError of a call that gives both names."""
    raise TypeError(f"{FORMER}: the former name of {PRESENT}, which is given, too; expected {PRESENT} alone")


def takes_groups(stacklevel: int = 2) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function with an argument ``num_problems``: it takes ``groups=...`` in its place, too, with a
    DeprecationWarning that points ``stacklevel`` frames up from the function. TypeError if both are given."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> R:
            if FORMER in kwargs:
                if PRESENT in kwargs:
                    refuse_both()
                warn(stacklevel)
                kwargs[PRESENT] = kwargs.pop(FORMER)
            return function(*args, **kwargs)

        return wrapped

    return decorate
