"""The kernels under the sanitizers and many schedules; and with a barrier taken out, which must not pass."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from . import DeviceError, Library, compile_kernels, sanitized_python, sanitizer_available
from .build import REPOSITORY, SANITIZERS
from .kernels import SHORT_FLAGS, SOURCE, Kernels
from .kernels_sanitized import DEVICE, exercise, load

#: Small networks are enough to see a missing barrier.
SMALL_SIZES = ("-DL2L_CUDA_HIDDEN_SIZES(X)=X(4) X(8)", "-DL2L_CUDA_LAYERS(X)=X(1) X(2)")


def exercised(sanitizer: str, seed: int, full: bool) -> None:
    if not sanitizer_available(sanitizer):
        pytest.skip(f"the compiler cannot link the {sanitizer} sanitizer")
    compile_kernels([SOURCE], sanitizer=sanitizer, flags=SHORT_FLAGS)
    command, env = sanitized_python(sanitizer)
    env["OPENBLAS_NUM_THREADS"] = env["OMP_NUM_THREADS"] = "1"
    arguments = ["-m", "tests.cuda_on_host.kernels_sanitized", sanitizer, str(seed)] + (["--full"] if full else [])
    result = subprocess.run(
        [*command, *arguments], env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0 and "digest" in result.stdout, result.stderr[-4000:]


def test_races_and_uninitialised_memory() -> None:
    """Every load and store is checked against all others, whatever the schedule."""
    exercise(load("access"), full=False)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [s for s in SANITIZERS if s not in ("none", "access")])
@pytest.mark.parametrize("seed", [0, 5])
def test_sanitizers(sanitizer: str, seed: int) -> None:
    exercised(sanitizer, seed, full=False)


@pytest.mark.slow
def test_results_do_not_depend_on_the_schedule() -> None:
    kernels = load("none")
    expected = exercise(kernels, full=True)
    for seed in (-1, *range(1, 12)):
        with kernels.library.seed(seed):
            assert exercise(kernels, full=True) == expected, f"seed {seed}"


def barriers() -> list[tuple[str, int]]:
    """Every __syncthreads of the kernels: file and its place among those of the file."""
    found = []
    for name in ("backward_walk.cuh", "mma_step.cuh", "normalized_backward.cuh", "reduce.cuh", "step.cuh"):
        text = (REPOSITORY / "csrc" / "cuda" / name).read_text()
        found += [(name, k) for k in range(len(re.findall(r"__syncthreads\(\);", text)))]
    return found


def without_barrier(folder: Path, name: str, which: int) -> Kernels:
    """The kernels from a copy of the sources with one barrier taken out."""
    shutil.copytree(REPOSITORY / "csrc", folder / "csrc", dirs_exist_ok=True)
    path = folder / "csrc" / "cuda" / name
    pieces = re.split(r"__syncthreads\(\);", path.read_text())
    joined = "__syncthreads();".join(pieces[: which + 1]) + "__syncthreads();".join(["", *pieces[which + 1 :]])[16:]
    path.write_text(joined)
    source = folder / "kernels.cu"
    source.write_text(SOURCE.read_text().replace('"cuda/', f'"{folder}/csrc/cuda/'))
    library = Library.build([source], sanitizer="access", flags=SMALL_SIZES)
    library.set_device(DEVICE)
    return Kernels(library)


def check_barrier(folder: Path, name: str, which: int) -> None:
    kernels = without_barrier(folder, name, which)
    with pytest.raises(DeviceError, match=r"data race|never written"):
        exercise(kernels, full=False)


def test_a_missing_barrier_is_found(tmp_path: Path) -> None:
    place = next(k for k, (name, _) in enumerate(barriers()) if name == "backward_walk.cuh")
    name, which = barriers()[place + 2]
    check_barrier(tmp_path, name, which)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "which"), barriers())
def test_every_missing_barrier_is_found(tmp_path: Path, name: str, which: int) -> None:
    check_barrier(tmp_path, name, which)
