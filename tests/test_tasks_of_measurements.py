"""Which tasks every measurement sees: all ``sample(seed, split)`` are recorded and compared with what is documented."""

from __future__ import annotations

import math
from itertools import product

import pytest

import l2l_fast as l2l
from l2l_fast.evaluation import baselines, experiments
from l2l_fast.evaluation import comparison as comparisons
from l2l_fast.evaluation.experiments import running as runs
from l2l_fast.meta.protocol import episode_seed
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
    found = baselines.search(PROBLEM, "sgd", 2, seeds=[5, 8], split=split)
    assert tasks(calls) == len(found.final_losses) * of([5, 8], split)


@pytest.mark.parametrize("split", ["test", "train", "validation"])
def test_baselines_are_tuned_on_validation_tasks_and_run_on_the_split_asked_for(calls, split):
    found = baselines.compare(PROBLEM, 2, [4, 6, 7], names=["sgd", "adam"], tuning_seeds=[1, 2], split=split)
    expected = []
    for name in ("sgd", "adam"):
        expected += len(found[name].search.final_losses) * of([1, 2], "validation") + of([4, 6, 7], split)
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
        {"name": "test", "title": "Test", "horizon": 2, "baselines": ["sgd", "adam"]},
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
    assert seen.count((0, "test")) == 3 + 2 + len(settings)
    # Nothing is tuned on what is reported, and no more tasks than the setting says are tuned on.
    assert {seed for seed, split in seen if split == "validation"} == {0, 1, 2}
    assert seen.count((0, "validation")) > seen.count((1, "validation")) == seen.count((2, "validation"))


def test_tasks_of_training_images_are_not_those_of_the_training():
    assert runs._Tasks(PROBLEM, experiments.Setting("a", "A", split="train"), 3, 1, None).seeds() == range(
        runs._TRAIN_SEEDS, runs._TRAIN_SEEDS + 3
    )
    drawn = {episode_seed(seed, episode) for seed, episode in product(range(30), range(200))}
    assert len(drawn) == 6000 and not drawn & set(range(runs._TRAIN_SEEDS, runs._TRAIN_SEEDS + 100))


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
