"""How a learning rate falls within a run of known length."""

from __future__ import annotations

import math
from collections.abc import Callable

_FACTORS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "hold": lambda progress: min(1.0, 2.0 * (1.0 - progress)),
}
SCHEDULES = tuple(_FACTORS)


def factor(schedule: str, step: int, horizon: int) -> float:
    """What the learning rate is multiplied by at ``step``, 0..horizon - 1: "constant"; "cosine", "linear" from 1
    towards 0; "hold": 1 in the first half, then linear towards 0. Never 0: every step moves."""
    return _FACTORS[schedule](step / horizon)
