"""Every script in examples/ runs as its user runs it, without a network, and says what it did.

A script that imports what is not installed is skipped; with L2L_FAST_FULL=1, as in ``make examples``, it fails.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import l2l_fast as l2l
from tests.helpers import AT_EXIT

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
FULL = os.environ.get("L2L_FAST_FULL") == "1"

if not SCRIPTS:
    pytest.skip("a copy of the sources alone: there is no examples/", allow_module_level=True)


def imported(script: Path) -> set[str]:
    """The packages that a script imports."""
    nodes = list(ast.walk(ast.parse(script.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


def command(script: Path) -> list[str]:
    """How a script is run: by torchrun, where it says so."""
    found = re.search(rf"torchrun (.*) examples/{script.name}", script.read_text())
    launcher = ["-m", "torch.distributed.run", *found[1].split()] if found else []
    return [sys.executable, *launcher, str(script)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_runs_and_says_what_it_did(script, tmp_path):
    missing = sorted(name for name in imported(script) if importlib.util.find_spec(name) is None)
    if missing and not FULL:
        pytest.skip(f"needs {', '.join(missing)}; make examples installs it")
    folder = Path(l2l.__file__).parents[1]  # the package under test, whichever one is installed
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    valid = {name: value for name, value in os.environ.items() if name}  # an empty name cannot be taken away again
    environment = {**valid, **threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}
    for _ in range(3):
        done = subprocess.run(
            command(script), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode == 0 or AT_EXIT not in done.stderr:
            break
    print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"loss \d+\.\d+ -> \d+\.\d+", done.stdout), done.stdout
    assert not list(tmp_path.iterdir()), "it left files behind"


def test_every_script_is_in_the_table():
    table = (ROOT / "examples" / "README.md").read_text()
    assert {script.name for script in SCRIPTS} == set(re.findall(r"^\| \[(\w+\.py)\]\(\1\)", table, re.M))
