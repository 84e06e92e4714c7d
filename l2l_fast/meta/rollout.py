"""The losses along an optimizer's way through a task."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def finite_prefix(losses: list[Tensor], num_problems: int) -> list[float]:
    """Losses per problem as floats; from the first infinite or NaN one on, all count as +inf."""
    values = (torch.stack(losses).double() / num_problems).tolist()
    for t, value in enumerate(values):
        if not math.isfinite(value):
            return values[:t] + [math.inf] * (len(values) - t)
    return values
