"""Schedules of the learning rate: the values, and that each is applied to its own step."""

from __future__ import annotations

import math

import pytest
import torch

from l2l_fast.evaluation import baselines
from l2l_fast.evaluation.baselines.schedules import factor
from tests.test_baselines import OPTIONS, bowl, plain, slope, value

# Four steps, by hand.
FACTORS = {
    "constant": [1.0, 1.0, 1.0, 1.0],
    "cosine": [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)],
    "linear": [1.0, 0.75, 0.5, 0.25],
    "hold": [1.0, 1.0, 1.0, 0.5],
}


def test_values():
    assert tuple(FACTORS) == baselines.SCHEDULES
    for schedule, expected in FACTORS.items():
        assert [factor(schedule, step, 4) for step in range(4)] == pytest.approx(expected, rel=1e-12)
    assert [factor("hold", step, 5) for step in range(5)] == pytest.approx([1, 1, 1, 0.8, 0.4])
    assert [factor(schedule, 0, 1) for schedule in FACTORS] == [1.0] * 4


@pytest.mark.parametrize("horizon", [1, 2, 3, 7, 100, 101, 500])
@pytest.mark.parametrize("schedule", FACTORS)
def test_rates_fall_from_the_whole_and_every_step_moves(schedule, horizon):
    factors = [factor(schedule, step, horizon) for step in range(horizon)]
    assert factors[0] == 1.0 and factors == sorted(factors, reverse=True) and factors[-1] > 0
    if schedule == "cosine":
        expected = [math.cos(math.pi * step / (2 * horizon)) ** 2 for step in range(horizon)]
    elif schedule == "linear":
        expected = [(horizon - step) / horizon for step in range(horizon)]
    elif schedule == "hold":
        expected = [1.0 if 2 * step <= horizon else 2 * (horizon - step) / horizon for step in range(horizon)]
    else:
        expected = [1.0] * horizon
    assert factors == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", FACTORS)
@pytest.mark.parametrize("name, options", OPTIONS)
def test_every_step_has_its_own_rate(name, options, schedule):
    rates = [0.05 * each for each in FACTORS[schedule]]
    losses = baselines.run(bowl, name, 0.05, [0, 1], 4, options=options, schedule=schedule)
    expected = [value(x) for x in plain(name, rates, slope, 0.5, **options)]
    # The second task begins with the whole rate again.
    for row in losses:
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_a_constant_rate_is_the_default():
    one, other = (baselines.run(bowl, "sgd", 0.05, [0], 4, **given) for given in ({}, {"schedule": "constant"}))
    assert torch.equal(one, other)
