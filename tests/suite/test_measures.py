"""Ratios, interquartile means, intervals and wins, against what one computes by hand."""

from __future__ import annotations

import math

import pytest

from l2l_fast.evaluation.suite import measures
from l2l_fast.evaluation.suite.curves import summarise
from l2l_fast.evaluation.suite.networks import NETWORKS
from l2l_fast.evaluation.suite.outcome import ADAMS, MUONS, TUNED, USUAL_NAME, Baseline, Outcome, Row, summary
from tests.suite.helpers import falling

INF = math.inf


def level(value, steps=1000, start=9.0):
    return summarise([value] * steps, steps, start)


@pytest.mark.parametrize(
    "loss, other, expected",
    [(1.0, 2.0, -math.log(2)), (2.0, 1.0, math.log(2)), (INF, 1.0, INF), (1.0, INF, -INF), (INF, INF, 0.0)]
    + [(math.nan, 1.0, INF), (0.0, 0.0, 0.0), (0.0, 1.0, -INF), (1.0, 0.0, INF)],
)
def test_log_ratio(loss, other, expected):
    assert measures.log_ratio(loss, other) == pytest.approx(expected)


def test_ratios_are_paired_by_seed():
    runs, others = [level(1.0), level(4.0)], [level(2.0), level(2.0)]
    found = measures.log_ratios(runs, others, lambda run: run.final)
    assert found == pytest.approx([-math.log(2), math.log(2)])
    with pytest.raises(ValueError, match="expected 2 runs, got 1"):
        measures.log_ratios(runs, others[:1], lambda run: run.final)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([3.0], 3.0),
        ([1.0, 2.0], 1.5),
        ([0.0, 1.0, 2.0, 99.0], 1.5),
        ([5.0, -7.0, 1.0, 2.0, 3.0, 4.0, 99.0, 0.0], 2.5),
        # Of five the middle 2.5 count: 1, and three quarters of each neighbour.
        ([0.0, 1.0, 2.0, 4.0, 50.0], (0.75 * 1.0 + 2.0 + 0.75 * 4.0) / 2.5),
        ([-INF, 0.0, 1.0, INF], 0.5),
        ([0.0, 1.0, INF, INF], INF),
    ],
)
def test_interquartile_mean(values, expected):
    assert measures.interquartile_mean(values) == pytest.approx(expected)


def test_the_interquartile_mean_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, -1.0, 2.5, 0.7, 0.1, 4.0, -0.2, 1.1, 0.9, -3.0, 0.0, 0.6, 0.5, 1.9, 7.0, -0.4]
    assert measures.interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25))
    with pytest.raises(ValueError, match="at least one"):
        measures.interquartile_mean([])


def test_intervals_hold_the_mean_and_repeat():
    ratios = {str(k): [0.1 * k - 0.05, 0.1 * k, 0.1 * k + 0.05] for k in range(-8, 9)}
    low, high = measures.interval(ratios)
    assert low < 0 < high and high - low < 1.0
    assert (low, high) == measures.interval(ratios)
    assert measures.interval({"a": [0.5, 0.5]}) == (0.5, 0.5)
    assert measures.interval({"a": [INF], "b": [0.0]})[1] == INF


def test_a_summary():
    found = summary({"a": [-1.0, -1.0], "b": [-0.5, 0.3], "c": [0.2, 0.4], "d": [0.0, 0.0]})
    assert (found.wins, found.clear_wins, found.networks) == (2, 1, 4)
    assert found.worst == pytest.approx(0.3) and found.worst_on == "c"
    assert found.iqm == pytest.approx((-0.1 + 0.0) / 2)
    assert summary({"a": [INF, 0.0], "b": [-INF, INF]}).worst == INF


def test_the_lowest_baseline():
    choices = {"a": [level(1.0), level(4.0)], "b": [level(1.9), level(1.9)], "c": [level(0.1), level(INF)]}
    assert measures.lowest(choices) == "b"
    with pytest.raises(ValueError, match="at least one"):
        measures.lowest({})


def outcome():
    """Of three networks: on one the contender has half of tuned Adam's loss, on one it diverges, on one it ends between
    Adam at 1e-3 and tuned Adam."""

    def baselines():
        found = {USUAL_NAME: Baseline("Adam 0.001", [level(2.0)] * 2), TUNED: Baseline("Adam 0.01", [level(1.0)] * 2)}
        found["muon cosine"] = Baseline("Muon 0.01 cosine", [level(0.75)] * 2)
        found["muon constant"] = Baseline("Muon 0.1", [level(0.8)] * 2)
        return {**found, "adamw cosine": Baseline("AdamW 0.01 cosine", [level(0.25)] * 2, edge=True)}

    rows = {"softmax": [level(0.5), level(0.5)], "conv": [level(INF), level(3.0, start=2.0)]}
    rows["gru"] = [level(1.5), level(1.5)]
    return Outcome(
        "x", 1000, {name: Row(NETWORKS[name], "made up", runs, baselines()) for name, runs in rows.items()}, []
    )


def test_an_outcome():
    found = outcome()
    assert found.diverged() == {"conv": 2}
    assert found.not_below_usual() == ["conv"]
    tuned, best = found.against([TUNED]), found.against([TUNED, "adamw cosine", "not there"])
    assert tuned.worst == INF and tuned.worst_on == "conv" and tuned.wins == 1
    assert found.rows["softmax"].ratios(TUNED) == pytest.approx([-math.log(2)] * 2)
    assert found.rows["softmax"].ratios("adamw cosine") == pytest.approx([math.log(2)] * 2)
    assert best.wins == 0 and found.against(["nag constant"]) is None
    assert found.early(100).wins == 1 and found.early(100).worst == INF


def test_early_ratios_are_of_the_losses_then():
    baselines = {TUNED: Baseline("", [falling()])}
    found = Outcome("x", 1000, {"softmax": Row(NETWORKS["softmax"], "", [falling(rate=2.0)], baselines)})
    assert found.early(100).iqm == pytest.approx(-math.log(101), abs=0.02)
    assert found.early(300).iqm == pytest.approx(-math.log(301), abs=0.02)
    short = {TUNED: Baseline("", [falling(80)])}
    assert Outcome("x", 80, {"softmax": Row(NETWORKS["softmax"], "", [falling(80)], short)}).early(100) is None


def test_a_tables_cells():
    from l2l_fast.evaluation.suite import report

    text = report.text([outcome()])
    assert "| diverged runs of 6 | 2 (conv 2) |" in text
    assert "| below Adam 0.001 on | 2 of 3; not: conv |" in text
    assert "is at an edge of its search" in text and "2 of 2 diverged" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| softmax |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["9.0000", "0.5000", "2.0000", "1.0000 (Adam 0.01)", "0.2500 (AdamW 0.01 cosine)"]
    assert cells[6:8] == ["", "0.7500 (Muon 0.01 cosine)"]
    assert cells[8:13] == ["-0.69", "+0.69", "", "-0.41", ">1,000"]
    header = next(line for line in text.splitlines() if line.startswith("| network |"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names[5:12] == [
        "best Adam(W)", "tuned NAG", "tuned Muon", "ln to tuned Adam", "ln to best Adam(W)", "ln to NAG", "ln to Muon",
    ]  # fmt: skip
    assert "| ... lower on (tuned Muon) | 1 of 3, every seed on 1 |" in text and "ln ratio to tuned NAG" not in text


def test_muon_is_the_lower_of_two_and_no_adam():
    found = outcome()
    assert found.rows["softmax"].best(MUONS) == "muon cosine" and not set(MUONS) & set(ADAMS)
    ratios = found.to_json()["ln ratios"]
    assert ratios["Muon"]["wins"] == 1 and ratios["best Adam(W)"]["wins"] == 0 and "NAG" not in ratios
    assert found.rows["gru"].ratios("muon cosine") == pytest.approx([math.log(2)] * 2)
    assert found.to_json()["networks"]["gru"]["baselines"]["muon cosine"]["setting"] == "Muon 0.01 cosine"


def test_a_pictures_legend_has_the_baselines_that_are_there(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from l2l_fast.evaluation import plots
    from l2l_fast.evaluation.suite import pictures

    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    pictures.curves([outcome()], tmp_path / "x.png")
    (legend,) = drawn[0].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["Adam 0.001", "tuned Adam", "best Adam(W)", "tuned Muon", "x"]
