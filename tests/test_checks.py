"""Numbers in every form that users have them; what is kept is Python's own."""

from __future__ import annotations

import io
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import l2l_fast as l2l
from l2l_fast import baselines
from l2l_fast.kernels import checks
from l2l_fast.meta import MetaTrainer
from l2l_fast.problems.scaled import Scaled

INTS = [int, np.int8, np.int32, np.int64, np.uint16, np.array, torch.tensor]
FLOATS = [float, np.float16, np.float32, np.float64, np.longdouble, np.array, torch.tensor, Fraction, Decimal]
NO_NUMBERS = [True, np.True_, np.array(True), torch.tensor(True), "1", b"1", np.str_("1"), None, 1j, np.complex64(1),
              [1], np.ones(1), torch.ones(1), {}, object()]  # fmt: skip


@pytest.mark.parametrize("make", INTS)
def test_whole_numbers(make):
    number = checks.integer("n", make(8), 4, 64)
    assert number == 8 and type(number) is int
    number = checks.real("x", make(8))
    assert number == 8.0 and type(number) is float


@pytest.mark.parametrize("make", FLOATS)
def test_real_numbers(make):
    number = checks.real("x", make(0.5), 0.0, 1.0)
    assert number == 0.5 and type(number) is float
    with pytest.raises(TypeError, match="n: expected an int in 0..1, got"):
        checks.integer("n", make(0.5), 0, 1)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="n: expected an int >= 0, got"):
        checks.integer("n", value, 0)
    with pytest.raises(TypeError, match="x: expected a number, got"):
        checks.real("x", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), 10**400, -(10**400)])
def test_neither_nan_nor_infinity(value):
    with pytest.raises(ValueError, match="x: expected a finite number"):
        checks.real("x", value)


def test_ranges():
    assert checks.real("x", 1, 1, 1) == 1.0
    for bounds, words in (
        ({"above": 1}, "> 1"), ({"below": 1}, "< 1"), ({"low": 2}, ">= 2"), ({"high": 0}, "<= 0"),
        ({"low": 0, "below": 1}, ">= 0 and < 1"), ({"above": 1, "expected": "more"}, "more"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"x: expected .*{words}, got 1.0"):
            checks.real("x", 1, **bounds)
    for low, high, words in ((2, None, "an int >= 2"), (None, 0, "an int <= 0"), (2, 3, "2..3")):
        with pytest.raises(ValueError, match=f"n: expected {words}, got 1"):
            checks.integer("n", np.int64(1), low, high)


def test_flags_and_choices():
    assert checks.flag("f", np.True_) is True and checks.flag("f", torch.tensor(False)) is False
    for value in (1, "yes", None):
        with pytest.raises(TypeError, match="f: expected a bool, got"):
            checks.flag("f", value)
    assert type(checks.choice("c", np.str_("a"), ("a", "b"))) is str
    for value in ("d", 1, None, [1], {}):
        with pytest.raises(ValueError, match='c: expected "a" or "b", got'):
            checks.choice("c", value, ("a", "b"))


def plain(value):
    """Whether JSON and a pickle without code hold it as it is."""
    assert json.loads(json.dumps(value)) == value
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == value
    return True


@pytest.mark.parametrize("integer, real, text", [(np.int64, np.float32, np.str_), (np.array, np.array, str)])
def test_networks_keep_plain_numbers(tmp_path, integer, real, text):
    nets = [
        l2l.CoordinatewiseLSTM(integer(5), integer(1), text("identity"), real(4), real(0.5)),
        l2l.CoordinatewiseLSTM(integer(5), gac_cells=integer(2), extra_inputs=integer(0), num_outputs=integer(1)),
        l2l.NTMBFGS(integer(5), p=real(4), read_heads=integer(1), write_heads=integer(1), history=integer(2),
                    memory=text("low_rank"), add_read=np.True_),
    ]  # fmt: skip
    for net in nets:
        assert plain(net.options()) and plain(dict(net.config._asdict()))
        net.save(tmp_path / "x")
        assert l2l.load(tmp_path / "x").options() == net.options()
    cells, linear = nets[0].to_lstm_cells()
    again = l2l.CoordinatewiseLSTM.from_lstm_cells(
        cells, linear, text("identity"), real(4), real(0.5), extra_inputs=integer(0), num_outputs=integer(1)
    )
    assert again.options() == nets[0].options() and plain(again.options())
    for name, value in (("hidden_size", 8.0), ("p", np.float32("nan")), ("output_scale", np.True_), ("p", "5")):
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            l2l.CoordinatewiseLSTM(**{name: value})


def test_problems_keep_plain_numbers():
    made = [
        l2l.problems.Quadratic(np.int64(3), np.array(4), np.str_("ill_conditioned"), np.float32(0.5), np.float16(8)),
        l2l.problems.MNIST(np.array([3, 4]), np.str_("relu"), np.int8(5), init_std=(np.float32(0.25), np.float64(1))),
    ]
    made.append(Scaled(made[0], np.float32(0.5), (np.float32(-1), np.int64(1))))
    for problem in made:
        assert plain(problem.config())
        assert torch.equal(problem.sample(np.int64(3))(), problem.sample(3)())


def test_trainers_keep_plain_numbers(tmp_path):
    problem = l2l.problems.Quadratic(dim=2, batch=2)
    trainer = MetaTrainer(
        l2l.CoordinatewiseLSTM(), problem, np.int64(4), np.int64(2), np.float32(0.5), np.int64(3),
        clip_norm=np.float32(1), betas=(np.float32(0.5), np.float64(0.75)), decay_episodes=np.int32(3),
        decay_to=np.float32(0.5), validate_every=np.int64(1), validation_episodes=np.int64(1), patience=np.int64(2),
        second_derivatives=np.False_, coordinate_fraction=np.float32(1),
    )  # fmt: skip
    assert plain(trainer.settings())
    trainer.fit(np.int64(1), progress=False, checkpoint=tmp_path / "c")
    assert l2l.meta.evaluate(trainer.net, problem, np.arange(2), np.int64(3)).shape == (2, 4)
    for name, value in (("lr", np.float32("inf")), ("seed", 1.0), ("patience", np.float32(2)), ("betas", (True, 0))):
        with pytest.raises((TypeError, ValueError), match=name):
            MetaTrainer(l2l.CoordinatewiseLSTM(), problem, **{name: value})


def test_baselines_take_any_number():
    problem = l2l.problems.Quadratic(dim=2, batch=2)
    one, other = (baselines.run(problem, "adam", lr, [0], 3) for lr in (0.5, np.float32(0.5)))
    assert torch.equal(one, other)
    assert type(baselines.make_optimizer("sgd", problem.sample(0).parameters(), np.float32(1)).defaults["lr"]) is float
    for value in (True, "1", None):
        with pytest.raises(TypeError, match="lr must be a number"):
            baselines.run(problem, "adam", value, [0], 3)
