"""What is kept of a run's losses: the means that the measures are made of, and a curve in bins.

Losses are f at theta_t on the minibatch of step t, before the update: ``losses[0]`` is at theta_0. A minibatch is
noise, so every measure is a mean over a window: the last 5 % of the steps (*final*), or those within 10 % of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

EARLY = (100, 300)  # steps at which a run is looked at besides its end
FINAL = 0.05  # share of the steps that make the final loss
NEAR = 0.1  # how far around a step its window reaches
_RATIO = 1.06  # of neighbouring bins' ends, beyond those of single steps


def final_window(steps: int) -> slice:
    """The last 5 % of ``steps`` losses, at least one."""
    return slice(steps - max(1, round(FINAL * steps)), steps)


def window(step: int) -> slice:
    """The losses within 10 % of ``step``, both ends included: 90..110 for 100."""
    reach = round(NEAR * step)
    return slice(step - reach, step + reach + 1)


def bin_ends(steps: int) -> list[int]:
    """The ends of the bins of ``steps`` losses: single steps first, then bins 6 % longer than what lies before them
    would make them; the last ends at ``steps``."""
    ends, end = [], 0
    while end < steps:
        end = min(steps, max(end + 1, round(end * _RATIO)))
        ends.append(end)
    return ends


@dataclass(frozen=True)
class Run:
    """One optimizer on one network from one seed.

    Attributes:
        steps: that it was meant to make.
        start: the loss at theta_0, a mean over minibatches, the same for every optimizer.
        final: mean of the last 5 % of the losses; +inf if one of all was not finite, or the run was given up.
        early: the loss around each of EARLY, by step; +inf likewise; absent where the run is too short.
        curve: the means of the bins of :func:`bin_ends`, those that were reached; may be left out (empty).
        seconds: that a step took, everything included.
    """

    steps: int
    start: float
    final: float
    early: dict[int, float] = field(default_factory=dict)
    curve: tuple[float, ...] = ()
    seconds: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite, or the final one lies above that of theta_0."""
        return not self.final <= self.start

    def ends(self) -> list[int]:
        """The ends of the bins of ``curve``."""
        return bin_ends(self.steps)[: len(self.curve)]


def summarise(losses: Sequence[float], steps: int, start: float, seconds: float = 0.0) -> Run:
    """The run that had these losses; if they are fewer than ``steps``, it ended early and counts as diverged."""
    values = np.asarray(losses, dtype=np.float64)
    # From the first loss that is not finite on nothing counts.
    bad = np.flatnonzero(~np.isfinite(values))
    values = values[: bad[0]] if len(bad) else values
    final = _mean(values[final_window(steps)]) if len(values) == steps else math.inf
    early = {}
    for step in EARLY:
        part = window(step)
        if part.stop <= steps:
            early[step] = _mean(values[part]) if len(values) >= part.stop else math.inf
    curve, begin = [], 0
    for end in bin_ends(steps):
        if end > len(values):
            break
        curve.append(_mean(values[begin:end]))
        begin = end
    return Run(steps, start, final, early, tuple(curve), seconds)


def _mean(values: np.ndarray) -> float:
    # Of large numbers that are finite each the sum may not be.
    with np.errstate(over="ignore"):
        return float(values.mean())


def smoothed(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """The curve of several runs of the same length: steps (the bins' middles) and the geometric mean over the runs of
    the loss within 10 % of each step. Where a run has ended, the curve has.

    Raises:
        ValueError: no runs, or of different lengths.
    """
    if len({run.steps for run in runs}) != 1:
        raise ValueError(f"runs: expected some of one length, got lengths {[run.steps for run in runs]}")
    count = min(len(run.curve) for run in runs)
    ends = np.array(bin_ends(runs[0].steps)[:count])
    begins = np.concatenate(([0], ends))[:-1][:count]
    middles, sizes = (begins + ends - 1) / 2, ends - begins
    logs = []
    for run in runs:
        sums = np.array(run.curve[:count]) * sizes
        near = [(np.abs(middles - middle) <= NEAR * middle) | (middles == middle) for middle in middles]
        logs.append([_log(sums[chosen].sum() / sizes[chosen].sum()) for chosen in near])
    return middles, np.exp(np.mean(logs, 0)) if count else np.array([])


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def equivalent_step(runs: Sequence[Run], loss: float) -> float:
    """At which step the smoothed curve of ``runs`` first is at ``loss`` or below; inf: not within them.

    Between bins the logarithm of the loss is taken as linear in that of the step. At the end the curve's value is the
    runs' final loss, since that is what ``loss`` is one of.
    """
    steps, values = smoothed(runs)
    last = final_window(runs[0].steps)
    inside = steps < last.start
    final = math.exp(np.mean([_log(run.final) for run in runs]))
    steps = np.append(steps[inside], (last.start + last.stop - 1) / 2)
    values = np.append(values[inside], final)
    below = np.flatnonzero(values <= loss)
    if len(below) == 0 or math.isnan(loss):
        return math.inf
    k = int(below[0])
    if k == 0 or steps[k - 1] <= 0:
        return float(steps[k])
    above, under = _log(values[k - 1]), _log(values[k])
    share = 1.0 if not math.isfinite(under) else (above - _log(loss)) / (above - under)
    return float(math.exp(math.log(steps[k - 1]) + share * math.log(steps[k] / steps[k - 1])))
