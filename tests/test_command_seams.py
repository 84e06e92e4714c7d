"""Commands where something gives way: a full disk behind stdout, a locale without signs, one file for two things."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2l_fast.cli import main
from l2l_fast.evaluation.suite import contenders
from l2l_fast.meta.log import TrainingLog

ROOT = Path(__file__).parents[1]
EVALUATE = ["evaluate", "--optimizer", "quadratic", "--problem", "quadratic", "--episodes", "1", "--horizon", "3"]


def command(*words: str, stdout=subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "l2l_fast", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_results_are_in_their_file_before_they_are_shown(tmp_path):
    with open("/dev/full", "w") as full:
        command(*EVALUATE, "--json", str(tmp_path / "kept.json"), stdout=full)
    assert json.loads((tmp_path / "kept.json").read_text())


def test_a_locale_without_signs_costs_the_signs_alone():
    shown = command(*EVALUATE, LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert shown.returncode == 0 and b"Traceback" not in shown.stderr and shown.stdout


def test_a_folder_is_no_optimizer(tmp_path, capsys):
    (tmp_path / "optimizer.safetensors").write_bytes(b"")
    words = ["evaluate", "--optimizer", str(tmp_path), "--problem", "quadratic"]
    assert main(words) == 2
    assert "this is a folder" in (said := capsys.readouterr().err) and "optimizer.safetensors" in said


def test_an_import_does_not_take_the_place_of_what_it_reads(tmp_path, capsys):
    path = tmp_path / "theirs.pt"
    torch.save({}, path)
    before = path.read_bytes()
    words = ["import", str(path), "--out", str(path), "--preprocess", "identity", "--output-scale", "1"]
    assert main(words) == 2 and "is the file to import" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_optimizer_whose_code_changed_is_another(tmp_path, monkeypatch):
    """Where it is defined, not only where it is named."""
    package = tmp_path / "renamed_optimizers"
    package.mkdir()
    (package / "__init__.py").write_text("from .code import Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    identities = []
    for factor in (1, 100):
        text = f"import torch\nclass Mine(torch.optim.SGD):\n    factor = {factor}\n"
        (package / "code.py").write_text(text)
        for name in ("renamed_optimizers.code", "renamed_optimizers"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        identities.append(contenders.parse("renamed_optimizers:Mine:lr=0.1").identity)
    assert identities[0] != identities[1]
    assert contenders.parse("SGD:lr=0.1").identity == "SGD:lr=0.1"  # torch's own code does not count


def test_a_log_on_a_full_disk_has_whole_lines(tmp_path, monkeypatch):
    log = TrainingLog(tmp_path / "log.jsonl")
    log.append({"event": "settings"})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
    with pytest.raises(OSError, match="log: cannot be written: the disk is full"):
        log.append({"event": "episode", "episode": 1})
    monkeypatch.undo()
    log.append({"event": "episode", "episode": 1})
    assert [record["event"] for record in log.records()] == ["settings", "episode"]
