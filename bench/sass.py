"""What the CUDA kernels cost, read off their machine code: ``python -m bench.sass [architecture ...]``.

Compiles every kernel with nvcc for the architectures (default: those of setup.py), with warnings as errors, and
prints registers, shared memory, occupancy and instructions. For the default network and the shipped `general` it
follows the loops of the kernels that matter and estimates the time per coordinate on an A100 and an H100. No GPU is
needed, and none was used: all times are estimated.

Fails (exit code 1) if a kernel spills or exceeds a number in sass_budget.json.

Assumptions of the estimate:

- both sides of every branch inside a loop are executed (an upper bound), loops run as often as the network's sizes say;
- a multiprocessor issues 4 warp instructions a clock; latency is hidden by other warps and by independent instructions;
- shared memory serves a wavefront a clock: one for 4 bytes of each lane, 4 for 16 bytes; 2 of these where pairs of
  lanes share their addresses (``wavefronts`` in multiprocessor.py). Machine code does not say which loads these are:
  the sources do, see step_mix and backward_mix. Accesses to global memory, which take the same path, are not counted;
- tensor cores multiply at the data sheet's dense rate, on an H100 at the share of it that mma.sync was measured to
  reach (see GPUS);
- pipes overlap, so that the slowest of issue, FP32, tensor cores, special functions, shared memory and memory decides;
- memory moves at the data sheet's rate; caches serve what the kernel has just written and the weights.

Needs nvcc, and cuobjdump (pip install nvidia-cuda-cuobjdump).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.machine_code import Kernel, Loop, Mix, Nest, compile_kernels, count, loops_of, read_kernels, tool
from bench.multiprocessor import limits, mean_wavefronts, parse
from cuda_build import UnavailableError, defaults, nvcc_knows, nvcc_version

LARGE_SHARED = 100 * 1024  # has_large_shared of backward_layout.cuh
BUDGET = Path(__file__).with_name("sass_budget.json")
HIDDEN, LAYERS, TILE = 20, 2, 64
GENERAL = 4  # units of the shipped optimizer `general`, in one layer, with 5 features and 4 averages
STEPS = 20  # over which is spread what a segment's backward does once per tile
CELLS = 5  # of the averaging cells, in the shared memory of their kernels


class Gpu(NamedTuple):
    """Rates per multiprocessor and clock. bytes: of device memory; tensor: multiply-adds of TF32 numbers."""

    name: str
    architecture: str
    processors: int
    gigahertz: float
    gigabytes: float
    fp32: int
    tensor: float
    special: int = 16
    issue: int = 128

    @property
    def bytes(self) -> float:
        return self.gigabytes / self.processors / self.gigahertz


# TF32, from the data sheets: 156 and 494.7 TFLOPS without sparsity, 512 and 1,024 multiply-adds per multiprocessor and
# clock. On an H100 that takes wgmma: mma.sync reaches 62.9 % of the peak (Luo et al. 2024, arXiv:2402.13499).
GPUS = (
    Gpu("A100-80", "80", 108, 1.41, 2040.0, 64, 512),
    Gpu("H100-SXM", "90", 132, 1.75, 3350.0, 128, 0.629 * 1024),
)
HMMA = 16 * 8 * 8 / 32  # multiply-adds of a lane in mma.m16n8k8


def step_mix(kernel: Kernel, layers: int) -> Mix:
    """Per coordinate of step_kernel<H, C, ...>, normalized_step_kernel or stored_step_kernel. All lanes read the same
    weights."""
    hidden, coordinates = (int(n) for n in re.findall(r"\d+", kernel.name)[:2])
    first_layer = units = Nest(hidden)
    if kernel.name.startswith("stored"):
        first_layer = units = Nest(hidden / 2, (Nest(2),))
    elif kernel.name.startswith("step") and coordinates > 1:
        first_layer = Nest(hidden / 2)  # unrolled by two
    tiles = max(loops_of(kernel, coordinates), key=lambda loop: loop.arithmetic)
    return count([tiles], [Nest(1, (first_layer, Nest(layers - 1, (units,))))], 1 / coordinates)


def mma_step_mix(kernel: Kernel, layers: int) -> Mix:
    """Per coordinate of mma_step_kernel<H, C, ...> or mma_stored_step_kernel: a warp has 8 C coordinates. Lanes read
    adjacent weights."""
    hidden, coordinates = (int(n) for n in re.findall(r"\d+", kernel.name)[:2])
    groups = Nest(hidden / 4, wide=1.0)
    parts = max(loops_of(kernel), key=lambda loop: loop.arithmetic)
    return count([parts], [Nest(1, (groups, Nest(layers - 1, (groups,), 1.0)), 1.0)], 32 / (8 * coordinates))


def wide_loads(*loads: tuple[int, float]) -> float:
    """``Nest.wide`` of 128-bit loads: how many of each kind, and the wavefronts of one of them."""
    return sum(n * each for n, each in loads) / sum(n for n, _ in loads) / 4


class Reads(NamedTuple):
    """Wavefronts of wide loads in the backward kernels, by who reads what."""

    rows: float
    pairs: float
    units: float
    slots: float
    first_slot: float


def backward_reads(hidden: int) -> Reads:
    threads, quads = 8 * hidden, TILE // 4
    # What a thread reads (backward_phases.cuh): in the phases on cells rows at its quad, and weights of its pair of
    # units; in the phase on weights rows of its unit, and rows of its slot.
    row = 4 * (TILE + 4)
    return Reads(
        rows=mean_wavefronts(lambda t: 16 * (t % quads), threads),
        pairs=mean_wavefronts(lambda t: t // quads * 32, threads),
        units=mean_wavefronts(lambda t: t % hidden * row, threads),
        slots=mean_wavefronts(lambda t: t // hidden * row, threads),
        first_slot=mean_wavefronts(lambda t: t * row, hidden),
    )


def general_backward_mix(kernel: Kernel, _layers: int) -> Mix:
    """Per coordinate and step of normalized_backward_kernel<4, 1, ...>, whose blocks are one warp: the phases on inputs
    and read-outs are loops over two coordinates of a thread."""
    hidden, features, quads = GENERAL, 5, TILE // 4
    threads, reads = 8 * hidden, backward_reads(hidden)
    lanes, per_coordinate = TILE / threads, threads / TILE
    forward_loads = wide_loads((2, reads.pairs), (1, reads.rows))
    weight_inputs = -(-(1 + features + hidden) // 8)
    forward = Nest(1, (Nest(features, wide=forward_loads), Nest(lanes)), forward_loads)
    inputs = Nest(hidden / 2, wide=wide_loads((4, reads.rows), (2, reads.pairs)))
    weights = Nest(quads / 2, wide=wide_loads((4, reads.units), (weight_inputs, reads.slots)))
    (tiles,) = loops_of(kernel)
    prepare, passes = tiles.inner
    parts = (
        count([prepare], [Nest(lanes / STEPS, (Nest(STEPS),))], per_coordinate),
        count([Loop(0, 0, passes.own)], [Nest(1 / STEPS)], per_coordinate),
        count(passes.inner, [forward, Nest(1, (inputs, weights), forward_loads)], per_coordinate),
    )
    return Mix(sum((part.instructions for part in parts), Counter()), sum(part.wavefronts for part in parts))


def backward_mix(kernel: Kernel, layers: int) -> Mix:
    """Per coordinate and step of backward_kernel<H, L, ...> in a long segment."""
    hidden = int(re.findall(r"\d+", kernel.name)[0])
    threads, quads = 8 * hidden, TILE // 4
    rows, pairs, units, slots, first_slot = backward_reads(hidden)
    forward_loads = wide_loads((2, pairs), (1, rows))
    weight_inputs, weight_inputs_0 = 2 * hidden // 8, -(-(3 + hidden) // 8)
    # Loops by how far they are unrolled; the bias is summed by the warps that have threads with slot 0.
    products = Nest(hidden / 4, wide=forward_loads)
    inputs = Nest(hidden / 2, wide=wide_loads((4, rows), (4, pairs)))
    weights = Nest(quads / 2, wide=wide_loads((4, units), (weight_inputs, slots)))
    inputs_0 = Nest(hidden / 2, wide=wide_loads((4, rows), (2, pairs)))
    weights_0 = Nest(quads / 2, wide=wide_loads((4, units), (weight_inputs_0, slots)))
    bias = Nest(quads * -(-hidden // 32) * 32 / threads, wide=wide_loads((1, first_slot)))
    prepare = Nest(TILE / threads)  # one coordinate per thread
    forward = Nest(1, (products,) * (2 * layers - 1), forward_loads)
    backward = Nest(1, (inputs, weights, bias) * (layers - 1) + (inputs_0, weights_0), forward_loads)
    (tiles,) = loops_of(kernel)
    (passes,) = [loop for loop in tiles.inner if loop.end - loop.begin > (tiles.end - tiles.begin) / 2]
    around = [loop for loop in tiles.inner if loop is not passes]
    per_coordinate = threads / TILE
    parts = (
        count(around, [prepare], per_coordinate),
        # What is done once per tile is spread over its steps.
        count([Loop(0, 0, passes.own)], [Nest(1 / STEPS)], per_coordinate),
        # Behind these comes what only the functional step does.
        count(passes.inner[:2], [forward, backward], per_coordinate),
    )
    return Mix(sum((part.instructions for part in parts), Counter()), sum(part.wavefronts for part in parts))


class Analysed(NamedTuple):
    """What a kernel does per coordinate (and step). bytes: of device memory, those that no such kernel can avoid;
    scratch: those of this one beside them; others: multiply-adds of preprocessing and cells, where these weigh;
    tensor: multiply-adds on tensor cores, multiples and padding included."""

    mix: Callable[[Kernel, int], Mix]
    layers: int
    multiply_adds: float
    bytes: float
    unit: str = "coordinate"
    scratch: float = 0.0
    others: float = 0.0
    tensor: float = 0.0


SEGMENT = "coordinate and step"
ANALYSED = {
    f"step_kernel<{HIDDEN}, 4,": Analysed(step_mix, LAYERS, 4980, 652.0),
    f"step_kernel<{HIDDEN}, 1,": Analysed(step_mix, LAYERS, 4980, 652.0),
    # Three products for each; the first layer's 22 inputs filled up to 24.
    f"mma_step_kernel<{HIDDEN}, 4,": Analysed(mma_step_mix, LAYERS, 20, 652.0, others=520, tensor=3 * 80 * 64),
    f"mma_step_kernel<{HIDDEN}, 2,": Analysed(mma_step_mix, LAYERS, 20, 652.0, others=520, tensor=3 * 80 * 64),
    # By eight inputs: three products for features and the h below, two for the layer's own, which has no small parts.
    f"mma_stored_step_kernel<{HIDDEN}, 4>": Analysed(
        mma_step_mix, LAYERS, 20, 332.0, others=520, tensor=80 * 8 * (3 + 2 * 2 + 3 * 3 + 2 * 2)
    ),
    # bfloat16 and int8 states.
    f"stored_step_kernel<{HIDDEN}, 4, 2, 1>": Analysed(step_mix, LAYERS, 4980, 332.0),
    f"stored_step_kernel<{HIDDEN}, 4, 2, 2>": Analysed(step_mix, LAYERS, 4980, 173.5),
    # What cannot be avoided of a segment: the recorded gradient, and the state at both ends of its steps.
    f"backward_kernel<{HIDDEN}, {LAYERS},": Analysed(backward_mix, LAYERS, 14600, 4 + 640 / STEPS, SEGMENT, 2 * 960.0),
    f"normalized_step_kernel<{GENERAL}, 4,": Analysed(step_mix, 1, 152, 108.0, others=110),
    f"normalized_step_kernel<{GENERAL}, 1,": Analysed(step_mix, 1, 152, 108.0, others=110),
    f"stored_step_kernel<{GENERAL}, 4, 5, 1>": Analysed(step_mix, 1, 152, 60.0, others=110),
    f"stored_step_kernel<{GENERAL}, 4, 5, 2>": Analysed(step_mix, 1, 152, 44.5, others=120),
    f"normalized_backward_kernel<{GENERAL}, 1,": Analysed(
        general_backward_mix, 1, 392, 4 + 96 / STEPS, SEGMENT, 2 * (96.0 + 28.0), 150
    ),
}
FP32 = ("FFMA", "FADD", "FMUL")


def estimate(kernel: Kernel, gpu: Gpu) -> dict[str, float] | None:
    """Clocks of a multiprocessor per coordinate (and step), and nanoseconds of the whole GPU."""
    found = next((entry for prefix, entry in ANALYSED.items() if kernel.name.startswith(prefix)), None)
    if found is None:
        return None
    multiply_adds, floor_bytes = found.multiply_adds, found.bytes
    counted = found.mix(kernel, found.layers)
    counts = {op: counted.number(op) for op in (*FP32, "HMMA", "MUFU", "LDS", "LDG", "STG", "STS")}
    if not 0.98 * multiply_adds <= counts["FFMA"] <= 1.35 * (multiply_adds + found.others):
        needed = f"{multiply_adds} and some {found.others}"
        raise ValueError(f"{kernel.name}: {counts['FFMA']:.0f} FFMA where {needed} are needed: loops misread")
    if counts["HMMA"] * HMMA != found.tensor:
        raise ValueError(f"{kernel.name}: {counts['HMMA']:.0f} HMMA where {found.tensor / HMMA:.0f} are needed")
    total = sum(counted.instructions.values())
    clocks = {
        "issue": total / gpu.issue,
        "fp32": sum(counts[op] for op in FP32) / gpu.fp32,
        "tensor": counts["HMMA"] * HMMA / gpu.tensor,
        "special": counts["MUFU"] / gpu.special,
        "shared": counted.wavefronts / 32,
        "memory": (floor_bytes + found.scratch) / gpu.bytes,
    }
    memory_floor, fp32_floor = floor_bytes / gpu.bytes, multiply_adds / gpu.fp32
    floor = max(memory_floor, fp32_floor, clocks["tensor"])
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
        **counts,
    }


def threads_and_shared(kernel: Kernel) -> tuple[int, int]:
    """Threads and dynamic shared memory of a block, as the launch code computes them (step: for the default layers;
    with averaging cells: for CELLS of them and the default network, without extra inputs)."""
    numbers = [int(n) for n in re.findall(r"\d+", kernel.name)]
    if kernel.name.startswith("step_kernel"):
        return 128, packed_bytes(numbers[0], LAYERS)
    if kernel.name.startswith(("mma_step_kernel", "mma_stored_step_kernel")):
        return 128, mma_bytes(*numbers[:2], LAYERS)
    if kernel.name.startswith("stored_step_kernel"):
        hidden, coordinates, features = numbers[:3]
        weights = packed_bytes(hidden, LAYERS, features=features, read_outs=2 if features == 5 else 1)
        return 128, weights + 4 * 128 * coordinates * (hidden + (features == 5))
    if kernel.name.startswith("normalized_step_kernel"):
        return 128, packed_bytes(numbers[0], LAYERS, features=5, read_outs=2)
    if kernel.name.startswith("backward_kernel"):
        hidden, layers = numbers[:2]
        weights = packed_bytes(hidden, layers)
        rows = 4 * 68 * (3 + layers * hidden + 4 * hidden) + 4 * 3 * 8 * hidden
        return 8 * hidden, rows + (weights if rows + weights <= 65536 else 0)
    if kernel.name.startswith("normalized_backward_kernel"):
        hidden, layers = numbers[:2]
        weights = packed_bytes(hidden, layers, features=5, read_outs=2)
        rows, sums = 4 * 68 * (6 + layers * hidden + 4 * hidden), 4 * (6 * 8 + 64) * hidden
        shared = rows + (sums if rows + sums <= 65536 else 0)
        return 8 * hidden, shared + (weights if rows + sums + weights <= 65536 else 0)
    if kernel.name.startswith("layered_step_kernel"):
        return 128, packed_bytes(numbers[0], LAYERS) + 4 * CELLS * 128
    if kernel.name.startswith("layered_backward_kernel"):
        columns = 2 * HIDDEN  # the inputs and the state of the upper layer
        return 256, 4 * (4 * HIDDEN * (TILE + 1 + columns) + columns * (TILE + 1) + 2 * TILE + HIDDEN)
    return 256, 0


def block_shared(kernel: Kernel, architecture: str) -> int:
    """Shared memory of a block in bytes, with the KiB that the system keeps for every block since 8.0."""
    # From 9.0 on the compiler's report includes that KiB.
    reserved = limits(architecture).reserved if parse(architecture)[0] < 9 else 0
    return threads_and_shared(kernel)[1] + kernel.static_shared + reserved


def packed_bytes(hidden: int, layers: int, features: int = 2, read_outs: int = 1) -> int:
    """phi in shared memory."""
    quadruples = hidden * (1 + features + hidden + (layers - 1) * (1 + 2 * hidden))
    return 16 * (quadruples + -(-read_outs * (hidden + 1) // 4))


def mma_bytes(hidden: int, coordinates: int, layers: int) -> int:
    """phi in shared memory as tensor cores read it, and what four warps of a block keep there."""
    groups = hidden // 4
    first, others = (groups + 2) // 2, groups  # pairs of groups of inputs
    quadruples = groups * 2 * 32 * (first + (layers - 1) * others) + layers * hidden + -(-(hidden + 1) // 4)
    return 16 * quadruples + 4 * 4 * (2 * 8 + groups * 32) * coordinates


def resident_warps(kernel: Kernel, architecture: str) -> int:
    most = limits(architecture)
    block_warps = threads_and_shared(kernel)[0] // 32
    per_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = most.registers // 4 // per_warp * 4 // block_warps
    by_shared = most.shared // max(block_shared(kernel, architecture), 1)
    return min(by_registers, by_shared, most.warps // block_warps, most.blocks) * block_warps


def check(kernel: Kernel, architecture: str, budget: dict[str, dict[str, float]]) -> list[str]:
    """What is wrong with a kernel."""
    wrong = []
    if kernel.spills or kernel.local_bytes:
        wrong.append(f"{kernel.spills} accesses to {kernel.local_bytes} bytes of local memory (spills)")
    multiprocessor = limits(architecture)
    if (shared := block_shared(kernel, architecture)) > multiprocessor.block_shared + multiprocessor.reserved:
        wrong.append(f"{shared} bytes of shared memory, a block has {multiprocessor.block_shared}")
    allowed = next((numbers for prefix, numbers in budget.items() if kernel.name.startswith(prefix)), {})
    most = allowed.get("registers", 255)
    if multiprocessor.shared > LARGE_SHARED:
        most = allowed.get("registers with large shared memory", most)
    if kernel.registers > most:
        wrong.append(f"{kernel.registers} registers, budget {most}")
    for gpu in (gpu for gpu in GPUS if parse(gpu.architecture) == parse(architecture)):
        numbers = estimate(kernel, gpu)
        for name, what in (("issue_ratio", "issue time"), ("ratio", "time of the slowest pipe")):
            limit = allowed.get(f"{name} {gpu.name}")
            if limit is not None and numbers is not None and numbers[name] > limit:
                wrong.append(f"estimated {what} {numbers[name]:.3f} x the floor on {gpu.name}, budget {limit}")
    return [f"sm_{architecture} {kernel.name}: {text}" for text in wrong]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Registers, instructions and estimated times of the CUDA kernels.")
    parser.add_argument(
        "architectures", nargs="*", help="such as 90 or 10.3; default: those of setup.py that nvcc knows"
    )
    given = parser.parse_args(arguments).architectures
    try:
        nvcc = nvcc_version(tool("nvcc"))
        architectures = [parse(one) for one in given] or defaults(nvcc)
    except (UnavailableError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if unknown := [one for one in architectures if not nvcc_knows(one, nvcc, nvcc)]:
        parser.error(f"nvcc of CUDA {nvcc[0]}.{nvcc[1]} does not know {', '.join(f'{a}.{b}' for a, b in unknown)}")
    budget, failures = json.loads(BUDGET.read_text()), []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in (f"{major}{minor}" for major, minor in architectures):
            kernels = read_kernels(compile_kernels(architecture, Path(folder)))
            print(f"\nsm_{architecture}\n{'kernel':34} registers  shared/block  local  warps/SM  instructions")
            for kernel in kernels:
                shared = block_shared(kernel, architecture)
                warps = resident_warps(kernel, architecture)
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
    unit = next(entry.unit for prefix, entry in ANALYSED.items() if kernel.name.startswith(prefix))
    tensor = ("HMMA",) if n["HMMA"] else ()
    mix = ", ".join(f"{op} {n[op]:.0f}" for op in (*FP32, *tensor, "MUFU", "LDS", "LDG", "STG", "STS"))
    print(f"\nestimated: {kernel.name} on {gpu.name}, per {unit}: {n['instructions']:.0f} instructions ({mix})")
    print(
        f"  clocks of one SM: issue {n['issue']:.1f}, FP32 {n['fp32']:.1f}, "
        + (f"tensor cores {n['tensor']:.1f}, " if tensor else "")
        + f"special {n['special']:.1f}, "
        f"shared memory {n['shared']:.1f}, memory {n['memory']:.1f}; "
        f"floors: memory {n['memory_floor']:.1f}, FP32 {n['fp32_floor']:.1f}"
    )
    print(
        f"  estimated issue time {n['issue_ratio']:.2f} x the larger floor; slowest pipe {n['ratio']:.2f} x: "
        f"{n['nanoseconds']:.3f} ns"
    )


if __name__ == "__main__":
    sys.exit(main())
