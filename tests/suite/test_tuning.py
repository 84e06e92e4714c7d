"""The search for rates, with a formula in the place of training: it finds the best, widens, and keeps seeds apart."""

from __future__ import annotations

import pytest

from l2l_fast.evaluation.suite.contenders import Contender
from l2l_fast.evaluation.suite.keeping import Keeper, MissingRun
from l2l_fast.evaluation.suite.networks import NETWORKS, TUNING_SEED, choose, seeds
from l2l_fast.evaluation.suite.outcome import TUNED, measure
from l2l_fast.evaluation.suite.store import Store
from l2l_fast.evaluation.suite.tuning import STAGES, Baselines, rate
from tests.suite.helpers import formula

__all__ = ["formula"]
NETWORK = NETWORKS["softmax"]


def baselines(path=None, **options):
    return Baselines(Keeper(Store(path), **options))


def test_rates_are_half_decades():
    assert [rate(k) for k in (-10, -9, -6, -5, 0, 1)] == [1e-5, 3.16e-5, 1e-3, 3.16e-3, 1.0, 3.16]


def test_adam_is_swept_and_the_best_rate_found(formula):
    found = baselines().search(NETWORK, "adam", "constant", 1000)
    assert found.setting.lr == 3.16e-3 and not found.edge and len(found.tried) == 9
    assert min(found.tried) == 1e-5 and max(found.tried) == 0.1
    assert {run[4] for run in formula} == {TUNING_SEED} and all(run[6] for run in formula)


@pytest.mark.parametrize("best, expected", [(-7.0, 1e-7), (-5.5, 3.16e-6), (0.5, 3.16)])
def test_beyond_the_ends_of_a_sweep(formula, best, expected):
    from tests.suite import helpers

    helpers.formula.best = best
    found = baselines().search(NETWORK, "adam", "constant", 1000)
    assert found.setting.lr == expected
    assert found.edge == (best == -7.0)  # no rate below is ever tried


def test_adamw_and_long_runs_begin_where_a_search_has_ended(formula):
    made = baselines()
    made.search(NETWORK, "adam", "cosine", 1000)
    formula.clear()
    made.search(NETWORK, "adamw", "cosine", 1000)
    assert sorted(run[2] for run in formula) == [1e-3, 3.16e-3, 1e-2]
    formula.clear()
    # The best of 10,000 steps is two half decades lower: it walks there and tries one more.
    found = made.search(NETWORK, "adam", "cosine", 10_000)
    assert found.setting.lr == 3.16e-4 and not found.edge
    assert sorted(run[2] for run in formula) == [1e-4, 3.16e-4, 1e-3, 3.16e-3]
    assert {run[5] for run in formula} == {10_000}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_muon_begins_where_adam_ended_with_that_schedule(formula, schedule):
    made = baselines()
    assert made.search(NETWORK, "adam", schedule, 1000).setting.lr == 3.16e-3
    formula.clear()
    from tests.suite import helpers

    # Muon's best is two half decades higher: it walks there, down from the beginning first, and tries one more.
    helpers.formula.best = -1.5
    found = made.search(NETWORK, "muon", schedule, 1000)
    assert found.setting.lr == 3.16e-2 and not found.edge
    assert [run[1:4] for run in formula] == [
        ("muon", lr, schedule) for lr in (3.16e-3, 1e-3, 1e-2, 3.16e-2, 0.1)
    ]  # fmt: skip


def test_tuning_and_testing_share_no_seed(formula):
    assert TUNING_SEED not in seeds(1000)
    made = baselines()
    for _ in made.everything([NETWORK], [1000], seeds(3)):
        pass
    # Runs that may be given up are those of the tuning seed, all others are of the test seeds.
    assert {run[4] for run in formula if run[6]} == {TUNING_SEED}
    assert {run[4] for run in formula if not run[6]} == set(seeds(3))
    assert len({run[:6] for run in formula}) == len(formula)
    tested = {(run[1], run[3], run[2]) for run in formula if not run[6]}
    assert tested == {*((rule, schedule, 3.16e-3) for rule, schedule in STAGES), ("adam", "constant", 1e-3)}


def test_what_matters_most_is_measured_first(formula):
    order = [found[:3] for found in baselines().everything(choose(["softmax", "conv"]), [10_000, 1000], seeds(1))]
    assert order[:2] == [(1000, "adam", "constant")] * 2 and order[16:18] == [(10_000, "adam", "constant")] * 2
    assert order[12:16] == [(1000, "muon", "cosine")] * 2 + [(1000, "muon", "constant")] * 2


def test_a_stopped_search_goes_on(formula, tmp_path):
    path = tmp_path / "baselines.jsonl"
    list(baselines().everything([NETWORK], [1000], seeds(2)))
    alone = list(formula)
    formula.clear()

    class Stopped(Exception):
        pass

    def stop(key, run):
        if len(formula) == 20:
            raise Stopped

    with pytest.raises(Stopped):
        list(baselines(path, on_run=stop).everything([NETWORK], [1000], seeds(2)))
    list(baselines(path).everything([NETWORK], [1000], seeds(2)))
    # The run in which it was stopped was not kept.
    assert formula[:19] + formula[20:] == alone and formula[19] == formula[20]
    formula.clear()
    list(baselines(path).everything([NETWORK], [1000], seeds(2)))
    assert not formula


def test_without_baselines_nothing_is_run(formula, tmp_path):
    frozen = baselines(frozen=True)
    mine = Contender("mine", lambda parameters, steps: None, identity="mine")
    with pytest.raises(MissingRun, match="softmax on mnist-10k-embedded, 1,000 steps"):
        measure(mine, [NETWORK], 1000, seeds(3), frozen, Keeper())
    assert not formula


def test_a_contender_beside_what_is_there(formula, tmp_path):
    path = tmp_path / "baselines.jsonl"
    made = baselines(path)
    made.tested(NETWORK, "adam", "constant", 1000, seeds(3))
    made.usual(NETWORK, 1000, seeds(3))
    formula.clear()
    mine = Contender("mine", lambda parameters, steps: None, identity="mine")
    keeper = Keeper(Store(tmp_path / "contenders.jsonl"))
    found = measure(mine, [NETWORK], 1000, seeds(3), baselines(path, frozen=True), keeper)
    assert [run[4] for run in formula] == list(seeds(3)) and not any(run[6] for run in formula)
    assert found.missing == [f"{rule} {schedule}" for rule, schedule in STAGES[1:]]
    assert found.rows["softmax"].baselines[TUNED].label == "Adam 0.00316"
    again = measure(mine, [NETWORK], 1000, seeds(3), baselines(path, frozen=True), keeper)
    assert len(formula) == 3 and again.to_json() == found.to_json()
    # Nameless optimizers are not kept: the next function of that name is another one.
    nameless = Contender("mine", mine.make)
    for _ in range(2):
        measure(nameless, [NETWORK], 1000, seeds(1), baselines(path, frozen=True), keeper)
    assert len(formula) == 5
