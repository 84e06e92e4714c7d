"""Machine code of the CUDA kernels (SASS): compiling and reading it, its loops, and what they execute."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.multiprocessor import shared_width

REPOSITORY = Path(__file__).resolve().parent.parent


class Instruction(NamedTuple):
    address: int
    op: str
    suffix: str
    operands: str

    @property
    def key(self) -> str:
        """LDS.128 for an access of 128 bits per lane to shared memory, else the operation alone."""
        width = shared_width(self.op, self.suffix)
        return f"{self.op}.{8 * width}" if width else self.op


class Kernel(NamedTuple):
    name: str
    registers: int
    static_shared: int
    local_bytes: int
    spills: int
    instructions: list[Instruction]


def tool(name: str) -> str:
    """Path of a CUDA tool. Raises FileNotFoundError saying how to get it."""
    site = sysconfig.get_paths()["purelib"]
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", f"{site}/nvidia/cu13/bin"]
    found = shutil.which(name) or next((p for place in places if (p := shutil.which(name, path=place))), None)
    if found is None:
        hint = "nvcc: the CUDA toolkit; cuobjdump: pip install nvidia-cuda-cuobjdump"
        raise FileNotFoundError(f"{name} was not found ({hint})")
    return found


def compile_kernels(architecture: str, folder: Path) -> Path:
    target = folder / f"sm_{architecture}.cubin"
    subprocess.run(
        [tool("nvcc"), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Werror", "all-warnings", "-cubin"]
        + [f"-I{REPOSITORY / 'csrc' / 'cuda'}", str(Path(__file__).with_name("sass_kernels.cu")), "-o", str(target)],
        check=True,
    )
    return target


def read_kernels(cubin: Path) -> list[Kernel]:
    dump = tool("cuobjdump")
    usage = subprocess.run([dump, "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    code = subprocess.run([dump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    bodies = read_code(code)
    kernels = []
    for name, registers, stack, shared, local in resources:
        spills = sum(instruction.op in ("STL", "LDL") for instruction in bodies[name])
        kernels.append(
            Kernel(readable(name), int(registers), int(shared), int(stack) + int(local), spills, bodies[name])
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def read_code(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every function in what cuobjdump -sass prints."""
    bodies: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            body = bodies.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(\S*)(.*?);", line):
            body.append(Instruction(int(match[1], 16), match[2], match[3], match[4]))
    return bodies


def readable(symbol: str) -> str:
    """step_kernel<20, 4, 32504> for the mangled name of one."""
    match = re.match(r"_ZN3l2lL?\d+([a-z_]+_kernel)(?:I((?:Li\d+E)+)E)?", symbol)
    if match is None:
        return symbol
    numbers = re.findall(r"Li(\d+)E", match[2] or "")
    return match[1] + (f"<{', '.join(numbers)}>" if numbers else "")


@dataclass
class Loop:
    begin: int
    end: int
    own: Counter[str] = field(default_factory=Counter)  # instructions outside inner loops, see Instruction.key
    inner: list[Loop] = field(default_factory=list)

    @property
    def arithmetic(self) -> int:
        return self.own["FFMA"] + self.own["FADD"] + sum(loop.arithmetic for loop in self.inner)


def loops_of(kernel: Kernel, small_trips: int = 1) -> list[Loop]:
    """The natural loops that do arithmetic (backward branches), nested."""
    found: list[Loop] = []
    for address, op, _, operands in kernel.instructions:
        target = re.search(r"(0x[0-9a-f]+)", operands) if op == "BRA" else None
        if target and int(target[1], 16) < address:
            found.append(Loop(int(target[1], 16), address))
    found.sort(key=lambda loop: loop.begin - loop.end)
    roots: list[Loop] = []
    for loop in found:
        siblings = roots
        while parent := next((p for p in siblings if p.begin <= loop.begin and loop.end <= p.end), None):
            siblings = parent.inner
        siblings.append(loop)
    for instruction in kernel.instructions:
        siblings, place = roots, None
        while deeper := next((p for p in siblings if p.begin <= instruction.address <= p.end), None):
            place, siblings = deeper, deeper.inner
        if place is not None:
            place.own[instruction.key] += 1

    def prune(loop: Loop) -> None:
        """Merges loops without arithmetic into the one around them, as if they ran ``small_trips`` times. Loops inside
        such loops are those over the dimensions of tensors that are not dense: they do not run."""
        for inner in (inner for inner in loop.inner if inner.arithmetic >= 8):
            prune(inner)
        for inner in (inner for inner in loop.inner if inner.arithmetic < 8):
            for op, n in inner.own.items():
                loop.own[op] += n * small_trips
        loop.inner = sorted((inner for inner in loop.inner if inner.arithmetic >= 8), key=lambda inner: inner.begin)

    for root in roots:
        prune(root)
    return [root for root in roots if root.arithmetic >= 8]


class Mix(NamedTuple):
    """What a thread executes per coordinate (and step)."""

    instructions: Counter[str]  # by Instruction.key
    wavefronts: float  # of a warp's accesses to shared memory

    def number(self, op: str) -> float:
        return sum(n for key, n in self.instructions.items() if key.split(".")[0] == op)


PAIRED = 0.5


class Nest(NamedTuple):
    """How often a loop runs per run of the one around it, and the loops inside, in the order of the code. wide: the
    wavefronts of its wide loads from shared memory against those of lanes that read adjacent words."""

    trips: float
    inner: tuple[Nest, ...] = ()
    wide: float = PAIRED


def loop_wavefronts(own: Counter[str], wide: float) -> float:
    """Wavefronts of the accesses to shared memory in a loop. Only for wide loads (LDS.64, LDS.128) is it known which
    lanes share an address; all else is taken for accesses to adjacent words."""
    total = 0.0
    for key, n in own.items():
        op, _, bits = key.partition(".")
        if bits:
            total += n * int(bits) / 32 * (wide if op == "LDS" and bits != "32" else 1)
    return total


def count(loops: Sequence[Loop], nests: Sequence[Nest], times: float) -> Mix:
    if len(loops) != len(nests):
        raise ValueError(f"expected {len(nests)} loops, found {len(loops)}: adapt the loop nest in bench/sass.py")
    total, wavefronts = Counter(), 0.0
    for loop, nest in zip(loops, nests):
        inside = count(loop.inner, nest.inner, times * nest.trips)
        for key, n in loop.own.items():
            total[key] += n * times * nest.trips
        for key, n in inside.instructions.items():
            total[key] += n
        wavefronts += loop_wavefronts(loop.own, nest.wide) * times * nest.trips + inside.wavefronts
    return Mix(total, wavefronts)
