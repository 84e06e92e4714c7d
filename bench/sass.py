"""What the CUDA kernels cost, read off their machine code: ``python -m bench.sass [architecture ...]``.

Compiles every kernel with nvcc for the architectures (default: those of setup.py), with warnings as errors, and
prints registers, shared memory, occupancy and instructions. For the default network it follows the loops of the two
kernels that matter and estimates the time per coordinate on an A100 and an H100. No GPU is needed, and none was used:
all times are estimated.

Fails (exit code 1) if a kernel spills or exceeds a number in sass_budget.json.

Assumptions of the estimate:

- both sides of every branch inside a loop are executed (an upper bound), loops run as often as the network's sizes say;
- a multiprocessor issues 4 warp instructions a clock; latency is hidden by other warps and by independent instructions;
- pipes overlap, so that the slowest of issue, FP32, special functions and memory decides;
- memory moves at the data sheet's rate; caches serve what the kernel has just written and the weights.

Needs nvcc, and cuobjdump (pip install nvidia-cuda-cuobjdump).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_name("sass_budget.json")
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
HIDDEN, LAYERS, TILE = 20, 2, 64
CELLS = 5  # of the averaging cells, in the shared memory of their kernels


class Gpu(NamedTuple):
    """Rates per multiprocessor and clock. bytes: of device memory."""

    name: str
    architecture: str
    processors: int
    gigahertz: float
    gigabytes: float
    fp32: int
    special: int = 16
    issue: int = 128

    @property
    def bytes(self) -> float:
        return self.gigabytes / self.processors / self.gigahertz


GPUS = (
    Gpu("A100-80", "80", 108, 1.41, 2040.0, 64),
    Gpu("H100-SXM", "90", 132, 1.75, 3350.0, 128),
)

# Per multiprocessor: registers, shared memory, warps, blocks.
OCCUPANCY = {
    "75": (65536, 65536, 32, 16),
    "80": (65536, 167936, 64, 32),
    "86": (65536, 102400, 48, 16),
    "89": (65536, 102400, 48, 24),
    "90": (65536, 233472, 64, 32),
    "100": (65536, 233472, 64, 32),
    "120": (65536, 102400, 48, 24),
}


@dataclass
class Loop:
    begin: int
    end: int
    own: Counter[str] = field(default_factory=Counter)  # instructions outside inner loops
    inner: list[Loop] = field(default_factory=list)

    @property
    def arithmetic(self) -> int:
        return self.own["FFMA"] + self.own["FADD"] + sum(loop.arithmetic for loop in self.inner)


class Kernel(NamedTuple):
    name: str
    registers: int
    static_shared: int
    local_bytes: int
    spills: int
    instructions: list[tuple[int, str, str]]  # address, opcode, operands


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
    bodies: dict[str, list[tuple[int, str, str]]] = {}
    for line in code.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            body = bodies.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(\S*)(.*?);", line):
            body.append((int(match[1], 16), match[2], match[4]))
    kernels = []
    for name, registers, stack, shared, local in resources:
        spills = sum(op in ("STL", "LDL") for _, op, _ in bodies[name])
        kernels.append(
            Kernel(readable(name), int(registers), int(shared), int(stack) + int(local), spills, bodies[name])
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def readable(symbol: str) -> str:
    """step_kernel<20, 4, 32504> for the mangled name of one."""
    match = re.match(r"_ZN3l2lL?\d+([a-z_]+_kernel)(?:I((?:Li\d+E)+)E)?", symbol)
    if match is None:
        return symbol
    numbers = re.findall(r"Li(\d+)E", match[2] or "")
    return match[1] + (f"<{', '.join(numbers)}>" if numbers else "")


def loops_of(kernel: Kernel, small_trips: int = 1) -> list[Loop]:
    """The natural loops that do arithmetic (backward branches), nested."""
    found: list[Loop] = []
    for address, op, operands in kernel.instructions:
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
    for address, op, _ in kernel.instructions:
        siblings, place = roots, None
        while deeper := next((p for p in siblings if p.begin <= address <= p.end), None):
            place, siblings = deeper, deeper.inner
        if place is not None:
            place.own[op] += 1

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


class Nest(NamedTuple):
    """How often a loop runs per run of the one around it, and the loops inside, in the order of the code."""

    trips: float
    inner: tuple[Nest, ...] = ()


def count(loops: Sequence[Loop], nests: Sequence[Nest], times: float, total: Counter[str]) -> None:
    if len(loops) != len(nests):
        raise ValueError(f"expected {len(nests)} loops, found {len(loops)}: adapt the loop nest in bench/sass.py")
    for loop, nest in zip(loops, nests):
        for op, n in loop.own.items():
            total[op] += n * times * nest.trips
        count(loop.inner, nest.inner, times * nest.trips, total)


def step_mix(kernel: Kernel) -> Counter[str]:
    """Instructions per coordinate of step_kernel<H, C, ...>."""
    hidden, coordinates = (int(n) for n in re.findall(r"\d+", kernel.name)[:2])
    unit_loop = Nest(hidden)
    first_layer = Nest(hidden / 2) if coordinates > 1 else unit_loop  # unrolled by two
    total: Counter[str] = Counter()
    tiles = max(loops_of(kernel, coordinates), key=lambda loop: loop.arithmetic)
    count([tiles], [Nest(1, (first_layer, Nest(LAYERS - 1, (unit_loop,))))], 1 / coordinates, total)
    return total


def backward_mix(kernel: Kernel) -> Counter[str]:
    """Instructions per coordinate and step of backward_kernel<H, L, ...> in a long segment."""
    hidden, layers = (int(n) for n in re.findall(r"\d+", kernel.name)[:2])
    threads, quads = 8 * hidden, TILE // 4
    # Loops by how far they are unrolled; the bias is summed by the warps that have threads with slot 0.
    products, inputs, weights = Nest(hidden / 4), Nest(hidden / 2), Nest(quads / 2)
    bias = Nest(quads * -(-hidden // 32) * 32 / threads)
    prepare = Nest(TILE / threads)  # one coordinate per thread
    forward = Nest(1, (products,) * (2 * layers - 1))
    backward = Nest(1, (inputs, weights, bias) * (layers - 1) + (inputs, weights))
    (tiles,) = loops_of(kernel)
    (passes,) = [loop for loop in tiles.inner if loop.end - loop.begin > (tiles.end - tiles.begin) / 2]
    around = [loop for loop in tiles.inner if loop is not passes]
    total: Counter[str] = Counter()
    per_coordinate = threads / TILE
    count(around, [prepare], per_coordinate, total)
    # What is done once per tile is spread over its steps, some 20.
    count([Loop(0, 0, passes.own)], [Nest(1 / 20)], per_coordinate, total)
    # Behind these comes what only the functional step does.
    count(passes.inner[:2], [forward, backward], per_coordinate, total)
    return total


ANALYSED = {
    f"step_kernel<{HIDDEN}, 4,": (step_mix, 4980, 652.0, "coordinate"),
    f"step_kernel<{HIDDEN}, 1,": (step_mix, 4980, 652.0, "coordinate"),
    # The floor counts what no such kernel can avoid: the recorded gradient, and the state at both ends of 20 steps. The
    # estimate counts this kernel's scratch too.
    f"backward_kernel<{HIDDEN}, {LAYERS},": (backward_mix, 14600, 4 + 640 / 20, "coordinate and step"),
}
SCRATCH_BYTES = {"backward_kernel": 2 * 960.0}
FP32 = ("FFMA", "FADD", "FMUL")


def estimate(kernel: Kernel, gpu: Gpu) -> dict[str, float] | None:
    """Clocks of a multiprocessor per coordinate (and step), and nanoseconds of the whole GPU."""
    found = next((entry for prefix, entry in ANALYSED.items() if kernel.name.startswith(prefix)), None)
    if found is None:
        return None
    mix, multiply_adds, floor_bytes, _ = found
    counts = mix(kernel)
    if not 0.98 <= counts["FFMA"] / multiply_adds <= 1.35:
        raise ValueError(f"{kernel.name}: {counts['FFMA']:.0f} FFMA where {multiply_adds} are needed: loops misread")
    total = sum(counts.values())
    clocks = {
        "issue": total / gpu.issue,
        "fp32": sum(counts[op] for op in FP32) / gpu.fp32,
        "special": counts["MUFU"] / gpu.special,
        "memory": (floor_bytes + SCRATCH_BYTES.get(kernel.name.split("<")[0], 0.0)) / gpu.bytes,
    }
    memory_floor, fp32_floor = floor_bytes / gpu.bytes, multiply_adds / gpu.fp32
    floor = max(memory_floor, fp32_floor)
    slowest = max(clocks.values())
    nanoseconds = 1 / gpu.gigahertz / gpu.processors
    return {
        **clocks,
        "memory_floor": memory_floor,
        "fp32_floor": fp32_floor,
        "issue_ratio": clocks["issue"] / floor,
        "ratio": slowest / floor,
        "nanoseconds": slowest * nanoseconds,
        "instructions": total,
        **{op: counts[op] for op in ("FFMA", "FADD", "FMUL", "MUFU", "LDS", "LDG", "STG", "STS")},
    }


def threads_and_shared(kernel: Kernel) -> tuple[int, int]:
    """Threads and dynamic shared memory of a block, as the launch code computes them (step: for the default layers;
    with averaging cells: for CELLS of them and the default network, without extra inputs)."""
    numbers = [int(n) for n in re.findall(r"\d+", kernel.name)]
    if kernel.name.startswith("step_kernel"):
        return 128, packed_bytes(numbers[0], LAYERS)
    if kernel.name.startswith("backward_kernel"):
        hidden, layers = numbers[:2]
        weights = packed_bytes(hidden, layers)
        rows = 4 * 68 * (3 + layers * hidden + 4 * hidden) + 4 * 3 * 8 * hidden
        return 8 * hidden, rows + (weights if rows + weights <= 65536 else 0)
    if kernel.name.startswith("gac_step_kernel"):
        return 128, packed_bytes(numbers[0], LAYERS) + 4 * CELLS * 128
    if kernel.name.startswith("gac_backward_kernel"):
        columns = 2 * HIDDEN  # the inputs and the state of the upper layer
        return 256, 4 * (4 * HIDDEN * (TILE + 1 + columns) + columns * (TILE + 1) + 2 * TILE + HIDDEN)
    return 256, 0


def block_shared(kernel: Kernel, architecture: str) -> int:
    """Shared memory of a block in bytes, with the KiB that the system keeps for every block since 8.0."""
    # From 9.0 on the compiler's report includes that KiB.
    reserved = 1024 if architecture in ("80", "86", "89") else 0
    return threads_and_shared(kernel)[1] + kernel.static_shared + reserved


def packed_bytes(hidden: int, layers: int) -> int:
    """phi in shared memory."""
    return 16 * (hidden * (3 + hidden + (layers - 1) * (1 + 2 * hidden)) + hidden // 4 + 1)


def resident_warps(kernel: Kernel, architecture: str) -> int:
    registers, shared, warps, blocks = OCCUPANCY[architecture]
    block_warps = threads_and_shared(kernel)[0] // 32
    per_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = registers // 4 // per_warp * 4 // block_warps
    by_shared = shared // max(block_shared(kernel, architecture), 1)
    return min(by_registers, by_shared, warps // block_warps, blocks) * block_warps


def check(kernel: Kernel, architecture: str, budget: dict[str, dict[str, float]]) -> list[str]:
    """What is wrong with a kernel."""
    wrong = []
    if kernel.spills or kernel.local_bytes:
        wrong.append(f"{kernel.spills} accesses to {kernel.local_bytes} bytes of local memory (spills)")
    limits = next((limits for prefix, limits in budget.items() if kernel.name.startswith(prefix)), {})
    most = limits.get(f"registers sm_{architecture}", limits.get("registers", 255))
    if kernel.registers > most:
        wrong.append(f"{kernel.registers} registers, budget {most}")
    for gpu in GPUS:
        if gpu.architecture != architecture:
            continue
        limit, numbers = limits.get(f"issue_ratio {gpu.name}"), estimate(kernel, gpu)
        if limit is not None and numbers is not None and numbers["issue_ratio"] > limit:
            wrong.append(f"estimated issue time {numbers['issue_ratio']:.3f} x the floor on {gpu.name}, budget {limit}")
    return [f"sm_{architecture} {kernel.name}: {text}" for text in wrong]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Registers, instructions and estimated times of the CUDA kernels.")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help=f"default: {' '.join(ARCHITECTURES)}")
    options = parser.parse_args(arguments)
    budget, failures = json.loads(BUDGET.read_text()), []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in options.architectures:
            kernels = read_kernels(compile_kernels(architecture, Path(folder)))
            print(f"\nsm_{architecture}\n{'kernel':34} registers  shared/block  local  warps/SM  instructions")
            for kernel in kernels:
                shared = block_shared(kernel, architecture)
                warps = resident_warps(kernel, architecture) if architecture in OCCUPANCY else 0
                print(
                    f"{kernel.name:34} {kernel.registers:9} {shared:13} {kernel.local_bytes:6} {warps:9} "
                    f"{len(kernel.instructions):13}"
                )
                failures += check(kernel, architecture, budget)
            for gpu in (gpu for gpu in GPUS if gpu.architecture == architecture):
                for kernel in kernels:
                    if (numbers := estimate(kernel, gpu)) is not None:
                        report(kernel, gpu, numbers)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def report(kernel: Kernel, gpu: Gpu, n: dict[str, float]) -> None:
    unit = next(entry[3] for prefix, entry in ANALYSED.items() if kernel.name.startswith(prefix))
    mix = ", ".join(f"{op} {n[op]:.0f}" for op in ("FFMA", "FADD", "FMUL", "MUFU", "LDS", "LDG", "STG", "STS"))
    print(f"\nestimated: {kernel.name} on {gpu.name}, per {unit}: {n['instructions']:.0f} instructions ({mix})")
    print(
        f"  clocks of one SM: issue {n['issue']:.1f}, FP32 {n['fp32']:.1f}, special {n['special']:.1f}, memory "
        f"{n['memory']:.1f}; floors: memory {n['memory_floor']:.1f}, FP32 {n['fp32_floor']:.1f}"
    )
    print(
        f"  estimated issue time {n['issue_ratio']:.2f} x the larger floor; slowest pipe {n['ratio']:.2f} x: "
        f"{n['nanoseconds']:.3f} ns"
    )


if __name__ == "__main__":
    sys.exit(main())
