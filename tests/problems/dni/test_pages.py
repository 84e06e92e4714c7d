"""What docs/dni.md shows runs, and the benches behind its figures do, in small."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "dni.md"

if not PAGE.exists() or not (ROOT / "bench" / "dni_copy.py").exists():
    pytest.skip("a copy of the sources alone", allow_module_level=True)


@pytest.fixture(autouse=True)
def _from_the_source_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("L2L_FAST_DATA", raising=False)
    torch.set_num_threads(1)  # as the benches; put back after every test


def test_the_code_of_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["segment"].loss.isfinite() and names["logits"].shape == (64, 10)


def test_the_mnist_bench(tmp_path, capsys):
    from bench import dni_mnist

    results = tmp_path / "rows.jsonl"
    command = ["--layers", "1", "--steps", "4", "--every", "2", "--batch", "16", "--hidden", "8"]
    command += ["--results", str(results)]
    dni_mnist.main([*command, "--picture", str(tmp_path / "p.svg")])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["way"], row["optimizer"]) for row in rows] == [
        (way, optimizer) for optimizer in dni_mnist.OPTIMIZERS for way in dni_mnist.WAYS
    ]
    assert all(0 <= row["test"] <= 100 and len(row["curve"]) == 2 for row in rows)
    before = results.read_text()
    capsys.readouterr()
    dni_mnist.main(command)  # nothing is done again
    assert results.read_text() == before and capsys.readouterr().out.count("\n| 1 | 4 |") == 1
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_networks_side_by_side_are_those_alone():
    from bench import dni_copy

    options = argparse.Namespace(segments=120, units=8, batch=16, lr=1e-2, hidden=8, gap=1)
    wanted = [("bptt", 0), ("aux", 1), ("dni", 1)]
    together = dni_copy.train(options, "copy", 2, wanted)
    alone = [dni_copy.train(options, "copy", 2, [one])[0] for one in wanted]
    kept = ("way", "seed", "solved", "history")
    assert [[row[k] for k in kept] for row in together] == [[row[k] for k in kept] for row in alone]
    assert together[0]["solved"] >= 1


def test_the_copy_bench(tmp_path, capsys):
    from bench import dni_copy

    results = tmp_path / "rows.jsonl"
    command = ["--segments", "12", "--units", "4", "--hidden", "4", "--seeds", "0", "--gap", "2"]
    command += ["--results", str(results)]
    dni_copy.main(command)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == 3 * 4 * 3 and "| copy, 2 | 0 (7) | 0 (16) | 0 (16) |" in capsys.readouterr().out


def test_the_pipeline_bench(monkeypatch, capsys):
    from bench import dni_pipeline

    monkeypatch.setattr(dni_pipeline, "BATCH", 8)
    monkeypatch.setattr(sys, "argv", ["dni_pipeline", "--rounds", "1", "--steps", "3"])
    dni_pipeline.main()
    assert "two threads" in capsys.readouterr().out
