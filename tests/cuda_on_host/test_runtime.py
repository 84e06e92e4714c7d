"""The runtime that runs CUDA code on the CPU: every feature, under several schedules and sanitizers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda_on_host import (
    SANITIZERS,
    DeviceError,
    Library,
    compile_kernels,
    run,
    sanitized_python,
    sanitizer_available,
)

HERE = Path(__file__).parent
SELFTESTS = [HERE / "selftest" / name for name in ("basics.cu", "matrices.cu", "tensors.cu", "limits.cu")]
SHORT_SEEDS = {"none": [0, -1, 1, 2], "access": [0, 3], "address": [0, 3], "thread": [0]}
FULL_SEEDS = {"none": range(3, 60), "access": range(4, 12), "address": range(4, 12), "thread": range(1, 6)}


def cases(sanitizer: str, seed: int) -> str:
    """Runs all selftests in a process of their own and returns the lines of those that failed."""
    if not sanitizer_available(sanitizer):
        pytest.skip(f"the compiler cannot link the {sanitizer} sanitizer")
    program = compile_kernels(SELFTESTS, sanitizer=sanitizer, executable=True)
    result = run(program, sanitizer=sanitizer, seed=seed)
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line.startswith("ok ")]) >= 20 or result.returncode != 0
    failed = [line for line in lines if not line.startswith("ok ")]
    return "" if result.returncode == 0 and not failed else "\n".join([*failed, result.stderr[:4000]])


@pytest.mark.parametrize(("sanitizer", "seed"), [(s, seed) for s in SANITIZERS for seed in SHORT_SEEDS[s]])
def test_features(sanitizer: str, seed: int) -> None:
    assert cases(sanitizer, seed) == ""


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_features_under_many_schedules(sanitizer: str) -> None:
    for seed in FULL_SEEDS[sanitizer]:
        assert cases(sanitizer, seed) == "", f"seed {seed}"


@pytest.mark.slow
def test_features_with_portable_fibers() -> None:
    program = compile_kernels(SELFTESTS, flags=["-DCUDA_ON_HOST_UCONTEXT"], executable=True)
    assert run(program, seed=0).returncode == 0


@pytest.mark.slow
def test_features_on_aarch64() -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", compiler)
        program = compile_kernels(SELFTESTS, executable=True)
    result = subprocess.run(
        [emulator, "-L", "/usr/aarch64-linux-gnu", str(program)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def library() -> Library:
    return Library.build([HERE / "selftest" / "python.cu"])


def test_conversion_to_16_bits_rounds_to_nearest_even(library: Library) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, size=1 << 18, dtype=np.uint64).astype(np.uint32)
    # Around every representable value of both formats: itself, halfway to the next, and a bit to either side.
    every = np.arange(1 << 16, dtype=np.uint32)
    halves = every.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = [
        base + delta
        for base in (every << 16, halves)
        for delta in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    ]
    x = np.concatenate([bits, *near]).view(np.float32)
    half, bfloat16 = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16)
    library.call("convert_bits", x, half, bfloat16, x.size)
    number = ~np.isnan(x)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half[number], x[number].astype(np.float16).view(np.uint16))
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bfloat16[number], expected[number])
    assert set(half[~number]) == set(bfloat16[~number]) == {0x7FFF}


def test_conversion_from_16_bits_is_exact(library: Library) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    from_half, from_bfloat16 = np.empty(bits.size, np.float32), np.empty(bits.size, np.float32)
    library.call("expand_bits", bits, from_half, from_bfloat16, bits.size)
    np.testing.assert_array_equal(from_half, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(from_bfloat16, (bits.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("sanitizer", ["none", "access"])
def test_calls_from_python(sanitizer: str) -> None:
    library = Library.build([HERE / "selftest" / "python.cu"], sanitizer=sanitizer)
    x = np.linspace(-1, 1, 1000, dtype=np.float32)
    for seed in (0, -1, 7):
        device = library.array(x, offset=seed == 7)
        library.reset_counters()
        with library.seed(seed):
            library.call("scale", device, x.size, 3.0)
        np.testing.assert_array_equal(device.numpy(), 3 * x)
        assert library.counter("launches") == 1
        assert library.launch_log() == ["scale_kernel grid (8,1,1) block (128,1,1) shared 512"]

    with pytest.raises(
        DeviceError, match=r"scale_kernel, block \(7,0,0\), thread \(104,0,0\), .*python\.cu:\d+"
    ) as error:
        library.call("scale", library.array(x), x.size + 1, 3.0)
    assert error.value.code == 700  # cudaErrorIllegalAddress
    library.call("scale", library.array(x), x.size, 3.0)  # works again after an error
    with pytest.raises(ValueError, match="nonsense"):
        library.counter("nonsense")
    with pytest.raises(ValueError, match="sm_1"):
        library.set_device("sm_1")


def test_launch_order_is_repeatable() -> None:
    library = Library.build([HERE / "selftest" / "python.cu"])

    def order(seed: int) -> list[int]:
        out = library.array(np.zeros(1 + 4 * 64, np.int32))
        with library.seed(seed):
            library.call("record_order", out)
        return out.numpy()[1:].tolist()

    assert order(0) == list(range(256))
    assert order(-1) == list(range(256))[::-1]
    for seed in (1, 2):
        assert sorted(order(seed)) == order(0) != order(seed)
        assert order(seed) == order(seed)
        first_block = [thread for thread in order(seed) if thread < 64]
        assert first_block != sorted(first_block)
    assert order(1) != order(2) != order(4)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_sanitized_library_loads_into_python(sanitizer: str) -> None:
    if not sanitizer_available(sanitizer):
        pytest.skip(f"the compiler cannot link the {sanitizer} sanitizer")
    path = compile_kernels([HERE / "selftest" / "python.cu"], sanitizer=sanitizer)
    script = (
        "import sys, numpy as np\n"
        "from tests.cuda_on_host import Library\n"
        "library, x = Library(sys.argv[1]), np.arange(100, dtype=np.float32)\n"
        "device = library.array(x)\n"
        "library.call('scale', device, int(sys.argv[2]), 2.0)\n"
        "assert (device.numpy() == 2 * x).all()\n"
    )
    python, env = sanitized_python(sanitizer)
    repository = HERE.parent.parent
    good = subprocess.run(
        [*python, "-c", script, str(path), "100"], env=env, cwd=repository, capture_output=True, text=True, check=False
    )
    assert good.returncode == 0, good.stderr[-4000:]
    if sanitizer == "address":
        bad = subprocess.run(
            [*python, "-c", script, str(path), "101"],
            env=env,
            cwd=repository,
            capture_output=True,
            text=True,
            check=False,
        )
        assert bad.returncode != 0 and "heap-buffer-overflow" in bad.stderr


def test_what_does_not_compile_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void k(float* x) { extern __shared__ float s[]; x[0] = s[0]; }\n")
    with pytest.raises(RuntimeError, match=r"broken\.cu:1"):
        compile_kernels([source])
    with pytest.raises(ValueError, match="nonsense"):
        compile_kernels([source], sanitizer="nonsense")


def test_device_code_needs_no_toolkit() -> None:
    program = compile_kernels(SELFTESTS, executable=True)
    assert "libcuda" not in subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    includes = [path for path in (HERE / "include").rglob("*.h") if re.search(r"#include <cuda", path.read_text())]
    assert includes == []  # quoted includes stay among these headers
