"""The Python files and the compiled extension must be of one version, which stands in one place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import l2l_fast as l2l
from l2l_fast.kernels import version

ROOT = Path(__file__).parent.parent


def test_the_versions_agree():
    assert l2l.__version__ == version.VERSION == l2l._C.version
    assert "__version__" in dir(l2l)
    assert 'version = "' not in (ROOT / "pyproject.toml").read_text().split("[project.optional")[0]


def imported(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import l2l_fast; print(l2l_fast.__version__)"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("which", ["newer files", "an extension without a version"])
def test_another_extension_is_refused(tmp_path, which):
    ignore = shutil.ignore_patterns("*.safetensors", "*.gz", "__pycache__")
    shutil.copytree(Path(l2l.__file__).parent, tmp_path / "l2l_fast", ignore=ignore)
    assert imported(tmp_path).stdout.strip() == version.VERSION
    if which == "newer files":
        file = tmp_path / "l2l_fast" / "kernels" / "version.py"
        file.write_text(file.read_text().replace(version.VERSION, "99.1"))
        words = f"l2l_fast is version 99.1, but its compiled extension is version {version.VERSION}"
    else:
        for file in (tmp_path / "l2l_fast").glob("_C*"):
            file.unlink()
        (tmp_path / "l2l_fast" / "_C.py").write_text("")
        words = "its compiled extension is an older one"
    result = imported(tmp_path)
    assert result.returncode == 1 and "ImportError" in result.stderr
    assert words in result.stderr and "Rebuild it" in result.stderr
