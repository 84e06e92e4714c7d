"""Windows, bins, divergence and Adam-equivalent steps on curves made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from l2l_fast.evaluation.suite.curves import (
    bin_ends,
    equivalent_step,
    final_window,
    smoothed,
    summarise,
    window,
)
from tests.suite.helpers import falling


def test_the_windows():
    assert final_window(1000) == slice(950, 1000) and final_window(10_000) == slice(9500, 10_000)
    assert final_window(20) == slice(19, 20) and final_window(5) == slice(4, 5)
    assert list(range(1000)[window(100)]) == list(range(90, 111))
    assert list(range(1000)[window(300)]) == list(range(270, 331))


@pytest.mark.parametrize("steps", [1, 7, 20, 999, 1000, 10_000])
def test_the_bins_cover_every_step_once(steps):
    ends = bin_ends(steps)
    assert ends[-1] == steps and ends == sorted(set(ends)) and ends[0] == 1
    assert len(ends) < 150
    assert all(end - begin <= max(1, 0.08 * end) for begin, end in zip(ends, ends[1:]))


def test_a_run_is_summed_up_by_its_windows():
    losses = [1000.0 - t for t in range(1000)]
    run = summarise(losses, 1000, 1000.0, 0.5)
    assert run.final == np.mean(range(1, 51))
    assert run.early == {100: 900.0, 300: 700.0}
    assert not run.diverged and run.start == 1000.0 and run.seconds == 0.5
    sizes = np.diff([0, *bin_ends(1000)])
    assert run.curve[0] == 1000.0 and np.dot(run.curve, sizes) == pytest.approx(sum(losses))
    assert summarise([1.0] * 200, 200, 2.0).early == {100: 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_divergence_from_there_on(bad):
    losses = [1.0] * 200 + [bad] + [0.5] * 799
    run = summarise(losses, 1000, 2.0)
    assert run.diverged and run.final == math.inf
    assert run.early == {100: 1.0, 300: math.inf}
    assert run.curve and all(value == 1.0 for value in run.curve) and run.ends()[-1] <= 200
    assert summarise([1.0] * 999, 1000, 2.0).diverged  # given up


def test_ending_above_the_start_is_divergence():
    assert summarise([1.0] * 50 + [2.1] * 50, 100, 2.0).diverged
    assert not summarise([9.0] * 50 + [2.0] * 50, 100, 2.0).diverged


def test_a_smoothed_curve_is_the_geometric_mean_of_means_nearby():
    one, other = (summarise([level] * 1000, 1000, 9.0) for level in (2.0, 8.0))
    steps, values = smoothed([one, other])
    assert values == pytest.approx(np.full(len(steps), 4.0)) and steps[0] == 0
    steps, values = smoothed([falling()])
    inside = (steps > 40) & (steps < 900)
    assert values[inside] == pytest.approx(8.0 / (steps[inside] + 1), rel=0.02)
    short = summarise([1.0] * 50 + [math.nan], 1000, 1.0)
    assert smoothed([one, short])[0][-1] < 50
    with pytest.raises(ValueError, match="one length"):
        smoothed([one, falling(500)])


def test_equivalent_steps():
    runs = [falling()]
    for step in (50, 200, 600):
        assert equivalent_step(runs, 8.0 / (step + 1)) == pytest.approx(step, rel=0.03)
    # Its own final loss it has at its end, a lower one never, a higher one than theta_0's at once.
    assert equivalent_step(runs, runs[0].final) == pytest.approx(974.5, abs=1)
    assert equivalent_step(runs, runs[0].final * 0.999) == math.inf
    assert equivalent_step(runs, 9.0) == 0.0
    assert equivalent_step(runs, math.inf) == 0.0 and equivalent_step(runs, math.nan) == math.inf


def test_equivalent_steps_of_runs_that_ended_early():
    assert equivalent_step([summarise([1.0] * 40 + [math.inf], 1000, 2.0)], 0.5) == math.inf
    assert equivalent_step([summarise([math.inf], 1000, 2.0)], 0.5) == math.inf
