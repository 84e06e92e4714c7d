"""What an experiment measures and keeps: searches and curves that are not computed twice, and on which tasks."""

from __future__ import annotations

import json
import math

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation import experiments
from l2l_fast.evaluation.baselines import trials
from l2l_fast.evaluation.experiments import measuring
from l2l_fast.problems import sealed
from tests.helpers import random_network, recorded_samples
from tests.test_experiments import QUICK, small


def test_a_stopped_evaluation_goes_on_within_a_search(tmp_path, monkeypatch):
    experiment, net = small(tmp_path), l2l.CoordinatewiseLSTM(hidden_size=4)
    whole = experiments.evaluate_experiment(experiment, net, tmp_path / "whole", progress=False)
    seen, run = [], trials.run

    def counting(*arguments, **options):
        seen.append((str(arguments), str(options)))
        if len(seen) == 150:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(trials, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        experiments.evaluate_experiment(experiment, net, tmp_path / "parts", progress=False)
    experiments.evaluate_experiment(experiment, net, tmp_path / "parts", progress=False)
    del seen[149]
    assert len(set(seen)) == len(seen)  # nothing was tried twice
    one, other = ((tmp_path / out / "results.json").read_text() for out in ("whole", "parts"))
    for name, results in json.loads(one).items():
        for key, result in results["results"].items():
            again = json.loads(other)[name]["results"][key]
            assert again["setting"] == result["setting"] and again["finals"] == pytest.approx(result["finals"])
    assert list(whole.comparisons) == ["test", "long"]


def test_a_file_is_kept_for_every_baseline_and_settings_share_their_searches(tmp_path):
    settings = [
        {"name": name, "title": name, "horizon": 8, "baselines": ["sgd", "nag"], "split": split}
        for name, split in (("test", "test"), ("train", "train"))
    ]
    settings.append({"name": "long", "title": "L", "horizon": 9, "baselines": ["sgd"]})
    settings = [{**setting, "search": QUICK} for setting in settings]
    experiment = small(tmp_path, settings=settings)
    measuring.baseline_curves(experiment, tmp_path / "out")
    folder = tmp_path / "out" / "curves"
    kept = sorted(path.name for path in folder.glob("*.safetensors"))
    assert kept == [f"{each}.safetensors" for each in ("long.sgd", "test.nag", "test.sgd", "train.nag", "train.sgd")]
    searches = [sorted(path.name for path in each.iterdir()) for each in sorted(folder.glob("trials-*"))]
    assert sorted(searches) == [["nag.jsonl", "sgd.jsonl"], ["sgd.jsonl"]]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((measuring.baselines, "run"), (measuring.baselines, "search"), (trials, "run")):
            patch.setattr(module, name, lambda *a, **k: pytest.fail("it was computed again"))
        net = l2l.CoordinatewiseLSTM(hidden_size=4)
        experiments.evaluate_experiment(experiment, net, tmp_path / "out", progress=False)


def test_searches_for_a_release_look_at_none_of_its_tasks(tmp_path, monkeypatch):
    calls = recorded_samples(monkeypatch)
    experiment = small(tmp_path)
    measuring.baseline_curves(experiment, tmp_path / "out", release=sealed.RELEASES[0])
    assert {sealed.release_of(seed) for seed, _, _ in calls} == {None}
    assert not list((tmp_path / "out" / "curves").glob("*.safetensors"))
    with pytest.raises(sealed.SealedError):
        net = l2l.CoordinatewiseLSTM(hidden_size=4)
        experiments.evaluate_experiment(experiment, net, tmp_path / "out", release=sealed.RELEASES[0], progress=False)


def test_others_have_their_curves_on_the_same_tasks(tmp_path):
    experiment = small(tmp_path, settings=[{"name": "test", "title": "T", "horizon": 8, "baselines": ["sgd"]}])
    nets = {f"seed {k}": random_network(seed=k, hidden_size=4, preprocess="identity") for k in range(3)}
    net = nets.pop("seed 0")
    outcome = experiments.evaluate_experiment(experiment, net, tmp_path / "out", others=nets, progress=False)
    problem, comparison = l2l.problems.Quadratic(dim=3, batch=4), outcome.comparisons["test"]
    assert list(comparison.others) == ["seed 1", "seed 2"]
    for name, each in {**nets, "learned": net}.items():
        losses = {**comparison.losses, **comparison.others}[name]
        torch.testing.assert_close(losses, l2l.meta.evaluate(each, problem, range(3), 8), rtol=1e-6, atol=1e-6)
    again = experiments.evaluate_experiment(experiment, net, tmp_path / "out", others=nets, progress=False)
    for name, losses in again.comparisons["test"].others.items():
        torch.testing.assert_close(losses, comparison.others[name], rtol=1e-6, atol=1e-6)


def test_what_is_known_of_the_ends(tmp_path):
    """Losses problem by problem and held-out errors, of everybody, at the last theta."""
    experiment = small(tmp_path, settings=[{"name": "test", "title": "T", "horizon": 8, "baselines": ["sgd"]}])
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.05)
    found = experiments.evaluate_experiment(experiment, net, tmp_path / "out", progress=False).comparisons["test"]
    assert set(found.by_problem) == {"learned", "sgd"} and not found.errors
    for name, ends in found.by_problem.items():
        assert ends.shape == (3, 4)
        torch.testing.assert_close(ends.mean(1), found.losses[name][:, -1], rtol=1e-5, atol=1e-7)
    table = (tmp_path / "out" / "results.md").read_text()
    assert " problems |" in table and " median problem |" in table

    ends = measuring._Endings()
    problem = l2l.problems.Quadratic(dim=2, batch=3)
    losses = torch.tensor([[1.0, 0.5], [1.0, math.inf], [1.0, 0.7]])
    ends(problem.sample(0)), ends(problem.sample(1))
    joined = ends.comparison(problem, "sgd", losses).by_problem["sgd"]
    assert joined[1].isinf().all() and joined[0].mean().item() == pytest.approx(problem.sample(0)().item() / 3)
    assert joined[2].sum().item() == pytest.approx(problem.sample(1)().item())


def test_baselines_may_be_tuned_on_larger_tasks(tmp_path, monkeypatch):
    """More problems side by side show rates at which a rare one diverges; the test tasks stay what they are."""
    searched, ran = [], []
    search, run = measuring.baselines.search, measuring.baselines.run

    def recording_search(problem, *arguments, **options):
        searched.append((problem.config(), list(options["seeds"])))
        return search(problem, *arguments, **options)

    def recording_run(problem, *arguments, **options):
        ran.append(problem.config())
        return run(problem, *arguments, **options)

    monkeypatch.setattr(measuring.baselines, "search", recording_search)
    monkeypatch.setattr(measuring.baselines, "run", recording_run)
    setting = {"name": "test", "title": "T", "horizon": 8, "baselines": ["sgd"], "search": QUICK}
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.05)
    plain = l2l.problems.Quadratic(dim=3, batch=4)
    results = []
    for more in ({}, {"tuning_problem": {"batch": 50}}):
        experiment = small(tmp_path, settings=[{**setting, **more}], tuning_episodes=2)
        outcome = experiments.evaluate_experiment(experiment, net, tmp_path / "out", progress=False)
        results.append(outcome.comparisons["test"])
        assert ("tuned on 2 tasks, batch=50;" in outcome.table.read_text()) == bool(more)
        assert "(the mean of 4 problems each)" in outcome.table.read_text()
    # The kept curves of the one are not taken for those of the other.
    wide = l2l.problems.Quadratic(dim=3, batch=50)
    assert searched == [(plain.config(), [0, 1]), (wide.config(), [0, 1])] and ran == [plain.config()] * 2
    setup = search(wide, "sgd", 8, seeds=range(2), **QUICK).setup
    assert results[1].setups["sgd"] == setup != results[0].setups["sgd"]
    expected = run(plain, "sgd", setup.lr, range(3), 8, options=setup.options, schedule=setup.schedule)
    assert torch.equal(results[1].losses["sgd"], expected)
    assert results[1].problem.config() == plain.config()


def test_a_tuning_problem_that_there_is_not_is_noticed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring.baselines, "search", lambda *a, **k: pytest.fail("baselines were tuned"))
    settings = [
        {"name": "test", "title": "T", "horizon": 8},
        {"name": "last", "title": "L", "horizon": 8, "tuning_problem": {"batch": 0}},
    ]
    experiment = small(tmp_path, settings=settings)
    for optimizer in (None, l2l.CoordinatewiseLSTM()):
        with pytest.raises(ValueError, match="batch must be"):
            experiments.run(experiment, tmp_path / "out", optimizer=optimizer, progress=False)
    assert not (tmp_path / "out").exists()
