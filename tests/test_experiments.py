"""Experiments: their files, a small one from end to end, stages, resuming, and that results are not computed twice."""

from __future__ import annotations

import json
import math

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation import experiments
from l2l_fast.evaluation.baselines import trials
from l2l_fast.evaluation.experiments import config, measuring, report
from l2l_fast.evaluation.experiments import running as runs
from l2l_fast.meta import record_of
from l2l_fast.networks import pretrained, trained

QUICK = {"options": {}, "schedules": ["constant", "linear"], "points_per_decade": 4}  # of a search


def small(tmp_path, **changes):
    content = {
        "name": "small",
        "about": "Small quadratics. For tests.",
        "source": "none",
        "pretrained": "",
        "problem": {"name": "quadratic", "dim": 3, "batch": 4},
        "networks": {"": {"preprocess": "identity", "output_scale": 1.0, "hidden_size": 8}},
        "training": {"horizon": 8, "unroll": 4, "lr": 0.01, "validate_every": 2, "validation_episodes": 2},
        "episodes": 4,
        "candidates": [{"seed": 0}, {"seed": 1, "training": {"lr": 1e-6}}],
        "selection": ["test"],
        "settings": [
            {"name": "test", "title": "Small", "horizon": 8, "target": {"8": 1e-9, "sum": 1e9}, "search": QUICK},
            {"name": "long", "title": "Longer", "horizon": 12, "transfer": True, "search": QUICK},
        ],
        "test_episodes": 3,
        "tuning_episodes": 1,
    }
    path = tmp_path / "small.json"
    path.write_text(json.dumps({**content, **changes}))
    return experiments.load(path)


@pytest.mark.parametrize("name", experiments.available())
def test_the_files_in_the_package(name):
    experiment = experiments.load(name)
    assert experiment.name == name and experiment.test_episodes >= 1
    for setting in experiment.settings:
        if setting.paper:
            curves = config.paper_curves(setting.paper)
            assert set(curves) == {"learned", "sgd", "nag", "rmsprop", "adam"}
            assert all(len(steps) == len(losses) == 100 for steps, losses in curves.values())
        if set(setting.target) - {"sum"} and setting.paper:
            # The targets are the published values: the last point of the curve (the problem's text may round).
            assert curves["learned"][1][-1] == pytest.approx(setting.target[str(setting.horizon)], abs=6e-4)
    if experiment.pretrained in pretrained.names():
        net = pretrained.load_pretrained(experiment.pretrained)
        record = record_of(net)
        origin = experiments.load(record["experiment"])
        # One whose training is another's measures the same optimizer elsewhere.
        for part in ("pretrained", "problem", "networks", "training", "episodes", "candidates"):
            assert getattr(experiment, part) == getattr(origin, part), part
        if origin.name == name:
            # A setting of its own counts may be left out: it takes long.
            needed = {each.name for each in experiment.settings if each.test_episodes is None}
            files = [experiments.load(each) for each in experiments.available()]
            known = {each.name for file in files if file.pretrained == origin.pretrained for each in file.settings}
            assert needed <= record["score"].keys() <= known


def test_an_experiment_may_measure_the_optimizer_of_another(tmp_path):
    content = {"name": "other", "about": "A.", "source": "S", "trained_as": "mnist"}
    content["settings"] = [{"name": "a", "title": "A"}]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    found, mnist = experiments.load(path), experiments.load("mnist")
    for name in ("pretrained", "problem", "networks", "training", "episodes", "candidates"):
        assert getattr(found, name) == getattr(mnist, name), name
    assert found.name == "other" and found.selection == () and [each.name for each in found.settings] == ["a"]
    path.write_text(json.dumps({**content, "trained_as": "nothing"}))
    with pytest.raises(ValueError, match="trained_as: expected one of .*, got 'nothing'"):
        experiments.load(path)


def test_a_small_experiment_from_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    experiment = small(tmp_path)
    outcome = experiments.run(experiment, tmp_path / "out", progress=False)
    text = outcome.table.read_text()
    assert "| Adam |" in text and "| heavy ball |" in text and text.count("## ") == 2
    assert "published step 8 1e-09: ABOVE" in text and "published sum 1e+09: below" in text
    assert text.count("3 fresh test tasks (the mean of 4 problems each)") == 2
    assert {comparison.problems_per_task for comparison in outcome.comparisons.values()} == {4}
    assert outcome.picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(outcome.record.read_text())["long"]["horizon"] == 12
    net = l2l.load(tmp_path / "out" / runs.OPTIMIZER)
    record = record_of(net)
    # The candidate that can learn is kept, and its numbers are those of the table.
    assert record["seed"] == 0 and len(record["candidates"]) == 2
    again = l2l.meta.evaluate(net, l2l.problems.Quadratic(dim=3, batch=4), range(3), 8)
    assert record["score"]["test"]["step 8"] == pytest.approx(again[:, -1].mean().item(), rel=1e-4)
    assert record["score"]["test"]["sum"] == pytest.approx(again[:, :-1].sum(1).mean().item(), rel=1e-4)


def test_losses_on_embedded_images_are_not_compared_with_published_ones(tmp_path):
    setting = {"name": "test", "title": "MNIST", "horizon": 10, "target": {"10": 1e9}, "baselines": ["nag"]}
    setting["search"] = {"options": {}, "points_per_decade": 2}
    problem = {"name": "mnist", "data": "mnist-10k-embedded", "hidden": [4], "batch_size": 64, "init_std": 0.1}
    experiment = small(tmp_path, settings=[setting], problem=problem, test_episodes=1)
    net = l2l.CoordinatewiseLSTM(hidden_size=8)
    text = experiments.evaluate_experiment(experiment, net, tmp_path / "out", progress=False).table.read_text()
    assert "published step 10 1e+09: not comparable" in text and "1e+09: below" not in text


def test_what_is_done_is_not_done_again_and_only_if_it_is_the_same(tmp_path, monkeypatch):
    experiment = small(tmp_path)
    out = tmp_path / "out"
    net = experiments.train(experiment, out, progress=False)
    first = experiments.evaluate_experiment(experiment, net, out, progress=False)
    calls = []
    evaluate = measuring.evaluate
    monkeypatch.setattr(measuring, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    for name in ("run", "search"):
        monkeypatch.setattr(measuring.baselines, name, lambda *a, **k: pytest.fail("baselines were computed again"))
    second = experiments.evaluate_experiment(experiment, net, out, progress=False)
    assert not calls
    for name, comparison in first.comparisons.items():
        for key, losses in comparison.losses.items():
            torch.testing.assert_close(second.comparisons[name].losses[key], losses, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        net.bias_out += 0.01
    experiments.evaluate_experiment(experiment, net, out, progress=False)
    assert len(calls) == 2


def test_a_stopped_run_goes_on_and_ends_alike(tmp_path):
    stages = [{"episodes": 3, "problem": {"training_scales": [0.5, -1, 1]}, "training": {"lr": 5e-3}}]
    experiment = small(tmp_path, candidates=[{"seed": 0, "stages": stages}])
    whole = experiments.train(experiment, tmp_path / "whole", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_score", lambda *a: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            experiments.train(experiment, tmp_path / "parts", progress=False)
    parts = experiments.train(experiment, tmp_path / "parts", progress=False)
    assert torch.equal(whole.phi(), parts.phi())
    record = record_of(parts)
    assert record["episodes"] == 3 and [each["episodes"] for each in record["earlier"]] == [4]
    assert record["problem"]["training_scales"] == [0.5, -1.0, 1.0]
    assert "then from the best network so far" in report.training_text(record)
    assert (tmp_path / "parts" / "candidate0" / "stage1" / "checkpoint.safetensors").is_file()


@pytest.mark.parametrize("episodes, lengths", [(None, (2, 5)), (3, (3, 3)), (7, (7, 5))])
def test_lengths_of_stages(tmp_path, episodes, lengths):
    candidates = [{"seed": 0, "stages": [{"episodes": 5}]}]
    experiment = small(tmp_path, candidates=candidates, episodes=2)
    record = record_of(experiments.train(experiment, tmp_path / "out", episodes=episodes, progress=False))
    assert (record["earlier"][0]["episodes"], record["episodes"]) == lengths


def test_a_stage_may_have_its_own_seed(tmp_path):
    seeds = []
    for seed in ({}, {"seed": 72}):
        experiment = small(tmp_path, candidates=[{"seed": 3, "stages": [{"episodes": 1, **seed}]}])
        net = experiments.train(experiment, tmp_path / f"out{seed}", episodes=1, progress=False)
        seeds.append((record_of(net)["earlier"][0]["seed"], record_of(net)["seed"]))
    assert seeds == [(3, 1003), (3, 72)]


def test_networks_by_kind_are_trained_and_kept(tmp_path):
    options = {"preprocess": "identity", "output_scale": 1.0, "hidden_size": 8}
    experiment = small(tmp_path, networks={"all": options}, candidates=[{"seed": 0}])
    net = experiments.train(experiment, tmp_path / "out", progress=False)
    assert list(net) == ["all"]
    again = trained.load(tmp_path / "out" / runs.OPTIMIZER)
    assert torch.equal(again["all"].phi(), net["all"].phi()) and record_of(again) == record_of(net)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"candidates": []}, "at least one"),
        ({"selection": ["other"]}, "other"),
        ({"more": 1}, "more"),
        ({"candidates": [{"seed": 0, "lr": 1}]}, "lr"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **change)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "experiment: keys missing: .'name', 'about'"),
        ("[1]", r"experiment: expected an object with keys, got \[1\]"),
        ("3", "experiment: expected an object"),
        ("", "Expecting value"),
        ({"candidates": 5}, "candidates: expected a list, got 5"),
        ({"candidates": [1]}, "candidate: expected an object with keys, got 1"),
        ({"candidates": [{}]}, "candidate: keys missing: .'seed'"),
        ({"candidates": [{"seed": 0, "stages": [{}]}]}, "stage: keys missing: .'episodes'"),
        ({"candidates": [{"seed": 0, "training": 3}]}, "candidate: training: expected an object with keys, got 3"),
        ({"settings": [{}]}, "setting: keys missing: .'name', 'title'"),
        ({"settings": [{"name": "test", "title": "T", "baselines": "sgd"}]}, "baselines: expected a list, got 'sgd'"),
        ({"settings": [{"name": "test", "title": "T", "baselines": [["sgd"]]}]}, "baselines: expected some of"),
        ({"settings": [{"name": "test", "title": "T", "split": "testing"}]}, "split must be one of"),
        ({"settings": [{"name": "test", "title": "T", "horizon": "8"}]}, "horizon must be a positive integer, got '8'"),
        ({"settings": [{"name": "test", "title": "T", "test_episodes": 0}]}, "test_episodes must be a positive"),
        ({"selection": "test"}, "selection: expected a list"),
        ({"networks": {}}, "networks: expected the options of at least one"),
        ({"problem": "quadratic"}, "experiment: problem: expected an object"),
        ({"tuning_episodes": 0}, "tuning_episodes must be a positive integer, got 0"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_its_own_words(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"small.json' is not an experiment: {message}"):
        if isinstance(content, dict):
            small(tmp_path, **content)
        (tmp_path / "small.json").write_text(content if isinstance(content, str) else "")
        experiments.load(tmp_path / "small.json")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"candidates": [{"seed": 0}, {"seed": 1, "training": {"unroll": 9}}]}, "unroll: expected at most horizon=8"),
        ({"candidates": [{"seed": 0, "stages": [{"episodes": 1, "training": {"lr": -1}}]}]}, "lr: expected"),
        ({"candidates": [{"seed": 0, "stages": [{"episodes": 1, "problem": {"dim": 0}}]}]}, "dim must be"),
        ({"candidates": [{"seed": 10**30}]}, "seed: expected -9223"),
        ({"candidates": [{"seed": 0, "training": {"speed": 1}}]}, "speed"),
        ({"settings": [{"name": "test", "title": "T", "problem": {"dim": -1}}]}, "dim must be"),
        ({"networks": {"": {"hidden_size": 3}}}, "hidden_size"),
    ],
)
def test_what_the_last_part_would_raise_is_raised_before_the_first(tmp_path, change, message):
    experiment = small(tmp_path, **change)
    with pytest.raises((ValueError, TypeError), match=message):
        experiments.run(experiment, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_optimizer_of_the_wrong_kind_is_noticed_before_the_baselines(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring.baselines, "run", lambda *a, **k: pytest.fail("baselines were computed"))
    monkeypatch.setattr(trials, "run", lambda *a, **k: pytest.fail("baselines were tuned"))
    net = torch.nn.ModuleDict({"conv": l2l.CoordinatewiseLSTM(), "fc": l2l.CoordinatewiseLSTM()})
    for run in (lambda out: experiments.run(small(tmp_path), out, optimizer=net),
                lambda out: experiments.evaluate_experiment(small(tmp_path), net, out)):  # fmt: skip
        with pytest.raises(ValueError, match="the networks are for"):
            run(tmp_path / "out")
    with pytest.raises(TypeError, match="net: expected"):
        experiments.run(small(tmp_path), tmp_path / "out", optimizer=torch.nn.Linear(1, 1))
    assert not (tmp_path / "out").exists()


def test_a_log_that_is_somebodys_is_left_alone(tmp_path):
    log = tmp_path / "out" / "candidate1" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("notes\n")
    with pytest.raises(ValueError, match="candidate1/log.jsonl' is not the log of a run"):
        experiments.run(small(tmp_path), tmp_path / "out", progress=False)
    assert log.read_text() == "notes\n" and not (tmp_path / "out" / "candidate0").exists()


def test_every_stage_begins_with_the_best_network_of_the_one_before(tmp_path, monkeypatch):
    stages = [{"episodes": 3}, {"episodes": 2}]
    # The best of four episodes is validated after the third, of which the last network knows nothing.
    experiment = small(
        tmp_path, candidates=[{"seed": 0, "stages": stages}],
        training={"horizon": 8, "unroll": 4, "lr": 0.01, "validate_every": 3, "validation_episodes": 2},
    )  # fmt: skip
    trainers, starts = [], []
    fit = runs.MetaTrainer.fit

    def recording(self, *arguments, **options):
        starts.append(self.net.phi().detach().clone())
        trainers.append(fit(self, *arguments, **options))
        return trainers[-1]

    monkeypatch.setattr(runs.MetaTrainer, "fit", recording)
    kept = experiments.train(experiment, tmp_path / "out", progress=False)
    assert [run.episode for run in trainers] == [4, 3, 2]
    assert not torch.equal(trainers[0].best_net().phi(), trainers[0].net.phi())
    for before, start in zip(trainers, starts[1:]):
        assert torch.equal(start, before.best_net().phi())
    assert torch.equal(kept.phi(), trainers[-1].best_net().phi())


def test_networks_of_several_kinds_start_apart(tmp_path):
    options = {"preprocess": "identity", "output_scale": 1.0, "hidden_size": 8}
    several = runs.make_networks(small(tmp_path, networks={"conv": options, "fc": options}), 5)
    single = runs.make_networks(small(tmp_path, networks={"": options}), 5)
    later = runs.make_networks(small(tmp_path, networks={"": options}), 1005)
    assert list(several) == ["conv", "fc"]
    assert torch.equal(several["conv"].phi(), single.phi()) and torch.equal(several["fc"].phi(), later.phi())
    assert not torch.equal(several["conv"].phi(), several["fc"].phi())


@pytest.mark.parametrize("episodes, counts", [(None, [4, 3, 3]), (2, [2, 2, 2])])
def test_the_rate_of_every_stage_decays_over_its_own_length(tmp_path, episodes, counts):
    training = {"horizon": 8, "unroll": 4, "lr": 0.01, "validate_every": 2, "validation_episodes": 2}
    stages = [{"episodes": 3, "training": {"lr": 0.004}}, {"episodes": 3, "training": {"decay_episodes": 9}}]
    experiment = small(
        tmp_path, training=training, candidates=[{"seed": 0, "training": {"lr": 0.02}, "stages": stages}]
    )
    record = record_of(experiments.train(experiment, tmp_path / "out", episodes=episodes, progress=False))
    parts = [*record["earlier"], record]
    assert [part["episodes"] for part in parts] == counts
    assert [part["meta_optimizer"]["decay_episodes"] for part in parts] == [*counts[:2], 9]
    # What a part says counts for itself only.
    assert [part["meta_optimizer"]["lr"] for part in parts] == [0.02, 0.004, 0.01]
    assert {part["protocol"]["unroll"] for part in parts} == {4}


@pytest.mark.parametrize("finals, score", [((0.0, 1.0), -math.inf), ((math.inf, 1.0), math.inf),
                                           ((0.0, math.inf), math.inf), ((1.0, 1.0), 0.0)])  # fmt: skip
def test_a_candidate_that_diverges_somewhere_is_never_the_best(tmp_path, monkeypatch, finals, score):
    values = iter(finals)
    monkeypatch.setattr(measuring, "evaluate", lambda *a, **k: torch.full((2, 3), next(values), dtype=torch.float64))
    experiment = small(tmp_path, selection=["test", "long"])
    assert runs._score(experiment, runs.make_networks(experiment, 0), None)[0] == score


def test_an_unknown_name():
    with pytest.raises(ValueError, match="quadratic-uniform"):
        experiments.load("quadratics")
