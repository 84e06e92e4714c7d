"""Tables as a whole, kept curves and records of experiments; single sections are in tests/test_tables.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation.baselines import Setup
from l2l_fast.evaluation.comparison import LEARNED, Comparison
from l2l_fast.evaluation.experiments import Setting, report, tables
from l2l_fast.networks.record import attach
from tests.test_experiments import small

NAMES = (LEARNED, "sgd", "nag", "rmsprop", "adam")


def curves(horizon: int, seed: int) -> Comparison:
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for name in NAMES:
        losses[name] = (torch.randn(6, horizon + 1, generator=generator, dtype=torch.float64)).exp()
    rates = {name: 10.0**-k for k, name in enumerate(NAMES) if k}
    setups = {name: Setup(rate, {"momentum": 0.5}, "linear") for name, rate in rates.items()}
    return Comparison(l2l.problems.Quadratic(dim=3, batch=4), losses, rates, 4, setups)


@pytest.mark.parametrize("release", [None, "0.2"])
def test_the_text_is_made_of_the_settings(tmp_path, release):
    settings = [
        {"name": "a", "title": "One", "horizon": 100},
        {"name": "b", "title": "Two", "horizon": 30, "tuning_episodes": 3, "transfer": True},
    ]
    experiment = small(tmp_path, settings=settings, selection=["a"], tuning_episodes=7)
    results = {"b": curves(30, 2), "a": curves(100, 1)}
    net = l2l.CoordinatewiseLSTM()
    attach(net, record_of_a_run(3))
    path = report.write_table(experiment, net, results, tmp_path / "x.md", release)
    text = path.read_text()
    found = text.split("## ")
    assert [each.splitlines()[0] for each in found] == ["# small", "One", "Two"]
    for each, setting, tuning in zip(found[1:], experiment.settings, (7, 3)):
        assert each.strip() == "\n".join(tables.section(setting, results[setting.name], tuning))[3:].strip()
        assert f"tuned on {tuning} tasks" in each
    assert "Small quadratics. For tests." in found[0] and "Source: none." in found[0]
    assert "Training of this optimizer: 13 episodes of 23 steps" in found[0]
    sealed = f"Measured on the sealed tasks of release {release}"
    assert (sealed in found[0]) == (release is not None) == ("python -m l2l_fast evidence small" in found[0])


def test_scores_are_the_learned_optimizers_means():
    result = curves(100, 5)
    result.losses["sgd"] *= 0
    losses = result.losses[LEARNED]
    found = report.scores({"a": result})["a"]
    expected = {f"step {t}": losses[:, t].mean().item() for t in (20, 100)}
    expected |= {"sum": losses[:, :-1].sum(1).mean().item(), "test tasks": 6}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("change", [{"horizon": 9}, {"split": "train"}, {"name": "same numbers"}, {"title": "Other"}])
def test_curves_are_kept_for_what_they_depend_on(tmp_path, change):
    net, problem = l2l.CoordinatewiseLSTM(), l2l.problems.Quadratic(dim=3, batch=4)
    setting = Setting("a", "A", horizon=10)
    key = report.fingerprint(net, problem, setting, 5, 2)
    assert key == report.fingerprint(net, problem, setting, 5, 2)
    other = report.fingerprint(net, problem, replace(setting, **change), 5, 2)
    assert (other == key) == ("name" in change or "title" in change)
    searched = replace(setting, search={"schedules": ["constant"]})
    assert report.fingerprint(net, problem, searched, 5, 2) == key  # only baselines are searched
    keys = {
        key,
        report.fingerprint(None, problem, setting, 5, 2),
        report.fingerprint(None, problem, searched, 5, 2),
        report.fingerprint(None, problem, replace(setting, tuning_problem={"batch": 9}), 5, 2),
        report.fingerprint(net, l2l.problems.Quadratic(dim=3, batch=5), setting, 5, 2),
        report.fingerprint(net, problem, setting, 6, 2),
        report.fingerprint(net, problem, setting, 5, 3),
        report.fingerprint(net, problem, setting, 5, 2, "cuda"),
        report.fingerprint(net, problem, setting, 5, 2, release="0.2"),
        report.fingerprint(net, problem, setting, 5, 2, release="0.3"),
        report.fingerprint(l2l.CoordinatewiseLSTM(), problem, setting, 5, 2),
    }
    assert len(keys) == 11
    result = curves(10, 6)
    report.write_curves(tmp_path / "x", key, result)
    again = report.read_curves(tmp_path / "x", key, problem)
    assert again.learning_rates == result.learning_rates and list(again.losses) == list(result.losses)
    assert again.setups == result.setups and again.problem is problem
    for name, losses in result.losses.items():
        assert torch.equal(again.losses[name], losses.float().double())
    assert again.problems_per_task == 4 and not again.by_problem and not again.errors
    assert report.read_curves(tmp_path / "x", other + "x", problem) is None
    assert report.read_curves(tmp_path / "y", key, problem) is None
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-9])
    assert report.read_curves(tmp_path / "x", key, problem) is None  # damaged: computed again


def test_what_is_known_of_the_ends_is_kept(tmp_path):
    result = curves(3, 6)
    ends = {"nag": torch.rand(6, 4, dtype=torch.float64), LEARNED: torch.rand(6, 4, dtype=torch.float64)}
    ends["nag"][2] = math.inf
    result = replace(result, by_problem=ends, errors={"sgd": torch.rand(6, dtype=torch.float64)})
    report.write_curves(tmp_path / "x", "key", result)
    again = report.read_curves(tmp_path / "x", "key", result.problem)
    for part in ("by_problem", "errors"):
        one, other = getattr(again, part), getattr(result, part)
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert torch.equal(values, other[name].float().double())


def test_the_weights_digest_is_of_every_weight():
    net = l2l.CoordinatewiseLSTM(hidden_size=4)
    digests = {report.weights_digest(net)}
    assert report.weights_digest(net) in digests
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.view(-1)[-1] += 1e-3
            digests.add(report.weights_digest(net))
    assert len(digests) == 1 + len(list(net.parameters()))
    several = torch.nn.ModuleDict({"conv": net, "fc": l2l.CoordinatewiseLSTM(hidden_size=4)})
    swapped = torch.nn.ModuleDict({"conv": several["fc"], "fc": net})
    assert report.weights_digest(several) != report.weights_digest(swapped)


def record_of_a_run(seed: int, **more) -> dict:
    return {
        "episodes": 10 + seed,
        "protocol": {"horizon": 20 + seed, "unroll": 30 + seed},
        "meta_optimizer": {"lr": 0.1 + seed, "betas": [0.5, 0.6], "clip_norm": 40 + seed, "decay_to": 0.77},
        "problem": {"name": "quadratic", "dim": 50 + seed},
        "seed": seed,
        **more,
    }


@pytest.mark.parametrize("candidates", [0, 1, 2, 3])
def test_how_an_optimizer_was_trained_is_told_stage_by_stage(candidates):
    record = record_of_a_run(3, earlier=[record_of_a_run(1), record_of_a_run(2)], candidates=[{}] * candidates)
    text = report.training_text(record)
    stages = text.split("; then from the best network so far: ")
    assert len(stages) == 3
    for seed, stage in enumerate(stages, start=1):
        assert stage.split("; the best of ")[0] == (
            f"{10 + seed} episodes of {20 + seed} steps, segments of {30 + seed}, on "
            f'{{"name": "quadratic", "dim": {50 + seed}}}; Adam, learning rate {0.1 + seed} (cosine decay), betas '
            f"[0.5, 0.6], gradient norm cut to {40 + seed}; seed {seed}"
        )
    assert text.endswith(f"; the best of {candidates} runs on validation tasks") == (candidates > 1)
