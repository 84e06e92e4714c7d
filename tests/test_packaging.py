"""What is built and checked is said in one place each: versions, dependencies, wheels, the workflow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import l2l_fast as l2l

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="the tests run without the source folder")


def config() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory):
    """What the metadata of a build asks for, with and without a pin."""

    def ask(pin: str) -> list[str]:
        folder = tmp_path_factory.mktemp("egg")
        environment = {**os.environ, "L2L_FAST_PIN_TORCH": pin, "L2L_FAST_CUDA": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        (required,) = folder.glob("*/requires.txt")
        return required.read_text().split("\n\n")[0].split()

    return ask


def test_a_wheel_demands_the_torch_that_it_is_compiled_for(dependencies):
    others = ["numpy>=1.24", "safetensors>=0.4"]
    assert dependencies("") == ["torch<3,>=2.6", *others]
    major, minor = torch.__version__.split(".")[:2]
    assert dependencies("1") == [f"torch=={major}.{minor}.*", *others]


def test_the_build_asks_for_the_same_torch(dependencies):
    (torch_to_build,) = [each for each in config()["build-system"]["requires"] if each.startswith("torch")]
    assert set(torch_to_build.removeprefix("torch").split(",")) == {"<3", ">=2.6"}


def test_wheels_are_made_for_every_python_that_the_package_names():
    settings = config()
    lowest = settings["project"]["requires-python"].removeprefix(">=3.")
    built = [re.match(r"cp3(\d+)-manylinux_x86_64$", each)[1] for each in settings["tool"]["cibuildwheel"]["build"]]
    assert built[0] == lowest and built == [str(k) for k in range(int(lowest), int(built[-1]) + 1)]
    environment = settings["tool"]["cibuildwheel"]["environment"]
    assert environment["L2L_FAST_PIN_TORCH"] == "1" and environment["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu")
    pinned = re.search(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert pinned in settings["tool"]["cibuildwheel"]["before-build"]  # the one that everything is tested with
    for script in re.findall(r"scripts/\w+\.py", str(settings["tool"]["cibuildwheel"])):
        assert (ROOT / script).is_file()


def test_everything_that_setup_installs_is_an_extra():
    (extras,) = re.findall(r"-e '\.\[([a-z,]+)\]'", (ROOT / "Makefile").read_text())
    assert set(extras.split(",")) <= set(config()["project"]["optional-dependencies"])
    assert f"'.[{extras}]'" in (ROOT / "CONTRIBUTING.md").read_text()


def test_what_is_no_module_is_in_the_package():
    import fnmatch

    patterns = config()["tool"]["setuptools"]["package-data"]["l2l_fast"]
    package = Path(l2l.__file__).parent
    for path in package.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".so", ".pyc"):
            name = path.relative_to(package).as_posix()
            assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
    manifest = (ROOT / "MANIFEST.in").read_text()
    assert "py.typed" in manifest and "*.pyi" in manifest


def test_the_stub_is_of_the_extension():
    names = set(re.findall(r"^(?:def )?(\w+)[:(]", (ROOT / "l2l_fast" / "_C.pyi").read_text(), re.M))
    assert names == {name for name in dir(l2l._C) if not name.startswith("_")}


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="a source distribution has no workflow")
def test_the_workflow_runs_what_a_contributor_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: bash .ci/run" in workflow and os.access(ROOT / ".ci" / "run", os.X_OK)
    for line in re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.M):
        assert re.search(rf"^{line}:", (ROOT / "Makefile").read_text(), re.M), line


def test_a_wheel_with_a_library_of_torchs_is_refused(tmp_path, monkeypatch):
    """auditwheel stands aside: what it is told to leave out, and what it made, are looked at."""
    from scripts import repair_wheel

    asked = []

    def repaired(extra: tuple[str, ...], tag: str = "manylinux_2_34_x86_64"):
        def run(command, **_):
            asked.append(command)
            with zipfile.ZipFile(tmp_path / f"l2l_fast-1-cp311-cp311-{tag}.whl", "w") as wheel:
                for name in ("l2l_fast/_C.cpython-311.so", "l2l_fast/__init__.py", *extra):
                    wheel.writestr(name, "")
            return subprocess.CompletedProcess(command, 0, "")

        for old in tmp_path.glob("*.whl"):
            old.unlink()
        monkeypatch.setattr(repair_wheel.subprocess, "run", run)
        repair_wheel.main("x.whl", str(tmp_path))

    repaired(())
    assert {"libtorch*.so*", "libc10*.so*"} <= set(asked[0])
    with pytest.raises(AssertionError, match="expected the extension alone"):
        repaired(("l2l_fast.libs/libc10-1a2b.so",))
    with pytest.raises(AssertionError, match="expected a manylinux wheel"):
        repaired((), tag="linux_x86_64")
