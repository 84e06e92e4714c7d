"""The distribution that a general optimizer is trained on, and another to validate it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ...kernels import checks
from ...kernels.checks import one_of, positive_int
from ..base import Problem
from .draws import Draw
from .families import FAMILIES, TRAINING, VALIDATION
from .optimizee import Optimizee
from .pixels import Images, load, present
from .task import RESCALINGS, ZooTask

_TRIES = 500


class Zoo(Problem):
    """Small optimizees of many kinds, ``problems`` of one architecture side by side in a task.

    A task draws a family by its weight, then an architecture and a data set from the family, again until the number of
    coordinates fits. Its problems differ in theta_0, in minibatches and in units: with ``rescale``, a task minimises
    a f(c * z), where c is one, or exp(U(-3, 3)) for all of theta, per tensor or per coordinate (Lv et al. 2017, section
    4.1), each in a quarter of the tasks, and in half of the tasks a is exp(U(-3, 3)). Task augmentation of this kind is
    what general optimizers gain most from (Celo2, 2025).

    Splits share no images, no text, and no random numbers.

    Args:
        families: "train" or None: all of ``TRAINING``; "validation": all of ``VALIDATION``, kinds that training does
            not have; or names of families.
        problems: how many problems a task holds.
        coordinates: the least and the greatest number of coordinates of one problem.
        rescale: whether units are drawn, or with what chance they are; else c = a = 1.
        data: image sets: "mnist-10k-embedded", "mnist-60k", "fashion-mnist", or several with commas between; None:
            those that are there, see ``l2l_fast.problems.zoo.pixels.present``.

    Raises:
        ValueError, TypeError: an option is out of its range.
        FileNotFoundError: an image set is missing.
    """

    name = "zoo"

    def __init__(
        self,
        families: str | Iterable[str] | None = None,
        problems: int = 8,
        coordinates: tuple[int, int] = (500, 4000),
        rescale: bool | float = True,
        data: str | None = None,
    ) -> None:
        self.families = _families(families)
        self.problems = positive_int("problems", problems)
        self.coordinates = _bounds(coordinates)
        self.rescale = _chance(rescale)
        self.images = Images(present() if data is None else _data(data))
        for name in self.images.names:
            load(name)

    @property
    def data(self) -> Any:
        """The first of the image sets."""
        return load(self.images.names[0])

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> ZooTask:
        draw = Draw(generator)
        rescale = self.rescale if isinstance(self.rescale, bool) else draw.chance(self.rescale)
        weights = [FAMILIES[name][1] for name in self.families]
        family = draw.one_of(self.families, weights)
        rescaling, losses = "none", False
        if rescale:
            rescaling, losses = draw.one_of(RESCALINGS), draw.chance(0.5)
        optimizee = self._optimizee(family, draw, split)
        return ZooTask(draw, optimizee, self.problems, family, rescaling, losses, device)

    def _optimizee(self, family: str, draw: Draw, split: str) -> Optimizee:
        low, high = self.coordinates
        seen: list[int] = []
        for _ in range(_TRIES):
            optimizee = FAMILIES[family][0](draw, self.images, split)
            seen.append(optimizee.coordinates)
            if low <= seen[-1] <= high:
                return optimizee
        raise ValueError(
            f"coordinates: no {family!r} of {_TRIES} drawn has {low} to {high}; they have {min(seen)} to {max(seen)}"
        )

    def config(self) -> dict[str, Any]:
        """As ``Problem.config``; ``data`` names the image sets used, not their folders."""
        return {
            "name": self.name,
            "families": list(self.families),
            "problems": self.problems,
            "coordinates": list(self.coordinates),
            "rescale": self.rescale,
            "data": ",".join(self.images.names),
        }


def _families(families: str | Iterable[str] | None) -> tuple[str, ...]:
    if families is None or (isinstance(families, str) and families == "train"):
        return tuple(TRAINING)
    if isinstance(families, str) and families == "validation":
        return tuple(VALIDATION)
    if isinstance(families, str):
        families = [families]
    try:
        names = [one_of("families", name, FAMILIES) for name in families]
    except TypeError:
        raise TypeError(f"families must be None, a name or names, got {families!r}") from None
    return _different("families", families, names)


def _chance(rescale: bool | float) -> bool | float:
    if isinstance(rescale, bool):
        return rescale
    number = checks.as_float(rescale)
    if number is None:
        raise TypeError(f"rescale must be True, False or a number in [0, 1], got {rescale!r}")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"rescale must be True, False or a number in [0, 1], got {rescale!r}")
    return number


def _data(data: str) -> tuple[str, ...]:
    if not isinstance(data, str):
        raise TypeError(f"data must be None or names of image sets with commas between, got {data!r}")
    return _different("data", data, [name.strip() for name in data.split(",")])


def _different(argument: str, given: Any, names: Iterable[str]) -> tuple[str, ...]:
    found = tuple(names)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{argument} must be one or more different names, got {given!r}")
    return found


def _bounds(coordinates: tuple[int, int]) -> tuple[int, int]:
    try:
        low, high = coordinates
    except (TypeError, ValueError):
        raise TypeError(f"coordinates must be a pair of whole numbers, got {coordinates!r}") from None
    low, high = positive_int("coordinates", low), positive_int("coordinates", high)
    if low > high:
        raise ValueError(f"coordinates must be a rising pair, got {coordinates!r}")
    return low, high
