"""Which tasks every measurement sees: all ``sample(seed, split)`` are recorded and compared with what is documented."""

from __future__ import annotations

import math
from itertools import product

import pytest

import l2l_fast as l2l
from l2l_fast.evaluation import baselines, experiments
from l2l_fast.evaluation import comparison as comparisons
from l2l_fast.evaluation.experiments import measuring
from l2l_fast.evaluation.experiments import running as runs
from l2l_fast.meta.protocol import episode_seed
from l2l_fast.problems import sealed
from tests.helpers import random_network, recorded_samples
from tests.test_experiments import small

PROBLEM = l2l.problems.Quadratic(dim=2, batch=2)


@pytest.fixture
def calls(monkeypatch):
    return recorded_samples(monkeypatch)


def tasks(calls):
    return [call[:2] for call in calls]


def of(seeds, split):
    return [(seed, split) for seed in seeds]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_runs_and_evaluations(calls, split):
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.01)
    baselines.run(PROBLEM, "sgd", 0.1, [3, 9, 4], 2, split=split)
    l2l.meta.evaluate(net, PROBLEM, [3, 9, 4], 2, split=split)
    assert tasks(calls) == 2 * of([3, 9, 4], split)


@pytest.mark.parametrize("split", ["validation", "train"])
def test_a_search_sees_the_same_tasks_at_every_rate(calls, split):
    found = baselines.search(PROBLEM, "sgd", 2, seeds=[5, 8], split=split, sweep_tasks=9)
    assert tasks(calls) == found.trials * of([5, 8], split)


def test_a_search_sees_the_first_tasks_until_its_last_stage(calls):
    trials = []
    found = baselines.search(
        PROBLEM, "nag", 2, seeds=[5, 8, 6], sweep_tasks=1, on_trial=lambda *trial: trials.append(len(calls))
    )
    seen = tasks(calls)
    lengths = [end - start for start, end in zip([0, *trials], trials)]
    assert len(lengths) == found.trials and set(lengths) == {1, 3} and lengths == sorted(lengths)
    few = lengths.count(1)
    assert seen == few * of([5], "validation") + (len(lengths) - few) * of([5, 8, 6], "validation")
    # The whole sweep and every first value of the momentum are seen before that.
    assert few > 17 + 3 * 3


@pytest.mark.parametrize("split", ["test", "train", "validation"])
def test_baselines_are_tuned_on_validation_tasks_and_run_on_the_split_asked_for(calls, split):
    found = baselines.compare(
        PROBLEM, 2, [4, 6, 7], names=["sgd", "nag"], tuning_seeds=[1, 2], split=split,
        search_options={"points_per_decade": 2, "options": {}},
    )  # fmt: skip
    expected = []
    for name in ("sgd", "nag"):
        expected += found[name].search.trials * of([1, 2], "validation") + of([4, 6, 7], split)
    assert tasks(calls) == expected


def test_a_comparison(calls):
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.01)
    trials = []
    comparisons.compare(
        net, PROBLEM, 2, 3, tuning_episodes=2, names=["sgd"], on_trial=lambda *trial: trials.append(trial)
    )
    test, validation = of(range(3), "test"), of(range(2), "validation")
    assert tasks(calls) == [*test, *len(trials) * validation, *test, (0, "test")]


def test_an_experiment_from_its_training_to_its_tables(tmp_path, calls):
    settings = [
        {"name": "test", "title": "Test", "horizon": 2, "baselines": ["sgd", "nag"]},
        {"name": "train", "title": "Training images", "horizon": 2, "split": "train", "baselines": ["nag"]},
        {"name": "few", "title": "Few", "horizon": 2, "test_episodes": 1, "tuning_episodes": 3, "baselines": ["sgd"]},
    ]
    experiment = small(tmp_path, settings=settings, selection=["test", "few"])
    net = experiments.train(experiment, tmp_path / "out", progress=False)
    expected = []
    for seed in (0, 1):
        for half in (0, 1):
            expected += of([episode_seed(seed, 2 * half), episode_seed(seed, 2 * half + 1)], "train")
            expected += of(range(2), "validation")  # which choose the best network of a run
        expected += 2 * of(range(10_000, 10_020), "validation")  # which choose the best run: others
    assert tasks(calls) == expected
    calls.clear()

    experiments.evaluate_experiment(experiment, net, tmp_path / "out", progress=False)
    seen = tasks(calls)
    first = 1 << 40
    for seeds, split, count in (
        (range(3), "test", 3),  # two baselines and the learned one; "few" and the counts of problems come on top
        (range(first, first + 3), "train", 2),
    ):
        assert {task for task in seen if task[1] == split} == {*of(seeds, split)}
        assert all(seen.count((seed, split)) == count for seed in seeds if seed)
    # Task 0: two baselines and the learned one, two in "few", one for each of the counts.
    assert seen.count((0, "test")) == 3 + 2 + len(settings)
    # Nothing is tuned on what is reported, and no more tasks than the setting says are tuned on.
    assert {seed for seed, split in seen if split == "validation"} == {0, 1, 2}
    counts = [seen.count((seed, "validation")) for seed in range(3)]
    assert counts[0] > counts[1] > counts[2] > 0  # one task in two settings; two of three until the last stage


def test_tasks_of_training_images_are_not_those_of_the_training():
    first = measuring.TRAIN_SEEDS
    for split, expected in (("train", range(first, first + 3)), ("test", range(3))):
        setting = experiments.Setting("a", "A", split=split)
        assert measuring._Tasks(PROBLEM, setting, 3, 1, None).seeds() == expected
        sealed_ones = measuring._Tasks(PROBLEM, setting, 3, 1, None, release=sealed.RELEASES[0]).seeds()
        assert sealed_ones == sealed.seeds(3, sealed.RELEASES[0])
    drawn = {episode_seed(seed, episode) for seed, episode in product(range(30), range(200))}
    assert len(drawn) == 6000 and not drawn & set(range(first, first + 100))


def test_a_choice_among_runs_looks_at_the_mean_logarithm(tmp_path, monkeypatch):
    settings = [{"name": "a", "title": "A", "horizon": 2}, {"name": "b", "title": "B", "horizon": 3}]
    experiment = small(tmp_path, settings=settings, selection=["a", "b"])
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.01)
    score, finals = runs._score(experiment, net, None)
    problem = l2l.problems.Quadratic(dim=3, batch=4)
    seeds = range(10_000, 10_020)
    for name, horizon in (("a", 2), ("b", 3)):
        losses = l2l.meta.evaluate(net, problem, seeds, horizon, split="validation")
        assert finals[name] == losses[:, -1].mean().item()
    assert score == pytest.approx((math.log(finals["a"]) + math.log(finals["b"])) / 2)
    # The lower score is kept, whichever comes first.
    for order in ([1.0, 2.0], [2.0, 1.0]):
        scores = iter(order)
        monkeypatch.setattr(runs, "_score", lambda *_, scores=scores: (next(scores), {}))
        kept = experiments.train(experiment, tmp_path / f"out{order[0]}", episodes=1, progress=False)
        assert l2l.meta.record_of(kept)["seed"] == order.index(1.0)
