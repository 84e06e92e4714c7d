"""The ledger of evidence: one line for each setting and release, and no second optimizer on the same sealed tasks."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.cli import command_line as cli
from l2l_fast.evaluation import baselines, experiments
from l2l_fast.evaluation.baselines import final_losses
from l2l_fast.evaluation.comparison import LEARNED
from l2l_fast.evaluation.experiments import evidence, measuring
from l2l_fast.networks import pretrained
from l2l_fast.networks.record import attach
from l2l_fast.problems import Quadratic, sealed
from tests.helpers import random_network, recorded_samples
from tests.test_experiments import small

QUICK = {"schedules": ["constant"], "points_per_decade": 2, "options": {}}
SETTINGS = [
    {"name": "test", "title": "One", "horizon": 4, "baselines": ["sgd", "nag"], "search": QUICK},
    {"name": "train", "title": "Two", "horizon": 31, "baselines": ["sgd"], "split": "train", "search": QUICK},
]
RELEASE = sealed.RELEASES[-1]


def made(seed: int):
    net = random_network(seed=seed, hidden_size=4, preprocess="identity", output_scale=0.05)
    attach(net, {"seed": seed})
    return net


@pytest.fixture
def shipped(monkeypatch):
    """The optimizer "mine" of the package and two that were trained alike; to be exchanged."""
    nets = {"mine": made(0), "alike": {"seed 5": made(5), "seed 6": made(6)}}
    monkeypatch.setattr(pretrained, "names", lambda: ("mine",))
    monkeypatch.setattr(pretrained, "load_pretrained", lambda name, device="cpu": nets[name])
    monkeypatch.setattr(pretrained, "trained_alike", lambda name, device="cpu": nets["alike"])
    return nets


def experiment(tmp_path, **changes):
    given = {"settings": SETTINGS, "pretrained": "mine", "candidates": [{"seed": 0}], "selection": []}
    return small(tmp_path, **{**given, **changes})


def measure(tmp_path, out="out", given=None, **options):
    given = experiment(tmp_path) if given is None else given
    return evidence.measure(given, tmp_path / out, tmp_path / "ledger.jsonl", progress=False, **options)


def lines_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch, request):
    """They take long, and tests/test_pictures.py looks at them."""
    monkeypatch.setattr(measuring.report, "draw", lambda *arguments: None)


def test_the_first_measurement_writes_a_line_for_each_setting(tmp_path, shipped, monkeypatch):
    calls = recorded_samples(monkeypatch)
    outcome, said = measure(tmp_path)
    assert said == [f"{name}: written to {tmp_path / 'ledger.jsonl'}" for name in ("test", "train")]
    lines = lines_of(tmp_path)
    assert [line["setting"] for line in lines] == ["test", "train"]
    first = sealed.seeds(1, RELEASE)[0]
    nets = {LEARNED: shipped["mine"], **shipped["alike"]}
    for line, setting in zip(lines, SETTINGS):
        assert (line["release"], line["experiment"], line["version"]) == (RELEASE, "small", l2l.__version__)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"]) and line["torch"] == torch.__version__
        assert line["problem"] == Quadratic(dim=3, batch=4).config() and line["horizon"] == setting["horizon"]
        assert line["split"] == setting.get("split", "test") and line["seeds"] == [first, 3]
        assert line["baselines"] == setting["baselines"]
        assert line["networks"] == {name: evidence.weights_digest(net) for name, net in nets.items()}
        assert len(set(line["networks"].values())) == 3
        # Every candidate's score, and it is what the sealed tasks give.
        problem, horizon, split = Quadratic(dim=3, batch=4), line["horizon"], line["split"]
        comparison = outcome.comparisons[line["setting"]]
        assert list(line["results"]) == [LEARNED, *line["baselines"]]
        assert list(line["trained alike"]) == ["seed 5", "seed 6"]
        with sealed.opened(RELEASE):
            curves = {name: l2l.meta.evaluate(net, problem, range(first, first + 3), horizon, split=split)
                      for name, net in nets.items()}  # fmt: skip
            for name in line["baselines"]:
                setup = comparison.setups[name]
                options = {"options": setup.options, "schedule": setup.schedule, "split": split}
                curves[name] = baselines.run(problem, name, setup.lr, range(first, first + 3), horizon, **options)
        for name, result in line["results"].items():
            finals = final_losses(curves[name])
            assert result["finals"] == pytest.approx(finals.tolist(), rel=1e-4)
            assert result["final"] == pytest.approx(finals.mean().item(), rel=1e-4)
            assert result["last"] == pytest.approx(curves[name][:, -1].mean().item(), rel=1e-4)
            assert result["setting"] == comparison.setting(name) and (name == LEARNED) == (result["setting"] == "")
        for name, final in line["trained alike"].items():
            assert final == pytest.approx(final_losses(curves[name]).mean().item(), rel=1e-4)
    # Tuning saw validation tasks only, and everything else the sealed ones of its split.
    tuned = {(seed, split) for seed, split, _ in calls if sealed.release_of(seed) is None and split != "test"}
    assert tuned == {(0, "validation")}
    seen = {(seed, split) for seed, split, _ in calls if sealed.release_of(seed) is not None}
    assert seen == {(first + k, split) for k in range(3) for split in ("test", "train")}
    assert {(seed, split) for seed, split, _ in calls} - seen - tuned <= {(0, "test")}  # how many problems there are
    text = outcome.table.read_text()
    assert f"Measured on the sealed tasks of release {RELEASE}" in text and "evidence small" in text


def test_measuring_again_changes_nothing_and_is_compared(tmp_path, shipped):
    measure(tmp_path)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    for out in ("out", "elsewhere"):
        _, said = measure(tmp_path, out)
        assert all("agrees with the ledger (within 10 %; 20" in each for each in said) and len(said) == 2
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("who", ["learned", "nag", "seed 6"])
@pytest.mark.parametrize("change, agrees", [(1.05, True), (0.95, True), (1.2, False), (0.8, False), (None, False)])
def test_what_differs_is_said_and_never_written(tmp_path, shipped, who, change, agrees):
    given = replace(experiment(tmp_path), settings=experiment(tmp_path).settings[:1])
    measure(tmp_path, given=given)
    (line,) = lines_of(tmp_path)
    scores = line["trained alike"] if who.startswith("seed") else line["results"][who]
    key = who if who.startswith("seed") else "final"
    scores[key] = None if change is None else scores[key] * change
    (tmp_path / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    _, (said,) = measure(tmp_path, given=given)
    assert ("agrees" in said) == agrees and lines_of(tmp_path) == [line]
    if not agrees:
        assert re.search(
            rf"DIFFERS from the ledger of {line['date']}: mean final losses {who} [0-9.e-]+ \(ledger: ", said
        )
        assert said.count("ledger: ") == 1  # only who differs


def test_a_setting_more_is_a_line_more(tmp_path, shipped):
    _, said = measure(tmp_path, settings=["train"])
    assert len(said) == 1 and [line["setting"] for line in lines_of(tmp_path)] == ["train"]
    before = lines_of(tmp_path)
    _, said = measure(tmp_path)
    assert "test: written" in said[0] and "train: agrees" in said[1]
    assert lines_of(tmp_path)[:1] == before and [line["setting"] for line in lines_of(tmp_path)] == ["train", "test"]


def test_another_release_has_lines_of_its_own(tmp_path, shipped, monkeypatch):
    monkeypatch.setattr(sealed, "RELEASES", (*sealed.RELEASES, "9.9"))
    measure(tmp_path, settings=["train"])
    shipped["mine"] = made(7)
    _, (said,) = measure(tmp_path, settings=["train"], release="9.9")
    one, other = lines_of(tmp_path)
    assert "written" in said and other["release"] == "9.9"
    assert other["seeds"] == [sealed.seeds(1, "9.9")[0], 3] != one["seeds"]
    assert other["networks"][LEARNED] != one["networks"][LEARNED]


def other_net(shipped, tmp_path):
    shipped["mine"] = made(1)


def another_alike(shipped, tmp_path):
    shipped["alike"] = {"seed 5": made(5), "seed 6": made(8)}


def one_alike_less(shipped, tmp_path):
    shipped["alike"] = {"seed 5": made(5)}


def changed(**changes):
    return lambda shipped, tmp_path: [{**setting, **changes} for setting in SETTINGS]


@pytest.mark.parametrize(
    "change, options, what",
    [
        (other_net, {}, "networks"),
        (another_alike, {}, "networks"),
        (one_alike_less, {}, "networks"),
        (None, {"test_episodes": 4}, "seeds"),
        (None, {"test_episodes": 2}, "seeds"),
        (changed(baselines=["sgd"]), {}, "baselines"),
        (changed(baselines=["sgd", "nag", "adam"]), {}, "baselines"),
        (changed(horizon=5), {}, "horizon"),
        (changed(split="train"), {}, "split"),
        (changed(problem={"batch": 5}), {}, "problem"),
        (changed(test_episodes=9), {}, "seeds"),
    ],
)
def test_spent_tasks_are_refused_before_any_is_sampled(tmp_path, shipped, monkeypatch, change, options, what):
    measure(tmp_path)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    settings = change(shipped, tmp_path) if change else None
    given = experiment(tmp_path) if settings is None else experiment(tmp_path, settings=settings)
    calls = recorded_samples(monkeypatch)
    monkeypatch.setattr(evidence, "evaluate_experiment", lambda *a, **k: pytest.fail("it was measured"))
    with pytest.raises(
        ValueError, match=rf"(?s)release {RELEASE} for 'small', setting .test., were spent on 20.* {what}: "
    ):
        measure(tmp_path, given=given, **options)
    assert not calls and (tmp_path / "ledger.jsonl").read_bytes() == before
    with pytest.raises(sealed.SealedError):
        Quadratic(dim=3).sample(sealed.seeds(1)[0])


def test_one_spent_setting_spoils_all_that_are_asked_for(tmp_path, shipped):
    measure(tmp_path, settings=["train"])
    shipped["mine"] = made(1)
    with pytest.raises(ValueError, match="setting 'train', were spent"):
        measure(tmp_path, "new")
    assert len(lines_of(tmp_path)) == 1 and not (tmp_path / "new").exists()


def test_what_one_setting_was_spent_on_is_measured_on_the_others_too(tmp_path, shipped):
    measure(tmp_path, settings=["train"])
    shipped["mine"] = made(1)
    with pytest.raises(ValueError, match="measured other networks on setting 'train' of 'small'"):
        measure(tmp_path, "new", settings=["test"])
    assert len(lines_of(tmp_path)) == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{line}\n{line}\n", "has two entries for .*'small', 'train'., line 2 is the second"),
        ("{line}\nnot json\n", "line 2 of .* is no entry of evidence"),
        ("{line}\n\n", "line 2 of .* is no entry of evidence"),
        ("[]\n", "line 1 of .* is no entry of evidence"),
        ('{"release": "0.2"}\n', "line 1 of .* is no entry of evidence: KeyError"),
        ('{"release": "0.2", "experiment": "a", "setting": "b", "networks": {}}\n', "line 1 of .*'results'"),
        ("{half}", "line 1 of .* is no entry of evidence"),
    ],
)
def test_a_damaged_ledger_is_no_ledger(tmp_path, shipped, monkeypatch, content, message):
    measure(tmp_path, settings=["train"])
    line = (tmp_path / "ledger.jsonl").read_text().strip()
    text = content.replace("{line}", line).replace("{half}", line[:-30])
    (tmp_path / "ledger.jsonl").write_text(text)
    calls = recorded_samples(monkeypatch)
    with pytest.raises(ValueError, match=f"ledger: .*{message}"):
        measure(tmp_path, "new", settings=["test"])
    assert not calls and (tmp_path / "ledger.jsonl").read_text() == text and not (tmp_path / "new").exists()


def test_where_the_ledger_cannot_be_it_is_said_before_anything_is_sampled(tmp_path, shipped, monkeypatch):
    calls = recorded_samples(monkeypatch)
    (tmp_path / "file").write_text("")
    for ledger, error in ((tmp_path, IsADirectoryError), ("", ValueError), (5, TypeError),
                          (tmp_path / "file" / "x", NotADirectoryError)):  # fmt: skip
        with pytest.raises(error, match="ledger: "):
            evidence.measure(experiment(tmp_path), tmp_path / "out", ledger, progress=False)
    assert not calls and not (tmp_path / "out").exists()
    evidence.measure(experiment(tmp_path), tmp_path / "out", tmp_path / "new" / "x", progress=False, settings=["train"])
    assert (tmp_path / "new" / "x").read_text().count("\n") == 1


@pytest.mark.parametrize(
    "options, changes, message",
    [
        ({"settings": ["none"]}, {}, "setting: expected one of .'test', 'train'.*'none'"),
        ({"release": "0.1"}, {}, "release: expected one of"),
        ({"test_episodes": 0}, {}, "count: expected 1..1000000 sealed tasks, got 0"),
        ({}, {"pretrained": ""}, "'small' has no optimizer in the package to measure"),
        ({}, {"pretrained": "other"}, "'small' has no optimizer in the package to measure"),
    ],
)
def test_what_cannot_be_measured(tmp_path, shipped, options, changes, message):
    with pytest.raises(ValueError, match=message):
        measure(tmp_path, given=experiment(tmp_path, **changes), **options)
    assert not (tmp_path / "ledger.jsonl").exists() and not (tmp_path / "out").exists()


def test_a_measurement_that_fails_leaves_no_line_and_closes(tmp_path, shipped, monkeypatch):
    def fail(*arguments, **options):
        Quadratic(dim=3).sample(sealed.seeds(1)[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evidence, "evaluate_experiment", fail)
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path)
    assert not (tmp_path / "ledger.jsonl").exists()
    with pytest.raises(sealed.SealedError):
        Quadratic(dim=3).sample(sealed.seeds(1)[0])


def test_diverged_scores_are_null(tmp_path, shipped):
    with torch.no_grad():
        shipped["alike"]["seed 5"].bias_out.fill_(1e30)
    measure(tmp_path, settings=["test"])
    (line,) = lines_of(tmp_path)
    assert line["trained alike"]["seed 5"] is None and line["trained alike"]["seed 6"] is not None
    _, (said,) = measure(tmp_path, settings=["test"])
    assert "agrees" in said


def test_held_out_errors_are_scores(tmp_path, shipped):
    problem = {"name": "mnist", "data": "mnist-10k-embedded", "hidden": [4], "batch_size": 64, "init_std": 0.1}
    shipped["alike"] = {}
    settings = [{**setting, "horizon": 10, "baselines": ["nag"]} for setting in SETTINGS]
    given = experiment(tmp_path, problem=problem, settings=settings)
    measure(tmp_path, given=given)
    test, train = lines_of(tmp_path)
    assert test["trained alike"] == {} and all("held-out error" not in each for each in test["results"].values())
    assert all(0.5 < each["held-out error"] < 1 for each in train["results"].values())
    _, said = measure(tmp_path, given=given)  # its problem is what was written
    assert all("agrees" in each for each in said)


def test_the_command(tmp_path, shipped, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment(tmp_path)
    arguments = ["evidence", "small.json", "--ledger", "docs/x.jsonl", "--quiet"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "test: written to docs/x.jsonl" in out and "## One" in out and "## Two" in out
    assert (tmp_path / "runs" / "evidence" / "small" / "results.md").is_file()
    assert len((tmp_path / "docs" / "x.jsonl").read_text().splitlines()) == 2
    assert cli.main([*arguments, "--settings", "train", "--out", "there"]) == 0
    out = capsys.readouterr().out
    assert "train: agrees" in out and "## One" not in out and (tmp_path / "there" / "results.md").is_file()
    for more, message in ((["--settings", "none"], "setting: expected one of"), (["--ledger", "docs"], "ledger: ")):
        assert cli.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["evidence", "small.json", "small.json", "--out", "x"]) == 2
    assert "--out: one experiment at a time" in capsys.readouterr().err
    shipped["mine"] = made(9)
    assert cli.main(arguments) == 2
    assert "were spent on" in capsys.readouterr().err
    assert cli._parser().parse_args(["evidence", "mnist"]).ledger == "docs/evidence.jsonl"


def test_the_shipped_ledger_is_of_the_shipped_optimizers():
    """What the package says of itself, where there is a ledger already."""
    from pathlib import Path

    ledger = Path(__file__).parent.parent / "docs" / "evidence.jsonl"
    for (release, name, setting), line in evidence.read(ledger).items():
        assert release in sealed.RELEASES
        found = experiments.load(name)
        seeds = sealed.seeds(line["seeds"][1], release)
        assert line["seeds"][0] == seeds.start and line["setting"] == setting
        if release == RELEASE:
            net = pretrained.load_pretrained(found.pretrained)
            assert line["networks"][LEARNED] == evidence.weights_digest(net), (name, setting)
