"""The package's tree is its map: imports point downwards only, and the contract that says so can fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import l2l_fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(l2l_fast.__file__).parent
# A module of every layer, and what it must not import.
UPWARD = {
    "kernels/config.py": "from ..networks import effective",
    "networks/memory.py": "from ..problems import base",
    "problems/base.py": "from ..optim import state",
    "optim/state.py": "from ..problems import base",
    "meta/protocol.py": "from ..evaluation import baselines",
    "evaluation/plots.py": "from ..cli import console",
    "kernels/state.py": "from . import operators",  # a circle
}


def contract(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    pytest.importorskip("importlinter", reason="pip install import-linter")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the tests run without the source folder")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.gz", "*.xz", "*.safetensors")
    shutil.copytree(PACKAGE, tmp_path / "l2l_fast", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contract_holds(copy: Path):
    done = contract(copy)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", UPWARD)
def test_an_import_turned_upwards_breaks_it(copy: Path, path: str):
    file = copy / "l2l_fast" / path
    file.write_text(file.read_text() + f"\n{UPWARD[path]}\n")
    done = contract(copy)
    assert done.returncode != 0 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_at_most_ten_entries():
    extension = (".so", ".pyi")
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.suffix not in extension]
    assert len(entries) <= 10, sorted(entries)


@pytest.mark.parametrize(
    "name", ["baselines", "data.mnist", "experiments", "network", "ops", "optimizer", "reference", "state", "trained"]
)
def test_module_names_of_earlier_releases_are_the_same_modules(name: str):
    code = (
        f"import importlib, sys; import l2l_fast; m = importlib.import_module('l2l_fast.{name}'); "
        "assert sys.modules[m.__name__] is m and m.__spec__.name == m.__name__, (m.__name__, m.__spec__); "
        f"assert m.__name__ != 'l2l_fast.{name}'; print(m.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("l2l_fast."), done.stdout + done.stderr
