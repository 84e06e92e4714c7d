"""What a family draws: an architecture and its data, the same for all problems of a task."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .draws import Draw
from .layers import Leaf, Theta
from .pixels import Images

Batch = tuple[Tensor, ...]


class Net(Protocol):
    """An architecture with its loss, for any number of problems side by side."""

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        """``[K]``: the loss of every problem on its own minibatch. All tensors lead with K; problem k's loss depends on
        nothing but the k-th part of each."""
        ...


class Source(Protocol):
    """Minibatches; it lives on the CPU and draws all its random numbers from the generator it is given."""

    def draw(self, problems: int, draw: Draw) -> Batch:
        """A fresh minibatch for each of the problems; every tensor leads with their number."""
        ...


@dataclass(frozen=True)
class Optimizee:
    """One architecture on one data set.

    Attributes:
        leaves: the parameters of one problem.
        net: loss of K such problems.
        source: its minibatches.
        label: what was drawn, in words.
    """

    leaves: dict[str, Leaf]
    net: Net
    source: Source
    label: str = ""

    @property
    def coordinates(self) -> int:
        """The number of coordinates of one problem."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves.values())


# Draws an optimizee from the data of a split: "train", "validation" or "test".
Family = Callable[[Draw, Images, str], Optimizee]
