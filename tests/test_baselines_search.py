"""The search of a baseline: it finds known optima of rate, options and schedule, and says where there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from l2l_fast.evaluation import baselines
from l2l_fast.evaluation.baselines import searching
from l2l_fast.problems import MNIST, ModuleProblem, Quadratic
from tests.search_helpers import Bowl, hill, landscape, of_momentum, of_rate, of_schedule, parabola

PLAIN = {"schedules": ["constant"], "seeds": [0]}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exponents(rates) -> list[float]:
    return [math.log10(rate) for rate in rates]


# ---- rates ----


@pytest.mark.parametrize("curvature", [1e-4, 1e-2, 1.0, 1e3, 1e6])
def test_the_best_rate_is_interior_and_its_neighbours_were_tried(curvature):
    trials = []
    found = baselines.search(
        parabola(curvature), "sgd", 5, on_trial=lambda lr, loss: trials.append((lr, loss)), **PLAIN
    )
    # The rates go on beyond the sweep's where the best lies there.
    assert found.lr == pytest.approx(0.5 / curvature, rel=0.08)
    rates = list(found.final_losses)
    assert rates == sorted(rates) and found.final == found.final_losses[found.lr] == min(found.final_losses.values())
    at = rates.index(found.lr)
    around = exponents(rates[at - 1 : at + 2])
    assert around == pytest.approx([around[1] - 1 / 16, around[1], around[1] + 1 / 16])
    assert found.start == pytest.approx(curvature) and found.trials == len(trials)
    assert found.final_losses.items() <= dict(trials).items()
    assert baselines.tune(parabola(curvature), "sgd", 5, **PLAIN) == found.lr


@pytest.mark.parametrize("points", [1, 3, 4, 16, 25])
@pytest.mark.parametrize("exponent", [-1.25, -0.875, -0.6, 0.25, 1.375])
def test_the_rate_is_found_to_the_resolution_asked_for(points, exponent):
    found = baselines.search(parabola(0.5 * 10**-exponent), "sgd", 1, points_per_decade=points, **PLAIN)
    # One step of SGD with lr = 10**exponent is exact.
    losses = {key: (1 - 10 ** (key / points - exponent)) ** 2 for key in range(-9 * points, 5 * points)}
    assert math.log10(found.lr) * points == pytest.approx(min(losses, key=losses.__getitem__))


def test_the_sweep_is_the_whole_range():
    rates = []
    # All curves fall up to the largest rate of the sweep; the best is just beyond.
    baselines.search(
        of_rate(lambda e: 1 - hill(e, 2.1, 9.0)), "sgd", 1, on_trial=lambda lr, _: rates.append(lr), **PLAIN
    )
    sweep = [-6 + k / 2 for k in range(17)]
    assert exponents(rates[:17]) == pytest.approx(sweep)
    rates.clear()
    # Two in a row that diverge end it, a single one does not, nor those before the first that does not.
    wall = of_rate(lambda e: math.inf if e < -4 or abs(e + 2) < 0.1 or e > 0.1 else 1 - hill(e, -1, 3))
    found = baselines.search(wall, "sgd", 1, on_trial=lambda lr, _: rates.append(lr), **PLAIN)
    assert exponents(rates[:15]) == pytest.approx(sweep[:15]) and max(exponents(rates)) == pytest.approx(1.0)
    assert math.log10(found.lr) == pytest.approx(-1.0)


@pytest.mark.parametrize("shallow, deep", [(-2.0, 0.625), (-4.5, 1.5), (-1.0, -3.0), (1.0, -5.0)])
def test_a_second_lower_minimum_is_found(shallow, deep):
    """A plateau is a minimum at small rates: a search that stops at the first interior one never tries above."""
    two = of_rate(lambda e: 1 - 0.1 * hill(e, shallow, 0.6) - 0.8 * hill(e, deep, 0.6))
    found = baselines.search(two, "sgd", 1, **PLAIN)
    assert math.log10(found.lr) == pytest.approx(deep, abs=1 / 16) and found.final == pytest.approx(0.2, abs=0.02)


def test_the_plateau_of_two_layer_mnist():
    """At rates below 1 SGD ends at ln 10: 2.3025; the paper's curve ends at 1.783, with a rate of 4.2 or so."""
    problem = MNIST(data="mnist-10k-embedded", hidden=(20, 20))
    found = baselines.search(
        problem, "sgd", 100, seeds=range(2), schedules=["constant"], points_per_decade=4, sweep_tasks=1
    )
    assert 2 < found.lr < 8 and found.final < 2.0 < 2.29 < found.start
    plateau = baselines.run(problem, "sgd", 0.0075, range(2), 100)
    assert baselines.final_losses(plateau).mean().item() > 2.29


def test_where_every_run_diverges_it_goes_down():
    found = baselines.search(parabola(1e8), "sgd", 80, **PLAIN)
    assert found.lr == pytest.approx(0.5e-8, rel=0.08)


@pytest.mark.parametrize(
    "problem, message",
    [
        (
            of_rate(lambda e: 1 - 0.1 * e, "slope"),
            "sgd on slope between 1e-9 and 1e5: .* -?[0-9.]+, is at the edge 1000",
        ),
        (of_rate(lambda e: 0.5 + 0.01 * e, "up"), "sgd on up .*, 0.41, is at the edge 1e-09"),
        (of_rate(lambda e: 0.5, "flat"), "sgd on flat .*, 0.5, is at the edge 1e-09"),
        (of_rate(lambda e: math.inf, "wild"), "sgd on wild .*, inf, is at the edge 1e-09"),
    ],
)
@pytest.mark.parametrize("points", [1, 3, 16])
def test_an_edge_of_the_rates_is_an_error(problem, message, points):
    with pytest.raises(RuntimeError, match=f"no best learning rate for {message}"):
        baselines.search(problem, "sgd", 1, points_per_decade=points, **PLAIN)


@pytest.mark.parametrize("lowest", [1.0, 1.5, 1.0 + 1e-9])
def test_what_does_not_improve_on_theta_0_is_an_error(lowest):
    worse = of_rate(lambda e: lowest + e * e, "uphill")
    with pytest.raises(RuntimeError, match=r"no setting of sgd on uphill improves on theta_0: .* f\(theta_0\) 1$"):
        baselines.search(worse, "sgd", 1, **PLAIN)
    found = baselines.search(of_rate(lambda e: 1.0 - 1e-9 + e * e), "sgd", 1, **PLAIN)
    assert found.final < found.start == 1.0


# ---- options ----


@pytest.mark.parametrize("best", [0.2, 0.5, 0.7, 0.85, 0.9, 0.97, 0.99, 0.995])
def test_the_best_momentum_is_found_along_the_ladder(best):
    problem = of_momentum(lambda e, m: 1 - hill(e, -m, 2.0) * hill(m, best, 0.5))
    found = baselines.search(problem, "momentum", 2, **PLAIN)
    assert found.options == {"momentum": best} and math.log10(found.lr) == pytest.approx(-best, abs=1 / 16)
    assert found.setup == baselines.Setup(found.lr, {"momentum": best}, "constant")


def test_the_rate_of_every_momentum_is_searched_anew():
    """The best rate is a decade and a half lower at the best momentum, as theory has it: lr ~ (1 - momentum)^2."""
    ridge = of_momentum(lambda e, m: 1 - hill(e, 2 * math.log10(1 - m), 0.4) * hill(m, 0.98, 0.05))
    found = baselines.search(ridge, "momentum", 2, **PLAIN)
    assert found.options == {"momentum": 0.98} and math.log10(found.lr) == pytest.approx(-3.4, abs=0.04)


def test_a_second_lower_minimum_of_another_momentum_is_found():
    """A decade away from where the default is best, and behind a ridge."""

    def final(e: float, m: float) -> float:
        return 1 - 0.3 * hill(e, 0, 0.5) if m < 0.93 else 1 - 0.2 * hill(e, 0, 0.2) - 0.8 * hill(e, -1.25, 0.5)

    found = baselines.search(of_momentum(final), "momentum", 2, **PLAIN)
    assert math.log10(found.lr) == pytest.approx(-1.25) and found.options["momentum"] >= 0.93


def test_an_edge_of_an_option_is_an_error_unless_nothing_is_beyond():
    up = of_momentum(lambda e, m: 1 - hill(e, 0.0, 2.0) * m / 2, 51)
    with pytest.raises(RuntimeError, match=r"no best momentum for momentum on landscape: .* is at the edge 0.998"):
        baselines.search(up, "momentum", 51, **PLAIN)
    # Over few steps what is beyond is as good as the same.
    short = of_momentum(lambda e, m: 1 - hill(e, 0.0, 2.0) * m / 2, 49)
    assert baselines.search(short, "momentum", 49, **PLAIN).options == {"momentum": 0.998}
    # With less momentum heavy ball turns into SGD.
    down = of_momentum(lambda e, m: 1 - hill(e, 0.0, 2.0) * (1 - m) / 2)
    assert baselines.search(down, "momentum", 2, **PLAIN).options == {"momentum": 0.2}
    # A momentum that was fixed is nobody's edge.
    found = baselines.search(up, "momentum", 51, options={"momentum": 0.998}, **PLAIN)
    assert found.options == {"momentum": 0.998}


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adam"])
def test_an_edge_of_any_option_is_noticed(name, closed, monkeypatch):
    """The check itself, for every option of a rule and both ends."""
    options = baselines.RULES[name].options
    if closed:
        options = tuple(replace(option, open_below=False, open_above=False) for option in options)
    rule = replace(baselines.RULES[name], options=options)
    monkeypatch.setitem(baselines.RULES, name, rule)
    ok = {option.name: option.values[len(option.values) // 2] for option in rule.options}
    trials = searching.Trials(parabola(0.5), name, 2000, [0], "validation")
    searcher = searching._Searcher(trials, None, ["constant"], 16, 1, None)
    trial = searching.Trial({}, "constant", 1.0, 1, 0.1, 1.0)
    monkeypatch.setattr(searcher, "trial", lambda *_: trial)
    assert searcher._checked((tuple(ok.values()), "constant"), 0).options == ok
    for option in rule.options:
        for end, is_open in ((0, option.open_below), (-1, option.open_above)):
            cell = (tuple({**ok, option.name: option.values[end]}.values()), "constant")
            if is_open:
                assert searcher._checked(cell, 0).options[option.name] == option.values[end]
                continue
            with pytest.raises(RuntimeError, match=f"no best {option.name} for {name} .* edge {option.values[end]:g}"):
                searcher._checked(cell, 0)
    for key in (-144, 80):
        with pytest.raises(RuntimeError, match="no best learning rate"):
            searcher._checked((tuple(ok.values()), "constant"), key)
    for key in (-143, 79):
        searcher._checked((tuple(ok.values()), "constant"), key)


def test_heavy_ball_on_ill_conditioned_quadratics():
    """The case that Nesterov's momentum at 0.9 alone had hidden: 2e-4, where SGD ends above 1."""
    problem = Quadratic(batch=64, family="ill_conditioned")
    options = {"seeds": range(2), "schedules": ["constant"], "points_per_decade": 8, "sweep_tasks": 1}
    ball = baselines.search(problem, "momentum", 100, **options)
    assert 0.85 <= ball.options["momentum"] <= 0.93 and 1 < ball.lr < 2.4 and ball.final < 1e-3
    sgd = baselines.search(problem, "sgd", 100, **options)
    assert sgd.final > 1000 * ball.final
    fixed = baselines.search(problem, "nag", 100, options={}, **options)
    assert fixed.options == {"momentum": 0.9} and fixed.final > 20 * ball.final


# ---- schedules ----


@pytest.mark.parametrize("best, factor", {"constant": 1.0, "cosine": 0.146, "linear": 0.25, "hold": 0.5}.items())
def test_the_best_schedule_is_found(best, factor):
    # Its best rate is not that of the others.
    problem = of_schedule(lambda e, f: 1 - hill(e, 1.5 if abs(f - factor) < 0.01 else 0.0, 1.0) * hill(f, factor))
    found = baselines.search(problem, "sgd", 4, seeds=[0])
    assert found.schedule == best and math.log10(found.lr) == pytest.approx(1.5)
    others = [each for each in baselines.SCHEDULES if each != best]
    assert baselines.search(problem, "sgd", 4, seeds=[0], schedules=others).schedule in others
    assert baselines.search(problem, "sgd", 4, seeds=[0], schedules=best).schedule == best


# ---- tasks ----


def drawn(seed: int) -> float:
    """``draw`` of that validation task."""
    return landscape((), lambda line: 0.0).sample(seed, "validation").module.draw


def test_the_last_stage_is_decided_on_all_tasks():
    """Every task has a best rate of its own; the first ones' is elsewhere than that of all."""
    problem = landscape((-1.0,), lambda line: (math.log10(line.seen[1]) - line.draw) ** 2 / 4)
    seeds = sorted(range(6), key=drawn, reverse=True)
    draws = [drawn(seed) for seed in seeds]
    best = round(16 * sum(draws) / 6) / 16
    assert abs(sum(draws[:2]) / 2 - best) > 0.2
    tasks = []
    for few in (1, 2, 6, 9):
        found = baselines.search(problem, "sgd", 1, seeds=seeds, sweep_tasks=few)
        assert math.log10(found.lr) == pytest.approx(best)
        assert found.final == pytest.approx(sum((best - d) ** 2 / 4 for d in draws) / 6)
        tasks.append(found.trials)
    assert tasks[2] == tasks[3]


def test_the_mean_over_tasks_decides():
    problem = landscape((-1.0,), lambda line: (math.log10(line.seen[1]) - 3 * line.draw**3) ** 2 / 8)
    found = baselines.search(problem, "sgd", 1, seeds=range(5))
    for lr, mean in found.final_losses.items():
        final = baselines.run(problem, "sgd", lr, range(5), 1, split="validation", schedule=found.schedule)[:, -1]
        assert mean == pytest.approx(final.mean().item()) and mean != pytest.approx(final.median().item())


def test_a_single_diverged_task_spoils_a_rate():

    def final(line) -> float:
        return math.inf if line.draw > 0.7 and line.seen[1] > 2 else 1 - hill(math.log10(line.seen[1]), 1)

    problem = landscape((-1.0,), final)
    seeds = sorted(range(9), key=drawn)
    assert drawn(seeds[1]) < 0.7 < drawn(seeds[-1])
    found = baselines.search(problem, "sgd", 1, seeds=seeds)
    assert found.lr == pytest.approx(10 ** (4 / 16))  # the last below 2
    assert found.final_losses[max(found.final_losses)] == math.inf


def test_final_is_what_is_minimised():
    """Not the sum, nor the very last loss alone: two losses make the final one of 40 steps."""
    found = baselines.search(Quadratic(dim=2, batch=4), "sgd", 40, seeds=range(3))
    losses = baselines.run(
        Quadratic(dim=2, batch=4), "sgd", found.lr, range(3), 40, split="validation", schedule=found.schedule
    )
    assert found.final == pytest.approx(losses[:, -2:].mean().item(), rel=1e-12)
    assert found.start == pytest.approx(losses[:, 0].mean().item(), rel=1e-12)


def test_what_a_loss_was_on_the_way_does_not_count():
    # x after two steps is (1 - 2 lr)^2, equal to 0.81 at lr = 0.05, where x^2 has hardly fallen.
    def loss(module, generator):
        module.calls = getattr(module, "calls", 0) + 1
        final = (module.x.detach() - 0.81).abs().sum() if module.calls == 3 else 0.0
        return module.x.square().sum() + 10 * final

    problem = ModuleProblem(lambda generator: Bowl(1.0), loss)
    rate = baselines.tune(problem, "sgd", 2, points_per_decade=20, **PLAIN)
    assert rate == pytest.approx(0.05, rel=0.04)


# ---- everything together ----


@pytest.mark.parametrize("name", ["momentum", "rmsprop", "adamw"])
def test_a_search_is_repeatable_and_no_worse_than_its_defaults(name):
    problem, horizon = Quadratic(dim=2, batch=4), 5
    options = {"seeds": range(3), "points_per_decade": 4, "sweep_tasks": 1}
    found = baselines.search(problem, name, horizon, **options)
    assert found == baselines.search(problem, name, horizon, **options)
    assert found.name == name and list(found.options) == list(baselines.RULES[name].defaults())
    setup = {"options": found.options, "schedule": found.schedule, "split": "validation"}
    losses = baselines.run(problem, name, found.lr, range(3), horizon, **setup)
    assert found.final == pytest.approx(baselines.final_losses(losses).mean().item(), rel=1e-12)
    plain = baselines.search(problem, name, horizon, **options | {"options": {}, "schedules": ["constant"]})
    assert found.final <= plain.final * 1.02 and plain.options == baselines.RULES[name].defaults()
    assert plain.schedule == "constant" and plain.trials < found.trials


def test_a_comparison_runs_what_was_found():
    problem = Quadratic(dim=3, batch=4)
    options = {"points_per_decade": 4}
    results = baselines.compare(problem, 8, [4, 5], names=["nag", "sgd"], tuning_seeds=range(2), search_options=options)
    assert list(results) == ["nag", "sgd"]
    for name, each in results.items():
        assert each.search == baselines.search(problem, name, 8, seeds=range(2), **options)
        setup = {"options": each.search.options, "schedule": each.search.schedule}
        assert torch.equal(each.losses, baselines.run(problem, name, each.search.lr, [4, 5], 8, **setup))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"schedules": []}, ValueError, "schedules must be one of"),
        ({"schedules": ["constant", "step"]}, ValueError, "schedules must be one of .*got 'step'"),
        ({"schedules": None}, ValueError, "schedules must be one of"),
        ({"sweep_tasks": 0}, ValueError, "sweep_tasks must be a positive integer"),
        ({"points_per_decade": 0}, ValueError, "points_per_decade must be a positive integer"),
        ({"options": {"beta1": 0.9}}, ValueError, "options: momentum has .*got 'beta1'"),
        ({"options": {"momentum": 2}}, ValueError, "options: momentum out of range"),
        ({"split": "all"}, ValueError, "split must be one of"),
        ({"cache": 5}, TypeError, "expected str, bytes or os.PathLike"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        baselines.search(of_momentum(lambda e, m: pytest.fail("it was run")), "momentum", 2, **options)
