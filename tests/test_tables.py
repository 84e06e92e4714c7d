"""The table of a setting: every cell, the bold row and every verdict against the curves that they come from."""

from __future__ import annotations

import math

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation.baselines import Setup
from l2l_fast.evaluation.comparison import LEARNED, Comparison
from l2l_fast.evaluation.experiments import Setting, tables
from l2l_fast.evaluation.experiments.config import paper_curves

LABELS = {"learned LSTM": LEARNED, "SGD": "sgd", "heavy ball": "momentum", "NAG": "nag", "RMSprop": "rmsprop",
          "Adam": "adam", "AdamW": "adamw"}  # fmt: skip
NAMES = tuple(LABELS.values())
QUADRATIC = l2l.problems.Quadratic(dim=3, batch=4)
EMBEDDED = l2l.problems.MNIST(data="mnist-10k-embedded", hidden=(2,), batch_size=2)


class FakeData:
    """A data set that is not embedded."""

    name = "mnist"

    def split(self, name):
        return [0] * {"train": 50_000, "validation": 10_000, "test": 10_000}[name]


class Full(l2l.problems.MNIST):
    """MNIST as if all of it were here."""

    def __init__(self) -> None:
        super().__init__(data="mnist-10k-embedded", hidden=(2,), batch_size=2)
        self.data = FakeData()


def curves(horizon: int, seed: int = 1, problem=QUADRATIC, names=NAMES, **parts) -> Comparison:
    """Random curves, of which no two statistics agree."""
    generator = torch.Generator().manual_seed(seed)
    losses = {name: torch.randn(6, horizon + 1, generator=generator, dtype=torch.float64).exp() for name in names}
    rates = {name: 10.0**-k for k, name in enumerate(names) if name != LEARNED}
    setups = {name: Setup(rate, {"momentum": 0.5}, "linear") for name, rate in rates.items()}
    return Comparison(problem, losses, rates, 4, setups, **parts)


def flat(finals: dict[str, list[float]], horizon: int = 10, problem=QUADRATIC, **parts) -> Comparison:
    """Curves that stay where they are."""
    losses = {
        name: torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, horizon + 1)
        for name, values in finals.items()
    }
    return Comparison(problem, losses, {name: 0.1 for name in finals if name != LEARNED}, **parts)


def setting(horizon: int = 10, **options) -> Setting:
    return Setting("a", "A title", horizon=horizon, **options)


def rows(lines):
    """The header, and the cells of every row by its label; which rows are bold."""
    table = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    bold = {row[0].strip("*") for row in table[1:] if row[0].startswith("**")}
    for row in table[1:]:
        assert {cell.startswith("**") for cell in row if cell.strip()} == {row[0].startswith("**")}
    body = {row[0].strip("*"): dict(zip(table[0], (cell.strip("* ") for cell in row))) for row in table[1:]}
    assert len({len(row) for row in table}) == 1
    return table[0], body, bold


def statistics(column: torch.Tensor) -> tuple[float, float]:
    values = column.tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, 2.5706 * deviation / math.sqrt(len(values))  # Student's t for six tasks


def assert_cell(cell: str, column: torch.Tensor) -> None:
    mean, width = (float(part) for part in cell.split(" ± "))
    expected, half = statistics(column)
    assert mean == pytest.approx(expected, abs=6e-3, rel=1e-3) and width == pytest.approx(half, abs=6e-3, rel=3e-3)


@pytest.mark.parametrize(
    "horizon, steps, window", [(100, [20, 100], 5), (30, [20, 30], 2), (8, [8], 1), (200, [20, 100, 200], 10)]
)
def test_every_cell(horizon, steps, window):
    result = curves(horizon)
    header, body, bold = rows(tables.section(setting(horizon), result, 7))
    when = f"step {horizon}" if window == 1 else f"steps {horizon - window + 1} to {horizon}"
    assert header == ["optimizer", "tuned", *(f"step {step}" for step in steps), f"final ({when})", "median",
                      "learned minus it", "learned lower on", "sum"]  # fmt: skip
    assert list(body) == list(LABELS)
    learned = result.losses[LEARNED][:, -window:].mean(1)
    means = {}
    for label, cells in body.items():
        name = LABELS[label]
        losses = result.losses[name]
        tuned = "" if name == LEARNED else f"lr {result.learning_rates[name]:.3g}, momentum 0.5, linear"
        assert cells["tuned"] == tuned
        for step in steps:
            assert float(cells[f"step {step}"]) == pytest.approx(losses[:, step].mean().item(), abs=6e-3, rel=1e-3)
        finals = losses[:, -window:].mean(1)
        means[label] = finals.mean().item()
        assert_cell(cells[f"final ({when})"], finals)
        assert float(cells["median"]) == pytest.approx(finals.median().item(), abs=6e-3, rel=1e-3)
        assert_cell(cells["sum"], losses[:, :-1].sum(1))
        if name == LEARNED:
            assert cells["learned minus it"] == cells["learned lower on"] == ""
        else:
            # Paired: both had the same tasks, so the width is that of the differences.
            assert_cell(cells["learned minus it"], learned - finals)
            lower = sum(a < b for a, b in zip(learned.tolist(), finals.tolist()))
            assert cells["learned lower on"] == f"{lower} of 6"
    assert bold == {min(means, key=means.__getitem__)}


def test_the_paper_s_curves_are_a_column():
    name = next(each.paper for each in l2l.experiments.load("mnist").settings if each.paper)
    _, body, _ = rows(tables.section(setting(100, paper=name), curves(100), 7))
    published = paper_curves(name)
    for label, cells in body.items():
        cell = cells["paper, step 100"]
        if LABELS[label] in published:
            assert float(cell) == pytest.approx(published[LABELS[label]][1][-1], abs=6e-5, rel=1e-3)
        else:
            assert cell == "" and label in ("heavy ball", "AdamW")


def test_paired_differences_are_sharp_where_tasks_differ():
    hard = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    result = flat({LEARNED: [value - 0.5 for value in hard], "nag": hard})
    lines = tables.section(setting(), result, 7)
    cells = rows(lines)[1]["NAG"]
    assert cells["learned minus it"] == "-0.5000 ± 0" and cells["learned lower on"] == "6 of 6"
    assert "- final loss 10.00: below the best baseline (NAG, 10.50)" in lines


def test_problem_by_problem():
    ends = {
        LEARNED: torch.tensor([[1.0, 5.0, 2.0], [4.0, 4.0, 1.0]]),
        "nag": torch.tensor([[2.0, 4.0, 2.0], [8.0, 5.0, 2.0]]),
    }
    result = flat({LEARNED: [2.0, 3.0], "nag": [3.0, 5.0], "adam": [9.0, 9.0]}, by_problem=ends)
    _, body, _ = rows(tables.section(setting(), result, 7))
    assert body["NAG"]["problems"] == "67 %" and body["Adam"]["problems"] == body["learned LSTM"]["problems"] == ""
    assert (body["learned LSTM"]["median problem"], body["NAG"]["median problem"]) == ("2.0000", "2.0000")
    assert body["Adam"]["median problem"] == ""


def test_held_out_errors():
    wrong = {LEARNED: torch.tensor([0.1, 0.2, 0.3]), "nag": torch.tensor([0.5, math.inf, 0.5])}
    result = flat({LEARNED: [1.0] * 3, "nag": [2.0] * 3, "sgd": [3.0] * 3}, errors=wrong)
    _, body, _ = rows(tables.section(setting(), result, 7))
    assert [cells["test error"] for cells in body.values()] == ["20.00 ± 24.84 %", "diverged", ""]


@pytest.mark.parametrize("who", [LEARNED, "nag", "both"])
def test_diverged_runs(who):
    finals = {LEARNED: [1.0, 2.0], "nag": [3.0, 4.0], "sgd": [5.0, 6.0]}
    for name in (LEARNED, "nag") if who == "both" else (who,):
        finals[name][1] = math.inf
    lines = tables.section(setting(), flat(finals), 7)
    _, body, bold = rows(lines)
    final = "final (step 10)"
    if who == "nag":
        assert body["NAG"][final] == body["NAG"]["step 10"] == "diverged" and bold == {"learned LSTM"}
        assert body["NAG"]["learned minus it"] == "it diverged" and body["NAG"]["learned lower on"] == "2 of 2"
        assert "- final loss 1.5000: below the best baseline (SGD, 5.5000)" in lines
    else:
        assert body["learned LSTM"][final] == "diverged"
        assert body["SGD"]["learned minus it"] == body["NAG"]["learned minus it"] == "diverged"
        best = "NAG, 3.5000" if who == LEARNED else "SGD, 5.5000"
        assert f"- final loss diverged: **not below the best baseline ({best})**" in lines


VERDICTS = [
    # Differences of four tasks to the best baseline.
    ([-0.5, -0.6, -0.5, -0.4], "below the best baseline"),
    ([0.5, 0.6, 0.5, 0.4], "**not below the best baseline"),
    ([-0.5, 0.6, 0.5, -0.5], "on par with the best baseline"),
    ([-0.5, 0.1, 0.1, -0.2], "on par with the best baseline"),
    ([0.5, -0.1, -0.1, 0.2], "on par with the best baseline"),
    ([0.0, 0.0, 0.0, 0.0], "on par with the best baseline"),
    # Three quarters and five quarters of half the interval.
    ([0.518, 0.082, 0.518, 0.082], "on par with the best baseline"),
    ([-0.518, -0.082, -0.518, -0.082], "on par with the best baseline"),
    ([0.431, 0.169, 0.431, 0.169], "**not below the best baseline"),
    ([-0.431, -0.169, -0.431, -0.169], "below the best baseline"),
]


@pytest.mark.parametrize("differences, words", VERDICTS)
def test_the_words_about_the_best_baseline(differences, words):
    base = [1.0, 20.0, 3.0, 40.0]
    finals = {LEARNED: [a + b for a, b in zip(base, differences)], "nag": base, "adam": [value + 1 for value in base]}
    lines = tables.section(setting(), flat(finals), 7)
    mean = 16 + sum(differences) / 4
    bold = "**" if words.startswith("**") else ""
    assert f"- final loss {mean:.2f}: {words} (NAG, 16.00){bold}" in lines
    # Bold is the lowest, also where that is not the learned one.
    assert rows(lines)[2] == ({"NAG"} if mean > 16 else {"learned LSTM"})


@pytest.mark.parametrize("learned, words", [(0.9, "below"), (1.0, "**not below"), (1.1, "**not below")])
def test_a_single_task_has_no_interval(learned, words):
    lines = tables.section(setting(), flat({LEARNED: [learned], "nag": [1.0]}), 7)
    start = f"- final loss {learned:.4f}: {words} the best baseline (NAG, 1.0000)"
    assert any(line.startswith(start) for line in lines)
    assert rows(lines)[1]["NAG"]["final (step 10)"] == "1.0000"


def test_the_best_baseline_is_the_best_in_the_last_twentieth():
    result = flat({LEARNED: [1.0] * 3, "nag": [2.0] * 3, "adam": [3.0] * 3}, horizon=100)
    result.losses["nag"][:, -1] = 9.0  # one minibatch is noise: 3.4 in the mean of five
    assert any("below the best baseline (Adam, 3.0000)" in line for line in tables.section(setting(100), result, 7))
    result.losses["nag"][:, -1] = 6.9
    assert any("below the best baseline (NAG, 2.9800)" in line for line in tables.section(setting(100), result, 7))


def test_networks_trained_alike():
    result = flat({LEARNED: [1.0, 2.0], "nag": [9.0, 9.5]})
    others = {f"seed {k}": result.losses[LEARNED] * factor for k, factor in enumerate((1.0, 1.2, 1.7))}
    (line,) = [
        line
        for line in tables.section(setting(), Comparison(QUADRATIC, result.losses, {"nag": 0.1}, others=others), 7)
        if "alike" in line
    ]
    finals = [1.5, 1.8, 2.55]
    deviation = math.sqrt(sum((value - 1.95) ** 2 for value in finals) / 2)
    width = 4.3027 * deviation / math.sqrt(3)
    words = line.split(" ± ")
    assert words[0] == "- 3 networks trained alike from other seeds: final loss 1.9500"
    assert float(words[1][:6]) == pytest.approx(width, rel=1e-3)
    assert words[1][6:] == " (95 % interval over networks; seed 0 1.5000, seed 1 1.8000, seed 2 2.5500)"
    for few in ({}, dict(list(others.items())[:1])):
        comparison = Comparison(QUADRATIC, result.losses, {"nag": 0.1}, others=few)
        assert not any("alike" in line for line in tables.section(setting(), comparison, 7))
        assert comparison.over_networks() is None


def published(result, target, **options):
    lines = tables.section(setting(result.horizon, target=target, **options), result, 7)
    return [line for line in lines if line.startswith("- published")]


def test_published_numbers_are_compared_with_their_own_step():
    result = curves(10, 4)
    losses = result.losses[LEARNED]
    columns = {"4": losses[:, 4], "10": losses[:, 10], "sum": losses[:, :-1].sum(1)}
    for place, word in ((0.0, "on par"), (0.95, "on par"), (-0.95, "on par"), (1.05, "below"), (-1.05, "ABOVE")):
        target = {}
        for key, column in columns.items():
            mean, width = statistics(column)
            target[key] = mean + place * width
        found = published(result, target)
        assert len(found) == 3
        for line, (step, value) in zip(found, target.items()):
            what = "sum" if step == "sum" else f"step {step}"
            mean, width = statistics(columns[step])
            numbers = f"{tables.number(mean)} ± {tables.number(width)}"
            assert line.startswith(f"- published {what} {value:.4g}: {word} ({numbers[:6]}")


def test_at_the_end_the_paper_s_last_twentieth_is_compared_with_ours():
    name = next(each.paper for each in l2l.experiments.load("mnist").settings if each.paper)
    last = paper_curves(name)[LEARNED][1][-5:]
    theirs = sum(last) / 5
    for factor, word in ((0.5, "below"), (1.0, "on par"), (2.0, "ABOVE")):
        result = flat({LEARNED: [theirs * factor * k for k in (0.99, 1.0, 1.01)], "nag": [9.0] * 3}, horizon=100)
        result.losses[LEARNED][:, :96] = 7.0
        (line,) = published(result, {"100": last[-1]}, paper=name)
        ours = tables.number(theirs * factor)
        assert line.startswith(f"- published mean of steps 96 to 100 {theirs:.4g}: {word} ({ours} ±")


@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_only_like_is_compared_with_like(split):
    embedded = flat({LEARNED: [0.1, 0.2], "nag": [1.0, 1.0]}, problem=EMBEDDED)
    full = flat({LEARNED: [0.1, 0.2], "nag": [1.0, 1.0]}, problem=Full())
    for target in ({"10": 9.0}, {"4": 9.0}, {"sum": 9.0}):
        (line,) = published(embedded, target, split=split)
        assert ": not comparable, these are the embedded images (" in line
        (line,) = published(full, target, split=split)
        words = ": not like for like, 10,000 images are memorised sooner than the paper's ("
        assert (words in line) == (split != "train")
        assert (": below (" in line) == (split == "train")
        (line,) = published(flat({LEARNED: [0.1, 0.2], "nag": [1.0, 1.0]}), target, split=split)
        assert ": below (" in line  # random problems have no images


def test_what_the_numbers_are_of():
    lines = tables.section(setting(), curves(10), 7)
    tasks = "6 fresh test tasks (the mean of 4 problems each)"
    assert lines[0] == "## A title"
    assert lines[2].startswith(f"{tasks}; baselines tuned on 7 tasks; random problems, drawn afresh; `Quadratic(")
    assert lines[2].endswith("`.") and "images" not in lines[2]
    for split in ("test", "train"):
        line = tables.section(setting(split=split, transfer=True), curves(10, problem=EMBEDDED), 3)[2]
        assert f"each), {split} images; baselines tuned on 3 tasks; mnist-10k-embedded (images: train " in line
        assert line.endswith("; the optimizer was not trained for this.")


def test_baselines_alone_have_no_verdict():
    lines = tables.section(setting(target={"10": 1.0}), curves(10, names=("sgd", "nag")), 7)
    header, body, _ = rows(lines)
    assert list(body) == ["SGD", "NAG"] and "learned minus it" not in header
    assert not any(line.startswith("- ") for line in lines)


def test_numbers():
    shown = {
        123.456: "123.5",
        99.996: "100.00",
        12.3456: "12.35",
        1.23456: "1.2346",
        0.01234: "0.0123",
        0.0001994: "0.0002",
        1.994e-7: "2e-07",
        0.0: "0",
        -150.26: "-150.3",
    }
    assert {value: tables.number(value) for value in shown} == shown
    assert tables.number(math.inf) == tables.number(math.nan) == "diverged"
