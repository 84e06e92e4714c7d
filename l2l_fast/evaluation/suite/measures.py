"""How a contender compares with the baselines: logarithms of ratios of losses, and what sums them up.

A ratio is taken seed by seed, as theta_0 and minibatches are the same for both, and its logarithm averaged over seeds;
-0.69 is half the loss. Over networks stands the interquartile mean (Agarwal et al. 2021), which no single network can
move much, whether it diverged or is easy, beside the worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .curves import Run

_RESAMPLES = 2000


def log_ratio(loss: float, other: float) -> float:
    """ln(loss / other); inf where only ``loss`` is not finite, -inf where only ``other`` is, 0 where both are."""
    bad, other_bad = not math.isfinite(loss), not math.isfinite(other)
    if bad or other_bad:
        return 0.0 if bad and other_bad else math.inf if bad else -math.inf
    if loss <= 0 or other <= 0:
        return 0.0 if loss == other else math.copysign(math.inf, loss - other)
    return math.log(loss / other)


def log_ratios(runs: Sequence[Run], others: Sequence[Run], loss: Callable[[Run], float]) -> list[float]:
    """Seed by seed.

    Raises:
        ValueError: another number of runs.
    """
    if len(runs) != len(others):
        raise ValueError(f"others: expected {len(runs)} runs, got {len(others)}")
    return [log_ratio(loss(run), loss(other)) for run, other in zip(runs, others)]


def mean(values: Sequence[float]) -> float:
    """Of logarithms, of which some may be infinite; +inf where both infinities occur: it diverged somewhere."""
    return float(_means(np.asarray(values, dtype=np.float64)))


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean of the middle half; where a quarter of their number is no whole one, those at the edges count in part.

    Raises:
        ValueError: no values.
    """
    if len(values) == 0:
        raise ValueError("values: expected at least one, got none")
    return float(_interquartile_means(np.asarray(values, dtype=np.float64)))


def _interquartile_means(values: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    ordered = np.sort(values, -1)
    count = ordered.shape[-1]
    places = np.arange(count)
    weights = np.clip(np.minimum(places + 1, 3 * count / 4) - np.maximum(places, count / 4), 0, 1)
    kept = weights > 1e-12  # infinities outside would be NaN times zero
    return _means(ordered[..., kept] * weights[kept]) * kept.sum() / weights.sum()


def _means(values: np.ndarray) -> np.ndarray:
    """Over the last dimension; +inf where both infinities occur: it diverged somewhere."""
    with np.errstate(invalid="ignore"):
        return np.where((values == math.inf).any(-1), math.inf, values.mean(-1))


def interval(ratios: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the interquartile mean of the networks' means, over networks and, in each, over
    seeds. Networks are not a random sample of anything: it says how much hangs on which they are."""
    generator = np.random.default_rng(0)
    table = np.array(list(ratios.values()), dtype=np.float64)
    networks, seeds = table.shape
    drawn = generator.integers(networks, size=(_RESAMPLES, networks, 1))
    found = _interquartile_means(_means(table[drawn, generator.integers(seeds, size=(_RESAMPLES, networks, seeds))]))
    # Not interpolated: between an infinity and a number there is nothing.
    low, high = np.quantile(found, (0.025, 0.975), method="nearest")
    return float(low), float(high)


def wins(ratios: Mapping[str, Sequence[float]]) -> tuple[int, int]:
    """On how many networks the mean ratio is below one, and on how many that of every seed."""
    below = [mean(values) < 0 for values in ratios.values()]
    all_below = [max(values) < 0 for values in ratios.values()]
    return sum(below), sum(all_below)


def geometric_mean(values: Sequence[float]) -> float:
    """Of losses; inf if one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.inf
    return math.exp(float(np.mean([math.log(value) if value > 0 else -math.inf for value in values])))


def lowest(choices: Mapping[str, Sequence[Run]]) -> str:
    """The baseline with the lowest geometric mean of final losses on the test seeds: chosen there, which favours it.

    Raises:
        ValueError: none to choose from.
    """
    if not choices:
        raise ValueError("choices: expected at least one baseline, got none")
    return min(choices, key=lambda name: geometric_mean([run.final for run in choices[name]]))
