"""What a multiprocessor of each architecture holds, by rule, and what an access to its shared memory costs.

From the tables of the CUDA programming guide and cuda_occupancy.h.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

KIB = 1024


class Limits(NamedTuple):
    """Of one multiprocessor. block_shared: the most that one block may ask for, static and dynamic together;
    reserved: what the system takes besides for every block."""

    registers: int
    shared: int
    warps: int
    blocks: int
    block_shared: int
    reserved: int


def parse(architecture: str) -> tuple[int, int]:
    """(10, 3) for "103", "10.3" or "sm_103". ValueError if it is none that the kernels support."""
    match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)", architecture)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (7, 5) <= version < (13, 0):
        raise ValueError(f"expected an architecture from 7.5 to 12.x such as 90 or 10.3, got {architecture!r}")
    return version


def limits(architecture: str) -> Limits:
    """Limits of an architecture. ValueError as from ``parse``."""
    major, minor = parse(architecture)
    thor = (major, minor) == (10, 1) or major == 11  # 10.1 is what CUDA 12 calls 11.0
    if major == 7:
        shared, warps, blocks = 64, 32, 16
    elif major == 8:
        shared = 164 if minor in (0, 7) else 100
        warps, blocks = (64, 32) if minor == 0 else (48, 24 if minor == 9 else 16)
    elif major < 12:
        shared, (warps, blocks) = 228, (48, 24) if thor else (64, 32)
    else:
        shared, warps, blocks = 100, 48, 24
    reserved = 0 if major == 7 else 1
    return Limits(65536, shared * KIB, warps, blocks, (shared - reserved) * KIB, reserved * KIB)


def wavefronts(addresses: Sequence[int], width: int) -> int:
    """Wavefronts of one access of a warp to shared memory. addresses: in bytes, of the active lanes from lane 0 on;
    width: bytes of one lane, 4, 8 or 16.

    A wavefront takes a clock and serves one word of each of the 32 banks, to any number of lanes. Wider accesses go
    through in groups of lanes that ask for 128 bytes: half warps of 8 bytes, quarter warps of 16. The pair rule: if
    lanes n and n ^ 1 ask for the same address throughout the warp, or n and n ^ 2, groups have twice as many lanes,
    since these ask for no more than 128 different bytes. (Measured by others; no document says so.)
    """
    group = 128 // width
    if width > 4 and any(
        all(addresses[n ^ step] == at for n, at in enumerate(addresses) if n ^ step < len(addresses)) for step in (1, 2)
    ):
        group *= 2
    total = 0
    for first in range(0, len(addresses), group):
        words = {(at + byte) // 4 for at in addresses[first : first + group] for byte in range(0, width, 4)}
        total += max(Counter(word % 32 for word in words).values())
    return total


def mean_wavefronts(address: Callable[[int], int], threads: int, width: int = 16) -> float:
    """Mean wavefronts per warp of an access by the first threads of a block; address: of a thread."""
    warps = [range(first, min(first + 32, threads)) for first in range(0, threads, 32)]
    return sum(wavefronts([address(thread) for thread in warp], width) for warp in warps) / len(warps)


def shared_width(op: str, suffix: str) -> int:
    """Bytes of one lane in an access of SASS to shared memory: 16 for LDS.U.128 and for LDSM.16.M88.4 (four matrices
    of 128 bytes); 0 for an instruction that is none."""
    if op == "LDSM":
        match = re.search(r"\.M[T]?\d+\.([24])$", suffix)
        return 4 * int(match[1]) if match else 4
    if op not in ("LDS", "STS", "ATOMS"):
        return 0
    match = re.search(r"\.(64|128)(?:\.|$)", suffix)
    return int(match[1]) // 8 if match else 4
