"""Baselines: update rules against plain Python, the known results on random quadratics, what counts as final."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from l2l_fast.evaluation import baselines
from l2l_fast.problems import ModuleProblem, Quadratic
from tests.search_helpers import Bowl


@pytest.fixture(autouse=True)
def one_thread():
    # Many small parallel regions stall where other processes keep the cores busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torch7(name: str, lr: float, gradient: Callable[[float], float], start: float, steps: int) -> list[float]:
    """Torch7's ``optim`` rules on one number, at its defaults: the points at which f is reported."""
    x, points = start, []
    velocity = mean = square = 0.0
    for t in range(1, steps + 1):
        look_ahead = x + 0.9 * velocity if name == "nag" else x
        points.append(look_ahead)
        g = gradient(look_ahead)
        if name == "sgd":
            x -= lr * g
        elif name == "nag":
            velocity = 0.9 * velocity - lr * g
            x += velocity
        elif name == "rmsprop":
            square = 0.99 * square + 0.01 * g * g
            x -= lr * g / (math.sqrt(square) + 1e-8)
        else:
            mean = 0.9 * mean + 0.1 * g
            square = 0.999 * square + 0.001 * g * g
            x -= lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * mean / (math.sqrt(square) + 1e-8)
    return points


def plain(
    name: str, rates: list[float], gradient: Callable[[float], float], start: float, **options: float
) -> list[float]:
    """The rules with every option and a rate for each step: the points before each, and the one after the last."""
    x, points = start, [start]
    velocity = mean = square = 0.0
    momentum = options.get("momentum", 0.0)
    for t, lr in enumerate(rates, start=1):
        g = gradient(x)
        if name in ("sgd", "momentum"):
            velocity = momentum * velocity + g
            x -= lr * velocity
        elif name == "nag":
            velocity = momentum * velocity + g
            x -= lr * (g + momentum * velocity)
        elif name == "rmsprop":
            square = options["alpha"] * square + (1 - options["alpha"]) * g * g
            velocity = momentum * velocity + g / (math.sqrt(square) + 1e-8)
            x -= lr * velocity
        else:
            beta1, beta2 = options["beta1"], options["beta2"]
            x *= 1 - lr * options.get("weight_decay", 0.0)
            mean = beta1 * mean + (1 - beta1) * g
            square = beta2 * square + (1 - beta2) * g * g
            x -= lr * (mean / (1 - beta1**t)) / (math.sqrt(square / (1 - beta2**t)) + 1e-8)
        points.append(x)
    return points


def value(x: float) -> float:
    return (x - 3) ** 2 + math.sin(x)


def slope(x: float) -> float:
    return 2 * (x - 3) + math.cos(x)


def bowl_loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
    return ((module.x - 3) ** 2 + torch.sin(module.x)).sum()


bowl = ModuleProblem(lambda generator: Bowl(), bowl_loss, name="bowl")

OPTIONS = [
    ("sgd", {}),
    ("momentum", {"momentum": 0.9}),
    ("momentum", {"momentum": 0.3}),
    ("nag", {"momentum": 0.9}),
    ("nag", {"momentum": 0.97}),
    ("rmsprop", {"alpha": 0.99, "momentum": 0.0}),
    ("rmsprop", {"alpha": 0.9, "momentum": 0.8}),
    ("rmsprop", {"alpha": 0.0, "momentum": 0.5}),
    ("adam", {"beta1": 0.9, "beta2": 0.999}),
    ("adam", {"beta1": 0.0, "beta2": 0.5}),
    ("adam", {"beta1": 0.98, "beta2": 0.0}),
    ("adamw", {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01}),
    ("adamw", {"beta1": 0.8, "beta2": 0.95, "weight_decay": 3.0}),
    ("adamw", {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.0}),
]


@pytest.mark.parametrize("name", ["sgd", "nag", "rmsprop", "adam"])
def test_the_defaults_are_those_of_torch7(name):
    losses = baselines.run(bowl, name, 0.05, [0], 29)
    expected = torch.tensor([value(x) for x in torch7(name, 0.05, slope, 0.5, 30)], dtype=torch.float64)
    assert losses.shape == (1, 30)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name, options", OPTIONS)
def test_update_rules(name, options):
    losses = baselines.run(bowl, name, 0.05, [0], 29, options=options)
    expected = [value(x) for x in plain(name, [0.05] * 29, slope, 0.5, **options)]
    torch.testing.assert_close(losses[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_defaults():
    every = {name: rule.defaults() for name, rule in baselines.RULES.items()}
    assert every == {
        "sgd": {},
        "momentum": {"momentum": 0.9},
        "nag": {"momentum": 0.9},
        "rmsprop": {"alpha": 0.99, "momentum": 0.0},
        "adam": {"beta1": 0.9, "beta2": 0.999},
        "adamw": {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01},
        "muon": {},
    }
    assert tuple(every) == (*baselines.NAMES, "muon")  # no part of the paper's comparisons
    for name, defaults in every.items():
        one, other = (baselines.run(bowl, name, 0.05, [0], 5, options=given) for given in (None, defaults))
        assert torch.equal(one, other)
        for key in defaults:  # the others keep their defaults
            part = baselines.run(bowl, name, 0.05, [0], 5, options={key: 0.5})
            assert torch.equal(part, baselines.run(bowl, name, 0.05, [0], 5, options={**defaults, key: 0.5}))
            assert not torch.equal(part, one)


def test_what_a_search_may_try():
    for name, rule in baselines.RULES.items():
        for option in rule.options:
            assert list(option.values) == sorted(set(option.values)), (name, option.name)
            assert {option.default, *option.first} <= set(option.values), (name, option.name)


# The published curves and their reproductions; a single task holds many problems, so that the means are sharp.
@pytest.mark.parametrize(
    ("name", "lr", "low", "high"),
    [
        ("sgd", 0.0165, 0.212, 0.221),
        ("nag", 0.0145, 0.079, 0.086),
        ("nag", 0.0165, 0.078, 0.083),
    ],
)
def test_uniform_quadratics_end_where_the_paper_does(name, lr, low, high):
    losses = baselines.run(Quadratic(batch=8192), name, lr, [0], 100)
    assert losses[0, 0].item() == pytest.approx(3.33, abs=0.05)
    assert low < losses[0, 100].item() < high


@pytest.mark.parametrize(
    ("problem", "name", "lr", "momentum", "low", "high"),
    [
        (Quadratic(), "momentum", 0.049, 0.93, 0.046, 0.051),
        (Quadratic(), "nag", 0.016, 0.97, 0.056, 0.062),
        (Quadratic(family="ill_conditioned"), "momentum", 1.54, 0.9, 1.7e-4, 2.4e-4),
    ],
)
def test_tuned_momentum_ends_where_an_independent_audit_found(problem, name, lr, momentum, low, high):
    losses = baselines.run(problem, name, lr, range(20), 100, options={"momentum": momentum})
    assert low < losses[:, 100].mean().item() < high


def test_gaussian_quadratics_sum_to_what_reproductions_print():
    losses = baselines.run(Quadratic(batch=16384, family="gaussian"), "sgd", 0.01, [0], 100)
    # 184 to 186, with a standard error of 1.2 on either side.
    assert losses[0, :100].sum().item() == pytest.approx(185.0, abs=3.0)


def test_tuned_quadratics_reach_the_known_optima():
    """With the paper's way of tuning: the rate alone, constant."""
    problem, names = Quadratic(batch=1024), ("sgd", "nag", "rmsprop", "adam")
    options = {"options": {}, "schedules": ["constant"], "points_per_decade": 8}
    results = baselines.compare(problem, 100, range(2), names=names, tuning_seeds=range(1), search_options=options)
    # Best learning rate and final loss of each optimizer, from an independent simulation of 4,000 problems.
    known = {"sgd": (0.0255, 0.178), "nag": (0.0184, 0.077), "rmsprop": (0.0217, 0.160), "adam": (0.212, 0.094)}
    assert tuple(results) == names == tuple(known)
    for name, (lr, final) in known.items():
        found = results[name]
        assert found.losses.shape == (2, 101)
        assert found.search.lr == pytest.approx(lr, rel=0.3), name
        assert found.losses[:, -1].mean().item() == pytest.approx(final, rel=0.08), name


def test_divergence_counts_as_infinite():
    losses = baselines.run(Quadratic(batch=4), "sgd", 1e6, [0, 1], 100)
    assert torch.isfinite(losses[:, :3]).all()
    assert torch.isinf(losses[:, -1]).all()
    assert not torch.isnan(losses).any()
    poisoned = ModuleProblem(lambda generator: Bowl(), lambda module, generator: (module.x * math.nan).sum())
    assert torch.equal(baselines.run(poisoned, "adam", 0.1, [0], 2), torch.full((1, 3), math.inf, dtype=torch.float64))


def test_losses_are_per_problem_and_start_at_theta_0():
    problem = Quadratic(batch=7)
    losses = baselines.run(problem, "sgd", 0.01, [3, 4], 2, split="validation")
    assert losses[1, 0].item() == pytest.approx(problem.sample(4, "validation")().item() / 7)
    assert losses[1, 1] < losses[1, 0]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("lbfgs", 0.1, [0], 5), {}, ValueError, r"name must be one of \('sgd', 'momentum', 'nag', .*, got 'lbfgs'"),
        (("sgd", 0.0, [0], 5), {}, ValueError, "lr must be positive and finite, got 0.0"),
        (("sgd", math.nan, [0], 5), {}, ValueError, "lr must be positive and finite, got nan"),
        (("sgd", 0.1, [0], 0), {}, ValueError, "horizon must be a positive integer, got 0"),
        (("sgd", 0.1, [0], 2.5), {}, TypeError, "horizon must be a positive integer, got 2.5"),
        (("sgd", 0.1, [], 5), {}, ValueError, "seeds must name at least one task"),
        (("sgd", 0.1, [0], 5), {"schedule": "step"}, ValueError, "schedule must be one of .*got 'step'"),
        (("sgd", 0.1, [0], 5), {"options": {"momentum": 0.9}}, ValueError, "options: sgd has none, got 'momentum'"),
        (("adam", 0.1, [0], 5), {"options": {"betas": 0}}, ValueError, r"adam has \['beta1', 'beta2'\], got 'betas'"),
        (("nag", 0.1, [0], 5), {"options": {"momentum": 1.0}}, ValueError, "options: momentum out of range, got 1.0"),
        (("nag", 0.1, [0], 5), {"options": {"momentum": -0.1}}, ValueError, "options: momentum out of range"),
        (("nag", 0.1, [0], 5), {"options": {"momentum": math.nan}}, ValueError, "options: momentum out of range"),
        (("adamw", 0.1, [0], 5), {"options": {"weight_decay": -1}}, ValueError, "options: weight_decay out of range"),
        (("adamw", 0.1, [0], 5), {"options": {"weight_decay": math.inf}}, ValueError, "weight_decay out of range"),
        (("nag", 0.1, [0], 5), {"options": {"momentum": "high"}}, TypeError, "momentum must be a number, got 'high'"),
        (("nag", 0.1, [0], 5), {"options": [0.9]}, TypeError, "options: expected a mapping"),
    ],
)
def test_arguments_are_checked(arguments, options, error, message):
    problem = ModuleProblem(lambda generator: pytest.fail("a task was made"), bowl_loss)
    with pytest.raises(error, match=message):
        baselines.run(problem if options else bowl, *arguments, **options)


def test_compare_refuses_an_unknown_name_before_any_work():
    problem = ModuleProblem(lambda generator: pytest.fail("a task was made"), bowl_loss)
    with pytest.raises(ValueError, match="got 'lbfgs'"):
        baselines.compare(problem, 5, [0], names=["sgd", "lbfgs"])
    with pytest.raises(ValueError, match="names: expected at least one"):
        baselines.compare(problem, 5, [0], names=[])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_after_a_loss_that_is_not_finite_all_count_as_infinite(bad):
    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        module.calls = getattr(module, "calls", 0) + 1
        return module.x.square().sum() + (bad if module.calls == 3 else 0.0)

    losses = baselines.run(ModuleProblem(lambda generator: Bowl(), loss), "sgd", 0.1, [0], 4)
    assert losses[0, :2].isfinite().all() and losses[0, 2:].isinf().all()


@pytest.mark.parametrize(
    "horizon, window", {1: 1, 8: 1, 20: 1, 29: 1, 31: 2, 40: 2, 100: 5, 500: 25, 5000: 250}.items()
)
def test_final_is_the_mean_of_the_last_twentieth(horizon, window):
    assert baselines.final_window(horizon) == window
    losses = torch.arange(2.0 * (horizon + 1), dtype=torch.float64).view(2, -1).square()
    expected = [sum(row[-window:]) / window for row in losses.tolist()]
    assert baselines.final_losses(losses).tolist() == pytest.approx(expected, rel=1e-14)
    losses[1, -1] = math.inf
    assert baselines.final_losses(losses).tolist() == [pytest.approx(expected[0]), math.inf]


def test_tasks_are_shown_at_their_end_unless_they_diverged():
    ends = []
    problem = Quadratic(dim=3, batch=4)
    losses = baselines.run(
        problem, "sgd", 0.1, [3, 1], 5, on_end=lambda task: ends.append((task.origin, task().item()))
    )
    assert [value for _, value in ends] == pytest.approx((4 * losses[:, -1]).tolist())
    assert "task 3 of" in ends[0][0] and "task 1 of" in ends[1][0]
    calls = []

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        calls.append(1)
        return module.x.square().sum() * (math.inf if len(calls) == 6 else 1.0)  # the end of the first task

    ends.clear()
    losses = baselines.run(ModuleProblem(lambda generator: Bowl(), loss), "sgd", 0.1, [7, 8], 5, on_end=ends.append)
    assert losses[:, -1].isinf().tolist() == [True, False] and len(ends) == 1 and "task 8 of" in ends[0].origin


def test_settings_in_words():
    assert baselines.Setup(0.12345).describe() == "lr 0.123"
    setup = baselines.Setup(1e-4, {"beta1": 0.0, "weight_decay": 0.01}, "cosine")
    assert setup.describe() == "lr 0.0001, beta1 0, weight decay 0.01, cosine"
