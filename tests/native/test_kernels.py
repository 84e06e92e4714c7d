"""Builds kernels_test.cpp with AddressSanitizer and UndefinedBehaviorSanitizer and runs it for each instruction set.

The kernels are plain C++ without PyTorch, so that here every load and store is instrumented, and every buffer has its
exact size: something the operators, which get their memory from PyTorch, cannot show.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import l2l_fast as l2l

REPOSITORY = Path(__file__).resolve().parents[2]
CSRC = REPOSITORY / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")
KERNELS = ["baseline", "avx2", "avx512", "avx512bf16"] if X86 else ["baseline"]
SOURCES = [
    *(CSRC / "cpu" / "isa" / f"{name}.cpp" for name in KERNELS),
    CSRC / "cpu" / "dispatch.cpp",
    CSRC / "cpu" / "packing.cpp",
    Path(__file__).with_name("kernels_test.cpp"),
]
# The floating-point flags are those of setup.py.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = [
    *("-std=c++20", "-g1", "-fno-omit-frame-pointer"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-sign-compare", "-Wno-maybe-uninitialized"),
    *("-I", str(CSRC), "-I", str(Path(__file__).parent)),
]


def flags(source: Path) -> list[str]:
    # The naive form is not what is being tested; it only takes the time.
    return [*FLAGS, "-O2"] if CSRC not in source.parents else [*FLAGS, "-O1", *SANITIZE]


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def build() -> Path:
    """The test program; kept in build/native for as long as its sources and flags stay the same."""
    key = hashlib.sha256(repr((compiler(), [flags(source) for source in SOURCES])).encode())
    for path in sorted({*CSRC.rglob("*.h"), *Path(__file__).parent.glob("*.h"), *SOURCES}):
        key.update(path.read_bytes())
    folder = REPOSITORY / "build" / "native"
    program = folder / f"kernels_test-{key.hexdigest()[:16]}"
    if program.exists():
        return program
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def compiled(source: Path) -> str:
        result = run([*compiler(), *flags(source), "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
        assert result.returncode == 0, result.stderr[-5000:]
        return str(folder / f"{source.stem}.o")

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, SOURCES))
    linked = run([*compiler(), *SANITIZE, *objects, "-o", f"{program}.new"])
    assert linked.returncode == 0, linked.stderr[-5000:]
    os.replace(f"{program}.new", program)
    return program


@pytest.fixture(scope="module")
def program() -> Path:
    if "LD_PRELOAD" in os.environ:
        pytest.skip("runs on its own, without a preloaded sanitizer")
    probe = run([*compiler(), "-x", "c++", *SANITIZE, "-o", os.devnull, "-"], input="int main() {}")
    if probe.returncode != 0:
        pytest.skip(f"{compiler()[0]} cannot link the sanitizers: {probe.stderr[-200:]}")
    return build()


@pytest.mark.parametrize("instruction_set", l2l._C.isa_available())
def test_kernels(program, instruction_set):
    result = run([str(program), instruction_set], timeout=600)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    assert "0 failures" in result.stdout
