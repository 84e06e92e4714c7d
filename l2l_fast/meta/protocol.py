"""The protocol of an episode: how long it is, where it is cut, and which losses count."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..kernels import checks
from ..problems.base import MAX_STEPS

LossWeights = Sequence[float] | Tensor | Callable[[int], float] | str | None


@dataclass(frozen=True)
class Protocol:
    """An episode optimises one task for ``horizon`` steps, cut into segments of ``unroll`` steps (or fewer, the last).

    ``weights[t-1]`` is w_t of equation 3 of Andrychowicz et al. 2016, t = 1..horizon. ``second_derivatives`` keeps the
    path through d grad / d theta, which the paper drops (section 2).
    """

    horizon: int
    unroll: int
    weights: tuple[float, ...]
    second_derivatives: bool = False

    @classmethod
    def make(cls, horizon: int, unroll: int, weights: LossWeights = None, second_derivatives: bool = False) -> Protocol:
        """Check and normalise the user's options; see :class:`l2l_fast.MetaTrainer` for their meaning.

        Raises:
            TypeError, ValueError: an option of the wrong type or out of range; the message names it.
        """
        horizon, unroll = checks.integer("horizon", horizon, 1, MAX_STEPS), checks.integer("unroll", unroll, 1)
        if unroll > horizon:
            raise ValueError(f"unroll: expected at most horizon={horizon}, got {unroll}")
        second_derivatives = checks.flag("second_derivatives", second_derivatives)
        return cls(horizon, unroll, _loss_weights(weights, horizon, unroll), second_derivatives)

    def segments(self) -> list[tuple[int, int]]:
        """``(start, end)`` of every segment: it runs from theta_start to theta_end."""
        starts = range(0, self.horizon, self.unroll)
        return [(start, min(start + self.unroll, self.horizon)) for start in starts]

    def config(self) -> dict[str, Any]:
        """JSON-able; what a checkpoint stores and checks."""
        weights: Any = 1.0 if set(self.weights) == {1.0} else list(self.weights)
        return {
            "horizon": self.horizon,
            "unroll": self.unroll,
            "weights": weights,
            "second_derivatives": self.second_derivatives,
        }


def _loss_weights(weights: LossWeights, horizon: int, unroll: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * horizon
    if isinstance(weights, str):
        if weights != "final":
            raise ValueError(f'weights: expected "final", a callable or {horizon} numbers, got {weights!r}')
        return tuple(float(t % unroll == 0 or t == horizon) for t in range(1, horizon + 1))
    if callable(weights):
        weights = [weights(t) for t in range(1, horizon + 1)]
    elif isinstance(weights, Tensor):
        weights = weights.tolist()
    expected = f'weights: expected "final", a callable or {horizon} numbers'
    # A mapping would give its keys, and a set an order of its own.
    if isinstance(weights, (Mapping, Set, bytes, bytearray)) or not isinstance(weights, Iterable):
        raise TypeError(f"{expected}, got {weights!r}")
    found = [(w, checks.as_float(w)) for w in weights]
    for t, (given, number) in enumerate(found, start=1):
        if number is None:
            raise TypeError(f"{expected}, got {given!r} for step {t}")
    values = tuple(number for _, number in found if number is not None)
    if len(values) != horizon:
        raise ValueError(f"weights: expected {horizon} values (one per step), got {len(values)}")
    if not all(math.isfinite(w) and w >= 0.0 for w in values):
        raise ValueError(f"weights: expected finite numbers >= 0, got {values}")
    if not any(values):
        raise ValueError("weights: at least one must be positive, or there is nothing to learn from")
    return values


def episode_seed(seed: int, episode: int) -> int:
    """The seed of a training episode's task: a function of both numbers alone, so that a run can resume anywhere."""
    digest = hashlib.blake2b(f"{seed}/{episode}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def cosine_decay(episode: int, decay_episodes: int | None, decay_to: float) -> float:
    """Factor on the meta-learning rate: from 1 down to ``decay_to`` along half a cosine, constant afterwards."""
    if decay_episodes is None:
        return 1.0
    progress = min(episode / decay_episodes, 1.0)
    return decay_to + (1.0 - decay_to) * 0.5 * (1.0 + math.cos(math.pi * progress))
