"""Optimizees: the functions that a learned optimizer is trained on and judged by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..kernels.checks import meant, one_of
from .base import SPLITS, Problem, Task
from .conv import ConvNet
from .custom import ModuleProblem
from .mnist import MNIST
from .neural_art import NeuralArt
from .quadratic import Quadratic
from .zoo import Zoo

__all__ = [
    "MNIST",
    "SPLITS",
    "ConvNet",
    "ModuleProblem",
    "NeuralArt",
    "Problem",
    "Quadratic",
    "Task",
    "Zoo",
    "available",
    "get",
    "options",
    "register",
]

_REGISTRY: dict[str, Callable[..., Problem]] = {
    "conv": ConvNet,
    "mnist": MNIST,
    "neural-art": NeuralArt,
    "quadratic": Quadratic,
    "zoo": Zoo,
}


def available() -> tuple[str, ...]:
    """The names that ``get`` knows."""
    return tuple(sorted(_REGISTRY))


def get(name: str, **options: Any) -> Problem:
    """Build a problem by name: ``get("mnist", hidden=(40,))``; ``get(**problem.config())`` builds it again.

    Raises:
        ValueError: no such problem, or an option is out of its range.
        TypeError: the problem has no such option.
    """
    make = _REGISTRY[one_of("name", name, available())]
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        known = _options_of(make)
        unknown = [option for option in options if option not in known]
        if unknown:
            expected = f"expected some of {', '.join(known)}{meant(unknown[0], known)}"
            raise TypeError(f"{name!r} has no option {unknown[0]!r}; {expected}") from None
        raise TypeError(f"{name!r}: {error}") from None
    return make(**options)


def options(name: str) -> tuple[str, ...]:
    """The options of the problem of that name. ValueError if there is none."""
    return _options_of(_REGISTRY[one_of("name", name, available())])


def _options_of(make: Callable[..., Problem]) -> tuple[str, ...]:
    # What takes any keywords has options of its own, which only it knows.
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, each in inspect.signature(make).parameters.items() if each.kind in kinds)


def register(name: str, make: Callable[..., Problem]) -> None:
    """Let ``get(name, **options)`` (and so the command line) build your problem as ``make(**options)``.

    Raises:
        ValueError: the name is taken.
        TypeError: ``make`` is not callable.
    """
    if not callable(make):
        raise TypeError(f"make must be callable, got {type(make).__name__}")
    if name in _REGISTRY:
        raise ValueError(f"name must be a new one, but {name!r} is taken")
    _REGISTRY[name] = make
