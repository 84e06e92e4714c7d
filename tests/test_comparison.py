"""Comparisons: tables, verdicts, intervals and pictures."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation import comparison as comparisons
from l2l_fast.evaluation.baselines import Setup
from l2l_fast.evaluation.comparison import LEARNED, Comparison
from l2l_fast.meta import summarize
from l2l_fast.meta.evaluation import student_t95
from l2l_fast.problems import MNIST, Quadratic
from tests.helpers import random_network

SMALL = Quadratic(dim=3, batch=4)
QUICK = {"schedules": ["constant", "linear"], "points_per_decade": 4}


def made_up(finals: dict[str, float], horizon: int = 100, episodes: int = 5) -> Comparison:
    """Curves that fall from 3 to the given final losses, a little apart from each other."""
    steps = torch.linspace(0, 1, horizon + 1, dtype=torch.float64)
    spread = torch.linspace(0.9, 1.1, episodes, dtype=torch.float64)[:, None]
    losses = {name: 3.0 * (final / 3.0) ** steps * spread for name, final in finals.items()}
    return Comparison(SMALL, losses, {name: 0.01 for name in finals if name != LEARNED}, 4)


def test_summaries_are_student_intervals():
    losses = torch.tensor([[1.0, 2.0, 4.0], [1.0, 4.0, 5.0], [1.0, 3.0, 9.0]])
    summary = summarize(losses)
    assert summary.mean.tolist() == [1.0, 3.0, 6.0] and summary.total == 9.0
    assert summary.half_width[1].item() == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert summary.total_half_width == pytest.approx(4.303 * losses[:, 1:].sum(1).std().item() / math.sqrt(3), rel=1e-3)
    assert math.isnan(summarize(losses[:1]).total_half_width)
    # Printed tables of Student's t.
    for freedom, value in {3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045, 99: 1.984}.items():
        assert student_t95(freedom) == pytest.approx(value, rel=1e-2)
    for shape in ((3,), (0, 3), (3, 1)):
        with pytest.raises(ValueError, match="losses"):
            summarize(torch.ones(shape))


def test_compare_puts_everybody_on_the_same_tasks():
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.01)
    trials = []
    result = comparisons.compare(
        net, SMALL, 6, 3, tuning_episodes=1, names=("sgd", "adam"), search_options=QUICK,
        on_trial=lambda *trial: trials.append(trial),
    )  # fmt: skip
    assert list(result.losses) == [LEARNED, "sgd", "adam"] and (result.horizon, result.episodes) == (6, 3)
    first = torch.stack([losses[:, 0] for losses in result.losses.values()])
    assert torch.equal(first, first[:1].expand_as(first))
    assert torch.equal(result.losses[LEARNED], l2l.meta.evaluate(net, SMALL, range(3), 6))
    assert set(result.learning_rates) == {"sgd", "adam"} and {trial[0] for trial in trials} == {"sgd", "adam"}


def test_table_shows_means_intervals_and_data():
    result = made_up({LEARNED: 0.05, "sgd": 0.2, "nag": 0.1})
    text = comparisons.table(result)
    lines = text.splitlines()
    assert "Quadratic(dim=3" in lines[0]
    assert "random problems" in lines[1] and "5 fresh test tasks (the mean of 4 problems each)" in lines[1]
    assert lines[2].split() == ["step", "1", "10", "20", "40", "60", "80", "100", "sum"]
    rows = {line.split("  ")[0]: line for line in lines[4:]}
    assert list(rows)[0] == "learned LSTM"
    assert rows["SGD, lr 0.01"].split()[-2] == "0.2000" and rows["learned LSTM"].split()[-2] == "0.0500"
    assert len(re.findall("±", text)) == 1 + 3 * 8
    assert len({len(line) for line in lines[2:]}) == 1
    result.setups.update(sgd=Setup(0.01), nag=Setup(0.02, {"momentum": 0.95}, "cosine"))
    assert comparisons.table(result) == text + "\ntuned: SGD: lr 0.01; NAG: lr 0.02, momentum 0.95, cosine"
    assert comparisons.table(made_up({LEARNED: 0.05}, horizon=30)).splitlines()[2].split()[-2] == "30"


def test_data_sets_are_named():
    assert "mnist-10k-embedded" in comparisons.data_set(MNIST(data="mnist-10k-embedded"))
    assert "3,334" in comparisons.data_set(MNIST(data="mnist-10k-embedded"))


def last_five(curve: list[float]) -> float:
    return sum(curve[-5:]) / 5


def plain_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval of five values."""
    mean = sum(values) / 5
    return mean, 2.7764 * math.sqrt(sum((value - mean) ** 2 for value in values) / 4) / math.sqrt(5)


def test_verdict():
    result = made_up({LEARNED: 0.05, "sgd": 0.2, "nag": 0.1})
    below, sentence = comparisons.verdict(result)
    learned, other = ([last_five(row) for row in result.losses[name].tolist()] for name in (LEARNED, "nag"))
    mean, width = plain_interval([a - b for a, b in zip(learned, other)])
    percent = 100 * (sum(learned) / sum(other) - 1)
    assert below and sentence == (
        f"steps 96 to 100: the learned optimizer ends at {sum(learned) / 5:.4f}, the best baseline (NAG) at "
        f"{sum(other) / 5:.4f} ({percent:+.0f} %; paired difference {mean:.4f} ± {width:.4f}); lower on 5 of 5 test "
        "tasks"
    )
    below, sentence = comparisons.verdict(made_up({LEARNED: 0.11, "sgd": 0.2, "nag": 0.1}))
    assert not below and "+10 %" in sentence and "lower on 0 of 5" in sentence
    below, sentence = comparisons.verdict(made_up({LEARNED: math.inf, "nag": 0.1}))
    assert not below and "inf" in sentence
    below, sentence = comparisons.verdict(made_up({LEARNED: 0.1, "nag": math.inf}))
    assert below and "inf" in sentence
    assert "step 8: the learned" in comparisons.verdict(made_up({LEARNED: 0.1, "nag": 0.2}, horizon=8))[1]


def test_paired_differences_are_those_of_a_plain_computation():
    generator = torch.Generator().manual_seed(4)
    losses = {name: torch.rand(5, 101, generator=generator, dtype=torch.float64) for name in (LEARNED, "sgd", "nag")}
    hard = torch.tensor([1.0, 10, 100, 1000, 10000], dtype=torch.float64)[:, None]  # tasks differ far more than means
    result = Comparison(SMALL, {name: values + hard for name, values in losses.items()}, {"sgd": 0.1, "nag": 0.1})
    for name in ("sgd", "nag"):
        learned, other = ([last_five(row) for row in result.losses[each].tolist()] for each in (LEARNED, name))
        mean, width = plain_interval([a - b for a, b in zip(learned, other)])
        found = result.difference(name)
        assert found == pytest.approx((mean, width), rel=5e-3, abs=1e-6) and found[1] < 1
        assert result.wins(name) == (sum(a < b for a, b in zip(learned, other)), 5)
        assert result.finals(name).tolist() == pytest.approx(other)
    assert result.problem_wins("sgd") is None
    ends = {LEARNED: torch.tensor([[1.0, 5.0], [4.0, math.inf]]), "sgd": torch.tensor([[1.0, 6.0], [5.0, math.inf]])}
    result = Comparison(SMALL, result.losses, {}, by_problem=ends)
    assert result.problem_wins("sgd") == (2, 4) and result.problem_wins("nag") is None


def test_differences_to_what_diverged():
    result = made_up({LEARNED: 0.1, "sgd": 0.2})
    result.losses["sgd"][1, 50:] = math.inf
    assert result.difference("sgd")[0] == -math.inf and result.wins("sgd") == (5, 5)
    result.losses[LEARNED][2, 50:] = math.inf
    assert math.isnan(result.difference("sgd")[1]) and result.wins("sgd") == (4, 5)
    result.losses[LEARNED][1, 50:] = math.inf  # both on the same task
    assert result.wins("sgd") == (3, 5)


def test_ties_are_no_wins():
    result = made_up({LEARNED: 0.1, "sgd": 0.2, "nag": 0.1})
    below, sentence = comparisons.verdict(result)
    assert not below and "lower on 0 of 5" in sentence
    result.losses[LEARNED][2:, -1] *= 0.9
    below, sentence = comparisons.verdict(result)
    assert below and "lower on 3 of 5" in sentence


def test_the_best_baseline_is_that_of_the_lowest_mean_at_the_end():
    result = made_up({LEARNED: 0.01, "sgd": 0.2, "nag": 0.3, "adam": 0.25})
    result.losses["nag"][:4, -5:] = 0.0  # in most tasks, but not in the mean
    result.losses["nag"][4, -5:] = 1.2
    result.losses["adam"][:, :-5] = 0.0  # before the end
    assert result.best_baseline() == "sgd"
    result.losses["nag"][:, -1] = 0.0  # in the very last minibatch only
    result.losses["nag"][:, -5:-1] = 0.4
    assert result.best_baseline() == "sgd"
    result.losses["nag"][:, -5:-1] = 0.2
    assert result.best_baseline() == "nag"


def test_networks_trained_alike_are_summarized_over_networks():
    result = made_up({LEARNED: 0.1, "sgd": 0.2})
    assert result.over_networks() is None
    result.others.update({"seed 3": result.losses[LEARNED] * 3})
    assert result.over_networks() is None
    result.others.update({"seed 4": result.losses[LEARNED] * 5})
    mean, width, count = result.over_networks()
    one, other = (result.finals(LEARNED).mean().item() * factor for factor in (3, 5))
    assert count == 2 and mean == pytest.approx((one + other) / 2)
    assert width == pytest.approx(12.706 * (other - one) / 2, rel=1e-2)  # t for one degree of freedom
    assert set(result.to_json()["other_networks"]) == {"seed 3", "seed 4"}


def test_labels_and_settings():
    result = made_up({LEARNED: 0.1, "momentum": 0.2, "mine": 0.3})
    assert [result.label(name) for name in result.losses] == ["learned LSTM", "heavy ball, lr 0.01", "mine, lr 0.01"]
    assert [result.setting(name) for name in result.losses] == ["", "lr 0.01", "lr 0.01"]
    result.setups["momentum"] = Setup(0.02, {"momentum": 0.98}, "hold")
    assert result.setting("momentum") == "lr 0.02, momentum 0.98, hold"
    assert result.to_json()["results"]["momentum"]["setting"] == "lr 0.02, momentum 0.98, hold"


def test_every_number_of_the_table_is_a_mean_or_half_an_interval_of_its_step():
    result = made_up({LEARNED: 0.05, "sgd": 0.2}, horizon=30)
    result.losses["sgd"] *= torch.linspace(1, 4, 5, dtype=torch.float64)[:, None]  # mean and median differ
    rows = comparisons.table(result).splitlines()[4:]
    steps = [1, 10, 20, 30]
    for k, losses in enumerate(result.losses.values()):
        columns = [*(losses[:, t] for t in steps), losses[:, 1:].sum(1)]
        for cell, column in zip(rows[2 * k].split()[-5:], columns):
            assert float(cell) == pytest.approx(column.mean().item(), rel=2e-3)
        for cell, column in zip(rows[2 * k + 1].split(), columns):
            assert float(cell[1:]) == pytest.approx(2.776 * column.std().item() / 5**0.5, rel=2e-2)


def test_json_holds_what_the_table_shows():
    result = made_up({LEARNED: 0.05, "sgd": 0.2})
    for name, record in result.to_json()["results"].items():
        summary = summarize(result.losses[name])
        assert record["mean"] == summary.mean.tolist() and record["half_width_95"] == summary.half_width.tolist()
        assert record["sum"] == [summary.total, summary.total_half_width]
        assert record["learning_rate"] == result.learning_rates.get(name)
        assert record["finals"] == pytest.approx([last_five(row) for row in result.losses[name].tolist()], rel=1e-12)


def test_json_holds_no_infinities():
    result = made_up({LEARNED: 0.05, "sgd": 0.2})
    result.losses["sgd"][0, 50:] = math.inf
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record["results"]["sgd"]["mean"][50] is None and record["results"][LEARNED]["mean"][100] < 0.06
    assert record["problem"] == SMALL.config() and record["test_tasks"] == 5


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    result = made_up({LEARNED: 0.05, "sgd": 0.2, "nag": 0.1})
    result.losses["sgd"][:, 60:] = math.inf  # diverged: the line stops there
    path = l2l.plots.learning_curves([result, result], tmp_path / "sub" / "curves.png", titles=["a", "b"], heading="c")
    assert path.read_bytes().startswith(b"\x89PNG")
    svg = l2l.plots.learning_curves([result], tmp_path / "curves.svg").read_text()
    assert svg.count('<g id="axes_') == 1
    with pytest.raises(ValueError, match="titles"):
        l2l.plots.learning_curves([result], tmp_path / "x.png", titles=[])
    with pytest.raises(ValueError, match="comparisons"):
        l2l.plots.learning_curves([], tmp_path / "x.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        l2l.plots.learning_curves([made_up({LEARNED: 0.05, "nag": 0.1})], tmp_path / "x.png")


def test_the_settings_of_a_comparison_are_those_that_its_curves_were_made_with(tmp_path):
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.01)
    result = comparisons.compare(
        net, SMALL, 6, 3, tuning_episodes=2, names=("sgd", "nag"), search_options=QUICK, cache=tmp_path
    )
    for name, rate in result.learning_rates.items():
        found = l2l.baselines.search(SMALL, name, 6, seeds=range(2), cache=tmp_path / f"{name}.jsonl", **QUICK)
        setup = result.setups[name]
        assert setup == found.setup and rate == found.lr
        options = {"options": setup.options, "schedule": setup.schedule}
        assert torch.equal(result.losses[name], l2l.baselines.run(SMALL, name, rate, range(3), 6, **options))
