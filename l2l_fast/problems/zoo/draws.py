"""Random options of an architecture, all from one generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..base import FLOAT32

T = TypeVar("T")


class Draw:
    """Numbers and choices from ``generator``, whatever torch's defaults for dtypes and devices are."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """From U[low, high)."""
        return low + (high - low) * torch.rand((), generator=self.generator, **FLOAT32).item()

    def log_uniform(self, low: float, high: float) -> float:
        """Positive, its logarithm uniform."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def whole(self, low: int, high: int) -> int:
        """A whole number in low..high, both included."""
        return low + int(torch.randint(high - low + 1, (), generator=self.generator, device="cpu"))

    def log_whole(self, low: int, high: int) -> int:
        """A whole number in low..high, both included, its logarithm nearly uniform."""
        return min(high, int(self.log_uniform(low, high + 1)))

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self.uniform() < probability

    def one_of(self, values: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of the values; all alike, or by weights that need not sum to one."""
        if weights is None:
            return values[self.whole(0, len(values) - 1)]
        place = self.uniform(0.0, sum(weights))
        for value, weight in zip(values, weights, strict=True):
            place -= weight
            if place < 0:
                return value
        return values[-1]

    def normal(self, *shape: int) -> Tensor:
        """float32, standard normal."""
        return torch.randn(shape, generator=self.generator, **FLOAT32)

    def rand(self, *shape: int) -> Tensor:
        """float32, from U[0, 1)."""
        return torch.rand(shape, generator=self.generator, **FLOAT32)

    def below(self, end: int, *shape: int) -> Tensor:
        """int64, whole numbers in 0..end - 1."""
        return torch.randint(end, shape, generator=self.generator, device="cpu")

    def spread(self, size: int, decades: float) -> Tensor:
        """float32 ``[size]``: from 1 down to 10^-decades, log-spaced, in random order."""
        return torch.logspace(0, -decades, size, **FLOAT32)[self.permutation(size)]

    def permutation(self, count: int) -> Tensor:
        """int64 ``[count]``, 0..count - 1 in some order."""
        return torch.randperm(count, generator=self.generator, device="cpu")
