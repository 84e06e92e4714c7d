"""A search's trials in a file: a stopped search goes on, a finished one is read, another's file is not used."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from l2l_fast.evaluation import baselines
from l2l_fast.evaluation.baselines import trials
from l2l_fast.problems import Quadratic
from tests.search_helpers import of_rate, parabola

PROBLEM = Quadratic(dim=3, batch=4)
OPTIONS = {"seeds": range(3), "points_per_decade": 4, "sweep_tasks": 1}


@pytest.fixture
def runs(monkeypatch):
    """Every run of an optimizer in a search: options, schedule, rate, seeds."""
    seen = []
    run = baselines.run

    def recording(problem, name, lr, seeds, horizon, **options):
        seen.append((tuple(options["options"].values()), options["schedule"], lr, tuple(seeds)))
        return run(problem, name, lr, seeds, horizon, **options)

    monkeypatch.setattr(trials, "run", recording)
    return seen


def search(path=None, **changes):
    return baselines.search(
        **{"problem": PROBLEM, "name": "momentum", "horizon": 8, **OPTIONS, "cache": path, **changes}
    )


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 50])
def test_a_stopped_search_goes_on_and_repeats_nothing(tmp_path, runs, after):
    whole = search()
    alone, path = list(runs), tmp_path / "new" / "trials.jsonl"
    assert len(set(alone)) == len(alone) == whole.trials > 60  # each once

    def stop(lr, loss):
        if len(runs) == after:
            raise Stopped

    runs.clear()
    with pytest.raises(Stopped):
        search(path, on_trial=stop)
    assert len(runs) == after
    shown = []
    assert search(path, on_trial=lambda lr, loss: shown.append((lr, loss))) == whole
    assert runs == alone and [lr for lr, _ in shown] == [run[2] for run in alone[after:]]
    runs.clear()
    before = path.read_bytes()
    assert search(path, on_trial=lambda *_: pytest.fail("it was tried again")) == whole
    assert not runs and path.read_bytes() == before and before.count(b"\n") == 1 + whole.trials


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["half a line", "no newline", "zeros", "bytes", "another line", "an empty line"])
def test_a_damaged_end_is_computed_again(tmp_path, runs, damage):
    path = tmp_path / "trials.jsonl"
    whole = search(path)
    right = path.read_bytes()
    lines = right.splitlines(keepends=True)
    wrong, again = {
        "half a line": (right[:-20], 1),
        "no newline": (right[:-1], 0),
        "zeros": (b"".join(lines[:-1]) + b"\0" * 50, 1),
        "bytes": (b"".join(lines[:-1]) + b"\xff\xfe{", 1),
        "another line": (b"".join([*lines[:-1], b'{"key": 3}\n']), 1),
        "an empty line": (right + b"\n", 0),
    }[damage]
    path.write_bytes(wrong)
    runs.clear()
    assert search(path) == whole
    assert len(runs) == again and path.read_bytes() == right


@pytest.mark.parametrize(
    "line",
    ["", "[]", "3", "null", "{}", '{"key": [[0.9], "constant", 1.0, 1]}', '{"key": [[0.9, 1.0], "constant", 1.0, 1], '
     '"final": 1.0, "start": 1.0}', '{"key": [[0.9], "constant"], "final": 1.0, "start": 1.0}',
     '{"key": [[0.9], "constant", 1.0, 1], "final": "low", "start": 1.0}'],
)  # fmt: skip
def test_after_a_damaged_line_all_is_computed_again(tmp_path, runs, line):
    path = tmp_path / "trials.jsonl"
    whole = search(path)
    right = path.read_text()
    lines = right.splitlines()
    lines[10] = line
    path.write_text("\n".join(lines) + "\n")
    runs.clear()
    assert search(path) == whole
    assert len(runs) == whole.trials - 9 and sorted(path.read_text().splitlines()) == sorted(right.splitlines())


@pytest.mark.parametrize(
    "change",
    [
        {"problem": Quadratic(dim=3, batch=5)},
        {"horizon": 9},
        {"seeds": range(1, 4)},
        {"seeds": [0, 2, 1]},
        {"seeds": range(4)},
        {"split": "train"},
        {"name": "nag"},
        {"device": "cpu:0"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_file_of_another_search_is_not_used(tmp_path, runs, change):
    path = tmp_path / "trials.jsonl"
    search(path)
    expected = search(**change)
    runs.clear()
    assert search(path, **change) == expected
    assert len(runs) == expected.trials
    assert search(path, **change) == expected and len(runs) == expected.trials


@pytest.mark.parametrize(
    "change",
    [{"points_per_decade": 8}, {"sweep_tasks": 2}, {"schedules": ["linear"]}, {"options": {"momentum": 0.5}},
     {"seeds": np.arange(3), "horizon": np.int64(8)}],
)  # fmt: skip
def test_another_way_of_searching_shares_the_trials(tmp_path, runs, change):
    path = tmp_path / "trials.jsonl"
    search(path)
    before = len(runs)
    expected = search(**change)
    alone, kept = runs[before:], set(runs[:before])
    del runs[before:]
    found = search(path, **change)
    assert (found.setup, found.final, found.start) == (expected.setup, expected.final, expected.start)
    assert runs[before:] == [each for each in alone if each not in kept]


def test_the_version_of_trials_is_part_of_the_file(tmp_path, runs, monkeypatch):
    path = tmp_path / "trials.jsonl"
    found = search(path)
    runs.clear()
    monkeypatch.setattr(trials, "_VERSION", trials._VERSION + 1)
    assert search(path) == found and len(runs) == found.trials


def test_infinite_losses_are_kept(tmp_path, runs):
    path = tmp_path / "trials.jsonl"
    wall = of_rate(lambda e: math.inf if e > 0.1 else (e + 1) ** 2)
    options = {"problem": wall, "name": "sgd", "horizon": 1, "schedules": ["constant"]}
    found = search(path, **options)
    entries = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert any(entry["final"] is None for entry in entries) and "Infinity" not in path.read_text()
    runs.clear()
    assert search(path, **options) == found and not runs


@pytest.mark.parametrize(
    "content", [b"my notes\n", b'{"event": "settings"}\n', b"\x89PNG\r\n\x1a\n", b'{"searches": 1}']
)
def test_a_file_that_is_somebodys_is_left_alone(tmp_path, runs, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cache: .*notes' holds something else than the trials of a search"):
        search(path)
    assert path.read_bytes() == content and not runs


@pytest.mark.parametrize("content", [b"", b'{"se', b'{"search": "momentum", "ta'])
def test_a_file_that_was_hardly_begun_is_begun_anew(tmp_path, content):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(content)
    assert search(path) == search(path) and path.read_text().startswith('{"search": "momentum", "tasks": "')


def test_an_impossible_argument_leaves_no_file(tmp_path):
    for change in ({"horizon": 0}, {"horizon": 2.5}, {"seeds": []}, {"schedules": ["step"]}, {"options": {"x": 1}},
                   {"points_per_decade": 0}, {"sweep_tasks": 0}, {"name": "x"}):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            search(tmp_path / "new" / "x", **change)
    assert not list(tmp_path.iterdir())


def test_a_comparison_keeps_a_file_for_each_name(tmp_path, runs):
    arguments = {"names": ["sgd", "nag"], "tuning_seeds": [0], "cache": tmp_path / "kept"}
    first = baselines.compare(parabola(0.5), 3, [0], **arguments)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["nag.jsonl", "sgd.jsonl"]
    runs.clear()
    second = baselines.compare(parabola(0.5), 3, [0], **arguments)
    assert not runs and [each.search for each in second.values()] == [each.search for each in first.values()]
    for name, each in first.items():
        assert (
            baselines.search(parabola(0.5), name, 3, seeds=[0], cache=tmp_path / "kept" / f"{name}.jsonl")
            == each.search
        )
    assert not runs
