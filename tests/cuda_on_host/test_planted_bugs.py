"""Every planted bug is caught by the means that should catch it; without the bug the same kernel passes them all.

The columns: any of a few schedules of the plain build (what is wrong shows as an error or a wrong result); the access
check in a single, orderly run; AddressSanitizer with UndefinedBehaviorSanitizer; ThreadSanitizer. A dash marks what is
beyond a build's means; it is not tested that it stays so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_on_host import SANITIZERS, compile_kernels, run, sanitizer_available
from tests.cuda_on_host.build import SANITIZER_EXIT_CODE

HERE = Path(__file__).parent
SOURCES = [HERE / "planted" / name for name in ("races.cu", "memory.cu", "convergence.cu", "tensor_cores.cu")]
SEEDS = (0, -1, 1, 2, 3, 4)

ASAN, UBSAN, TSAN = "AddressSanitizer: heap-buffer-overflow", "runtime error: ", "ThreadSanitizer: data race"
WRONG = r"out\.host\(\)|v is |v == 0"  # a result that is not as expected


class Reports(NamedTuple):
    """What each build says about a bug, as regular expressions; None where it cannot be expected to say anything."""

    none: str | None
    access: str
    address: str | None
    thread: str | None


BUGS: dict[str, Reports] = {
    # races.cu
    "missing_barrier_read_after_write": Reports(none=WRONG, access="never written", address=WRONG, thread=TSAN),
    "missing_barrier_hidden_by_order": Reports(none=WRONG, access="data race: reads", address=None, thread=TSAN),
    "missing_barrier_write_after_read": Reports(none=WRONG, access="data race: writes", address=WRONG, thread=TSAN),
    "missing_syncwarp": Reports(none=None, access="data race: reads", address=None, thread=TSAN),
    "missing_grid_sync": Reports(none=WRONG, access="data race", address=WRONG, thread=TSAN),
    "unsynchronized_sum": Reports(none=None, access="data race: reads", address=None, thread=TSAN),
    "blocks_write_one_word": Reports(none=None, access="data race: writes", address=None, thread=None),
    "published_too_early": Reports(none=None, access="data race: reads", address=None, thread=None),
    "unawaited_async_copy": Reports(none=WRONG, access="cp.async in flight", address=WRONG, thread=WRONG),
    "async_copy_without_barrier": Reports(none=WRONG, access="never written", address=WRONG, thread=TSAN),
    # memory.cu
    "static_shared_overrun": Reports(none="index 64 out of bounds", access="index 64", address=UBSAN, thread=None),
    "dynamic_shared_overrun": Reports(
        none="0 bytes past the end of the 256 bytes", access="past the end", address=ASAN, thread=None
    ),
    "dynamic_shared_overrun_by_a_write": Reports(
        none="past the end of its 252 bytes", access="past the end of the 252", address=ASAN, thread=None
    ),
    "global_overrun": Reports(
        none="0 bytes past the end of the 400", access="past the end of the 400", address=ASAN, thread=None
    ),
    "global_overrun_by_a_write": Reports(
        none="past the end of an allocation of 404", access="past the end of the 404", address=ASAN, thread=None
    ),
    "uninitialised_shared_memory": Reports(
        none=WRONG, access="byte 252 of dynamic shared memory, which was never written", address=WRONG, thread=WRONG
    ),
    "uninitialised_and_harmless_looking": Reports(none=None, access="never written", address=None, thread=None),
    "misaligned_float4": Reports(none="misaligned address", access="misaligned address", address=UBSAN, thread=None),
    "misaligned_float2": Reports(none="misaligned address", access="misaligned address", address=UBSAN, thread=None),
    "misaligned_store": Reports(none="misaligned address", access="misaligned address", address=UBSAN, thread=None),
    "misaligned_matrix": Reports(
        none="not a multiple of 16", access="not a multiple of 16", address="not a multiple", thread="not a multiple"
    ),
    "misaligned_async_copy": Reports(
        none="must be multiples of 16", access="must be", address="must be", thread="must be"
    ),
    "null_pointer": Reports(none="null pointer", access="null pointer", address=UBSAN, thread="SEGV"),
    "host_pointer": Reports(none=None, access="not device memory", address=None, thread=None),
    "stack_overflow": Reports(
        none="stack overflow", access="stack overflow", address="stack-overflow", thread="stack-overflow"
    ),
    "signed_overflow": Reports(none="signed addition overflows", access="overflows", address=UBSAN, thread=None),
    # convergence.cu: the runtime's own checks, the same in every build
    **{
        name: Reports(message, message, message, message)
        for name, message in {
            "different_barriers": r"reached while other threads wait in the one at .*convergence\.cu:\d+",
            "barrier_not_reached_by_all": r"exits while 16 threads of its block wait|threads have exited",
            "barrier_after_an_exit": r"exits while \d+ threads of its block wait|threads have exited",
            "mask_of_lanes_that_do_not_come": "exits while other lanes wait for it|names lanes that have exited",
            "shuffle_from_outside_its_mask": "reads lane 16, which is not in the shuffle's mask",
            "lane_outside_its_own_mask": "mask 0x0000ffff does not name it",
            "lanes_that_do_not_exist": "names lanes that do not exist",
            "shuffle_with_exited_lanes": "exits while other lanes wait for it|names lanes that have exited",
            "different_warp_operations": "while other lanes of the mask 0xffffffff wait in",
            "deadlock": "deadlock: 16 wait in .*; 16 wait in ",
            "endless_wait": "threads spin",
            "grid_sync_without_cooperative_launch": "without cudaLaunchAttributeCooperative",
            "grid_sync_not_reached_by_all": "threads wait in grid.sync|threads of the grid have exited",
            # tensor_cores.cu
            "multiplication_without_all_lanes": "exits while other lanes wait for it|names lanes that have exited",
            "lanes_at_different_multiplications": "while other lanes of the mask 0xffffffff wait in a matrix operation",
        }.items()
    },
    # tensor_cores.cu: wrong products, the same in every build
    **{
        name: Reports(WRONG, WRONG, WRONG, WRONG)
        for name in (
            "swapped_fragment_rows",
            "swapped_fragment_columns",
            "missing_small_inputs",
            "missing_small_weights",
            "operands_that_are_not_split",
        )
    },
}


def program(sanitizer: str) -> Path:
    if not sanitizer_available(sanitizer):
        pytest.skip(f"the compiler cannot link the {sanitizer} sanitizer")
    return compile_kernels(SOURCES, sanitizer=sanitizer, executable=True)


def test_the_table_is_complete() -> None:
    planted = {name for path in SOURCES for name in re.findall(r"^PLANTED\((\w+)\)", path.read_text(), re.M)}
    assert planted == set(BUGS)


@pytest.mark.parametrize("bug", [bug for bug, reports in BUGS.items() if reports.none is not None])
def test_caught_by_the_plain_build(bug: str) -> None:
    expected = BUGS[bug].none or ""
    found = [run(program("none"), [bug], seed=seed).stdout for seed in SEEDS]
    assert any(text.startswith("FAILED") and re.search(expected, text) for text in found), found


@pytest.mark.parametrize("bug", BUGS)
def test_caught_by_the_access_check(bug: str) -> None:
    result = run(program("access"), [bug], sanitizer="access", seed=0)
    assert result.returncode == 1 and result.stdout.startswith("FAILED"), result.stdout + result.stderr
    assert re.search(BUGS[bug].access, result.stdout), result.stdout
    if BUGS[bug].access != WRONG and not re.search("deadlock|grid.sync|shuffle|vote|spin|cp.async of", result.stdout):
        # Kernel, block, thread, and the line in the device code.
        assert re.search(
            r"kernel .*, block \(\d+,\d+,\d+\), thread \(\d+,\d+,\d+\), .*(planted/\w+\.cu|cuda/\w+\.cuh):\d+: ",
            result.stdout,
        )


def check_sanitizer(bug: str, sanitizer: str) -> None:
    expected = getattr(BUGS[bug], sanitizer)
    assert expected is not None
    result = run(program(sanitizer), [bug], sanitizer=sanitizer, seed=0)
    report = result.stdout + result.stderr
    assert result.returncode in (1, SANITIZER_EXIT_CODE) and re.search(expected, report), report[:4000]


SHORT = {
    "address": ["static_shared_overrun", "dynamic_shared_overrun", "global_overrun_by_a_write", "misaligned_float4"],
    "thread": [
        "missing_barrier_hidden_by_order",
        "missing_barrier_write_after_read",
        "missing_syncwarp",
        "missing_grid_sync",
    ],
}


@pytest.mark.parametrize(
    ("sanitizer", "bug"),
    [
        pytest.param(s, bug, marks=() if bug in SHORT[s] else pytest.mark.slow)
        for s in SHORT
        for bug in BUGS
        if getattr(BUGS[bug], s) is not None
    ],
)
def test_caught_by_a_compiler_sanitizer(sanitizer: str, bug: str) -> None:
    check_sanitizer(bug, sanitizer)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_without_its_bug_every_kernel_passes(sanitizer: str) -> None:
    for seed in SEEDS[: {"thread": 1, "address": 2}.get(sanitizer, 6)]:
        result = run(program(sanitizer), [f"{bug}:fixed" for bug in BUGS], sanitizer=sanitizer, seed=seed)
        failed = [line for line in result.stdout.splitlines() if not line.startswith("ok ")]
        assert result.returncode == 0 and not failed, (seed, failed, result.stderr[:4000])
