"""The tables of experiments: every cell and every verdict against the curves that they come from."""

from __future__ import annotations

import math

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation.comparison import LEARNED, Comparison
from l2l_fast.evaluation.experiments import report
from l2l_fast.evaluation.experiments.config import paper_curves
from tests.test_experiments import small

LABELS = {"learned LSTM": LEARNED, "SGD": "sgd", "NAG": "nag", "RMSprop": "rmsprop", "Adam": "adam"}


def curves(horizon: int, seed: int, learned_final: float | None = None) -> Comparison:
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for name in LABELS.values():
        losses[name] = (torch.randn(6, horizon + 1, generator=generator, dtype=torch.float64)).exp()
    if learned_final is not None:
        losses[LEARNED][:, -1] = learned_final
    rates = {name: 10.0**-k for k, name in enumerate(LABELS.values()) if k}
    return Comparison(l2l.problems.Quadratic(dim=3, batch=4), losses, rates, 4)


def sections(tmp_path, results, settings, net=None):
    experiment = small(tmp_path, settings=settings, selection=[settings[0]["name"]], tuning_episodes=7)
    net = net or l2l.CoordinatewiseLSTM()
    text = report.write_table(experiment, net, results, tmp_path / "x.md").read_text()
    return text.split("## ")[1:], text


def rows(section):
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return table[0], {row[0].strip("*"): [cell.strip("*") for cell in row[1:]] for row in table[1:]}


def test_every_cell_of_the_tables(tmp_path):

    settings = [
        {"name": "a", "title": "One", "horizon": 100, "paper": paper_name()},
        {"name": "b", "title": "Two", "horizon": 30, "tuning_episodes": 3, "transfer": True},
    ]
    results = {"a": curves(100, 1), "b": curves(30, 2)}
    found, text = sections(tmp_path, results, settings)
    assert [section.splitlines()[0] for section in found] == ["One", "Two"]
    assert "7 per learning rate tried" in found[0] and "3 per learning rate tried" in found[1]
    assert "not trained for this" in found[1] and "not trained for this" not in found[0]
    for section, name, steps in ((found[0], "a", [20, 100]), (found[1], "b", [20, 30])):
        header, body = rows(section)
        assert header[2:4] == [f"step {step}" for step in steps] and list(body) == list(LABELS)
        for label, cells in body.items():
            losses = results[name].losses[LABELS[label]]
            rate = results[name].learning_rates.get(LABELS[label])
            assert cells[0] == ("" if rate is None else f"{rate:.3g}")
            columns = [*(losses[:, step] for step in steps), losses[:, :-1].sum(1)]
            for cell, column in zip(cells[1:], columns):
                mean, width = (float(part) for part in cell.split(" ± "))
                assert mean == pytest.approx(column.mean().item(), abs=6e-3, rel=1e-3)
                # Student's t for six tasks
                assert width == pytest.approx(2.571 * column.std().item() / math.sqrt(6), abs=6e-3, rel=2e-2)
            if name == "a":
                published = paper_curves(paper_name())[LABELS[label]][1][-1]
                assert float(cells[-1]) == pytest.approx(published, abs=6e-5, rel=1e-3)


def paper_name() -> str:
    return next(setting.paper for setting in l2l.experiments.load("mnist").settings if setting.paper)


@pytest.mark.parametrize("difference, words", [(-1e-3, "below"), (0.0, "not below"), (1e-3, "not below")])
def test_only_what_ends_lower_is_below(tmp_path, difference, words):
    result = curves(10, 3)
    best = min((result.losses[name][:, -1].mean().item(), name) for name in result.learning_rates)
    result.losses[LEARNED][:, -1] = result.losses[best[1]][:, -1] + difference
    found, _ = sections(tmp_path, {"a": result}, [{"name": "a", "title": "One", "horizon": 10}])
    label = {name: label for label, name in LABELS.items()}[best[1]]
    assert f": {words} the best baseline ({label}, {best[0]:.4f})" in found[0]


@pytest.mark.parametrize("slack, reached", [(1e-9, True), (0.0, True), (-1e-9, False)])
def test_targets_are_compared_with_their_own_step(tmp_path, slack, reached):
    result = curves(10, 4)
    losses = result.losses[LEARNED]
    exact = {
        "4": losses.mean(0)[4].item(),
        "10": losses.mean(0)[-1].item(),
        "sum": report.sum_from_start(result, LEARNED)[0],
    }
    assert exact["sum"] == pytest.approx(losses[:, :-1].sum(1).mean().item())
    target = {key: value + slack for key, value in exact.items()}
    found, _ = sections(tmp_path, {"a": result}, [{"name": "a", "title": "One", "horizon": 10, "target": target}])
    lines = [line for line in found[0].splitlines() if line.startswith("- published")]
    assert len(lines) == 3
    for line, (step, value) in zip(lines, target.items()):
        what = "sum" if step == "sum" else f"step {step}"
        assert line.startswith(f"- published {what} {value:g}: {'reached' if reached else 'NOT reached'} (")


def test_scores_are_the_learned_optimizers_means():
    result = curves(100, 5)
    result.losses["sgd"] *= 0
    losses = result.losses[LEARNED]
    found = report.scores({"a": result})["a"]
    expected = {f"step {t}": losses[:, t].mean().item() for t in (20, 100)}
    expected |= {"sum": losses[:, :-1].sum(1).mean().item(), "test tasks": 6}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"horizon": 9}, {"split": "train"}, {"name": "same numbers"}],
)
def test_curves_are_kept_for_what_they_depend_on(tmp_path, change):
    from dataclasses import replace

    from l2l_fast.evaluation.experiments import Setting

    net, problem = l2l.CoordinatewiseLSTM(), l2l.problems.Quadratic(dim=3, batch=4)
    setting = Setting("a", "A", horizon=10)
    key = report.fingerprint(net, problem, setting, 5, 2)
    other = report.fingerprint(net, problem, replace(setting, **change), 5, 2)
    assert (other == key) == ("name" in change)
    keys = {
        key,
        report.fingerprint(None, problem, setting, 5, 2),
        report.fingerprint(net, l2l.problems.Quadratic(dim=3, batch=5), setting, 5, 2),
        report.fingerprint(net, problem, setting, 6, 2),
        report.fingerprint(net, problem, setting, 5, 3),
        report.fingerprint(net, problem, setting, 5, 2, "cuda"),
        report.fingerprint(l2l.CoordinatewiseLSTM(), problem, setting, 5, 2),
    }
    assert len(keys) == 7
    result = curves(10, 6)
    report.write_curves(tmp_path / "x", key, result)
    again = report.read_curves(tmp_path / "x", key, problem)
    assert again.learning_rates == result.learning_rates and list(again.losses) == list(result.losses)
    for name, losses in result.losses.items():
        assert torch.equal(again.losses[name], losses.float().double())
    assert again.problems_per_task == 4 and report.read_curves(tmp_path / "x", other + "x", problem) is None


def test_numbers_in_tables():
    shown = {
        123.456: "123.5",
        99.996: "100.00",
        12.3456: "12.35",
        1.23456: "1.2346",
        0.01234: "0.0123",
        -150.26: "-150.3",
    }
    assert {value: report._number(value) for value in shown} == shown
    assert report._number(math.inf) == report._number(math.nan) == "diverged"


def test_the_images_of_a_setting_are_named(tmp_path):
    problem = l2l.problems.MNIST(data="mnist-10k-embedded", hidden=(2,), batch_size=2)
    plain = curves(10, 3)
    results = {split: Comparison(problem, plain.losses, plain.learning_rates, 1) for split in ("test", "train")}
    settings = [{"name": split, "title": split, "horizon": 10, "split": split} for split in results]
    found, _ = sections(tmp_path, results, settings)
    for section, split in zip(found, results):
        assert f"6 fresh test tasks, {split} images, 7 per learning rate tried; mnist-10k-embedded" in section
    assert "images" not in sections(tmp_path, {"a": plain}, [{"name": "a", "title": "A", "horizon": 10}])[0][0]


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
