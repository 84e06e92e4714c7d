"""Runs in files: read again as they were, cut-off lines dropped, other keys other runs, foreign files left alone."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest

from l2l_fast.evaluation.suite.curves import summarise
from l2l_fast.evaluation.suite.store import SHIPPED, Key, Store, ship
from tests.suite.helpers import falling

KEY = Key("softmax", 1, "mnist-10k-embedded", "adam", {"lr": 0.001}, "constant", 7, 1000)


def test_a_run_is_read_as_it_was_added(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    kept = Store(path).add(KEY, falling())
    read = Store(path).get(KEY)
    assert read == kept
    assert read.final == pytest.approx(falling().final, rel=1e-6) and read.early.keys() == {100, 300}
    assert len(read.curve) == len(falling().curve)
    diverged = summarise([1.0] * 150 + [math.nan], 1000, 2.0)
    Store(path).add(replace(KEY, seed=8), diverged)
    again = Store(path).get(replace(KEY, seed=8))
    assert again.diverged and again.final == math.inf and again.early[300] == math.inf
    assert len(path.read_text().splitlines()) == 2


def test_a_searchs_run_is_kept_without_its_curve(tmp_path):
    key = replace(KEY, search=True)
    assert Store(tmp_path / "x").add(key, falling()).curve == ()
    assert Store(tmp_path / "x").get(key).final > 0 and Store(tmp_path / "x").get(KEY) is None


@pytest.mark.parametrize(
    "change",
    [
        {"network": "conv"}, {"version": 2}, {"data": "mnist-60k"}, {"optimizer": "adamw"}, {"options": {"lr": 0.01}},
        {"schedule": "cosine"}, {"seed": 8}, {"steps": 10_000}, {"search": True},
    ],
)  # fmt: skip
def test_every_part_of_the_key_counts(change):
    assert set(change) <= set(asdict(KEY))
    store = Store()
    store.add(KEY, falling())
    assert store.get(KEY) is not None and store.get(replace(KEY, **change)) is None


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "runs.jsonl"
    store = Store(path)
    for seed in range(3):
        store.add(replace(KEY, seed=seed), falling())
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:2]) + whole[2][:50])
    store = Store(path)
    assert len(store.found) == 2 and path.read_text() == "".join(whole[:2])
    store.add(replace(KEY, seed=2), falling())
    assert path.read_text() == "".join(whole)


def test_a_foreign_file_is_left_alone(tmp_path):
    path = tmp_path / "x"
    path.write_text("a diary\n")
    with pytest.raises(ValueError, match="something else"):
        Store(path)
    assert path.read_text() == "a diary\n"


def test_what_is_shipped_is_read_and_never_written(tmp_path):
    source, target = tmp_path / "runs.jsonl", tmp_path / "runs.jsonl.xz"
    Store(source).add(KEY, falling())
    assert ship(source, target) == 1
    before = target.read_bytes()
    store = Store(tmp_path / "more.jsonl", [target, tmp_path / "missing.xz"])
    assert store.get(KEY) == Store(source).get(KEY)
    store.add(replace(KEY, seed=9), falling())
    assert target.read_bytes() == before and len(Store(tmp_path / "more.jsonl").found) == 1


@pytest.mark.skipif(not SHIPPED.is_file(), reason="no baselines in this tree")
def test_the_packages_baselines_are_small():
    assert SHIPPED.stat().st_size < 1_000_000
