"""Peak memory that learned optimization adds to theta and its gradients, measured in a process of its own.

Linux keeps the largest resident size of a process (VmHWM) and forgets it on request; large blocks are made to come from
the system and to go back to it, so that what one run frees does not hide what the next one takes.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from .contenders import build, make_network

_MMAP_THRESHOLD = 64 * 1024


def peak_extra_bytes(
    measure: str, contender: str, n: int, steps: int, threads: int, device: torch.device
) -> float | None:
    """Bytes per coordinate at the peak of one step or one segment, beyond theta and the gradients themselves.

    States count: those at the start, those at the end, everything between. None where the system cannot tell.

    Raises:
        RuntimeError: the measuring process failed, for want of memory perhaps.
    """
    if device.type != "cuda" and not Path("/proc/self/smaps_rollup").exists():
        return None
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD), "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", f"{__package__}.memory", measure, contender]
    command += [str(n), str(steps), str(threads), str(device)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[2:])} failed with code {process.returncode}:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])["extra_bytes"] / n


def available_bytes(device: torch.device) -> float:
    """Memory that can be had now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps can be had too
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return float(found[1]) * 1024 if found else 4e9


def _resident() -> float:
    # Exact, where the count in /proc/self/status lags behind by some pages per thread.
    found = re.search(r"Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return float(found[1]) * 1024


def _peak() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return float(found[1]) * 1024


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not permitted everywhere; the peak is then that of the whole process, and no smaller


def _main(arguments: list[str]) -> None:
    measure, contender, n, steps, threads, device_name = arguments
    device = torch.device(device_name)
    torch.set_num_threads(int(threads))
    run = build(measure, contender, make_network(device), int(n), int(steps))
    run()  # compiles, starts threads, loads libraries
    run.forget()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: float = torch.cuda.memory_allocated(device)
        run()
        peak: float = torch.cuda.max_memory_allocated(device)
    else:
        _reset_peak()
        before = _resident()
        run()
        peak = _peak()
    print(json.dumps({"extra_bytes": peak - before}))


if __name__ == "__main__":
    _main(sys.argv[1:])
