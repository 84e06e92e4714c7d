"""Optimizees: the functions that a learned optimizer is trained on and judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from l2l_fast.problems.base import SPLITS, Problem, Task
from l2l_fast.problems.conv import ConvNet
from l2l_fast.problems.custom import ModuleProblem
from l2l_fast.problems.mnist import MNIST
from l2l_fast.problems.neural_art import NeuralArt
from l2l_fast.problems.quadratic import Quadratic

__all__ = [
    "MNIST",
    "SPLITS",
    "ConvNet",
    "ModuleProblem",
    "NeuralArt",
    "Problem",
    "Quadratic",
    "Task",
    "available",
    "get",
    "register",
]

_REGISTRY: dict[str, Callable[..., Problem]] = {
    "conv": ConvNet,
    "mnist": MNIST,
    "neural-art": NeuralArt,
    "quadratic": Quadratic,
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
    if name not in _REGISTRY:
        raise ValueError(f"name must be one of {available()}, got {name!r}")
    return _REGISTRY[name](**options)


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
