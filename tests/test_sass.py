"""How bench.sass reads machine code and what it takes a multiprocessor for; no nvcc is needed."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import cuda_build
from bench import machine_code, multiprocessor, sass

ROOT = Path(__file__).resolve().parent.parent
# As cuobjdump -sass prints it: a loop of 8 to 0xd0 with one of 4 in it, accesses to shared memory in both and outside.
CODE = """
\t\tFunction : _ZN3l2l11step_kernelILi20ELi4ELi32504EEEvNS_13StepArgumentsIXT1_EEE
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/                   STS [R44], R2 ;                       /* 0x000000022c007388 */
        /*0020*/                   LDS.128 R4, [R44] ;                   /* 0x000000002c047984 */
        /*0030*/                   LDS R8, [R44+0x10] ;                  /* 0x000010002c087984 */
        /*0040*/              @!P0 LDS.64 R10, [R44+0x18] ;              /* 0x000018002c0a8984 */
        /*0050*/               @P1 STS.128 [R45], R4 ;                   /* 0x000000042d001388 */
        /*0060*/                   LDSM.16.M88.4 R12, [R46] ;            /* 0x000000002e0c783b */
        /*0070*/                   LDS.U.128 R16, [UR4+0x20] ;           /* 0x0000200004107984 */
        /*0080*/                   LDG.E.128 R20, desc[UR6][R2.64] ;     /* 0x0000000602147981 */
        /*0090*/                   FFMA R24, R4, R5, R24 ;               /* 0x0000000504187223 */
        /*00a0*/                   FFMA R25, R4, R6, R25 ;               /* 0x0000000604197223 */
        /*00b0*/                   FFMA.FTZ R26, R4, R7, R26 ;           /* 0x00000007041a7223 */
        /*00c0*/               @P0 BRA 0x70 ;                            /* 0xfffffffc00a80947 */
        /*00d0*/                   FADD R27, R24, R25 ;                  /* 0x00000019181b7221 */
        /*00e0*/               @P2 BRA 0x20 ;                            /* 0xfffffffc00a82947 */
        /*00f0*/                   EXIT ;                                /* 0x000000000000794d */
"""


def kernel() -> machine_code.Kernel:
    ((symbol, body),) = machine_code.read_code(CODE).items()
    return machine_code.Kernel(machine_code.readable(symbol), 100, 0, 0, 0, body)


def test_accesses_to_shared_memory_are_read_with_their_widths():
    read = kernel()
    assert read.name == "step_kernel<20, 4, 32504>" and len(read.instructions) == 16
    keys = Counter(instruction.key for instruction in read.instructions)
    assert keys["LDS.128"] == 2 and keys["LDS.64"] == keys["LDS.32"] == keys["LDSM.128"] == 1
    assert keys["STS.32"] == keys["STS.128"] == 1
    assert keys["LDG"] == 1 and keys["FFMA"] == 3 and keys["BRA"] == 2
    assert read.instructions[4] == (0x40, "LDS", ".64", " R10, [R44+0x18] ")


@pytest.mark.parametrize(
    ("op", "suffix", "width"),
    [
        ("LDS", "", 4),
        ("LDS", ".U8", 4),
        ("LDS", ".64", 8),
        ("LDS", ".U.64", 8),
        ("LDS", ".128", 16),
        ("STS", "", 4),
        ("STS", ".U16", 4),
        ("STS", ".64", 8),
        ("STS", ".128", 16),
        ("LDSM", ".16.M88", 4),
        ("LDSM", ".16.M88.2", 8),
        ("LDSM", ".16.M88.4", 16),
        ("LDSM", ".16.MT88.4", 16),
        ("ATOMS", ".POPC.INC.32", 4),
        ("LDG", ".E.128", 0),
        ("LDC", ".64", 0),
        ("FFMA", "", 0),
    ],
)
def test_width_of_an_access_to_shared_memory(op, suffix, width):
    assert multiprocessor.shared_width(op, suffix) == width


def test_wavefronts_are_counted_in_the_loops_that_run():
    read = kernel()
    # Both loops have too little arithmetic to stay loops of their own in loops_of: they are given as they are.
    inner = machine_code.Loop(0x70, 0xC0, Counter({"LDS.128": 1, "LDG": 1, "FFMA": 3, "BRA": 1}))
    outer = machine_code.Loop(0x20, 0xE0, Counter(), [inner])
    for instruction in read.instructions:
        if 0x20 <= instruction.address < 0x70 or instruction.address in (0xD0, 0xE0):
            outer.own[instruction.key] += 1
    nest = machine_code.Nest
    mix = machine_code.count([outer], [nest(8, (nest(4, wide=1.0),))], 0.5)
    # Per run of the outer loop LDS.128, .64 and .32 with shared addresses 2 + 1 + 1, STS.128 and LDSM 4 + 4; of the
    # inner one LDS.128 of adjacent words 4.
    assert mix.wavefronts == 0.5 * 8 * ((2 + 1 + 1 + 4 + 4) + 4 * 4)
    assert mix.number("LDS") == 0.5 * 8 * (3 + 4) and mix.number("FFMA") == 0.5 * 8 * 4 * 3
    assert mix.number("STS") == 4 and mix.number("LD") == 0
    with pytest.raises(ValueError, match="expected 2 loops, found 1"):
        machine_code.count([outer], [nest(8), nest(8)], 1)


def test_a_loop_is_found_with_its_instructions():
    body = ["FFMA R1, R2, R3, R1"] * 16 + ["LDS.128 R4, [R2]", "@P0 BRA 0x100"]
    lines = [f"        /*{0x100 + 16 * n:04x}*/  {text} ;" for n, text in enumerate(body)]
    code = machine_code.read_code("\n".join(["\t\tFunction : f", *lines]))
    read = machine_code.Kernel("f", 1, 0, 0, 0, code["f"])
    (loop,) = machine_code.loops_of(read)
    assert loop.own == {"FFMA": 16, "LDS.128": 1, "BRA": 1} and loop.arithmetic == 16
    assert machine_code.loop_wavefronts(loop.own, machine_code.PAIRED) == 2


def test_the_pair_rule():
    def of(address, width):
        return multiprocessor.wavefronts([address(lane) for lane in range(32)], width)

    # Adjacent words, one address for all lanes, one for every pair.
    for width, adjacent, same, pairs in ((4, 1, 1, 1), (8, 2, 1, 1), (16, 4, 2, 2)):
        assert multiprocessor.wavefronts([width * lane for lane in range(32)], width) == adjacent
        assert multiprocessor.wavefronts([64] * 32, width) == same
        assert multiprocessor.wavefronts([width * (lane // 2) for lane in range(32)], width) == pairs
    assert of(lambda lane: (lane // 4 * 2 + lane % 2) * 16, 16) == 2
    # Lanes 4 or 16 apart that share addresses are no pairs; nor are pairs in a part of the warp only.
    assert of(lambda lane: lane % 4 * 16, 16) == 4 and of(lambda lane: lane % 16 * 16, 16) == 4
    assert of(lambda lane: min(lane, 30) * 16, 16) == 4
    # Conflicts: all in one bank; rows 68 floats apart, eight of which touch all banks, and 64 apart.
    assert of(lambda lane: lane * 128, 4) == 32
    assert of(lambda lane: lane * 272, 16) == 4 and of(lambda lane: lane * 256, 16) == 32
    # Inactive lanes ask for nothing.
    assert multiprocessor.wavefronts([16 * lane for lane in range(8)], 16) == 1
    assert multiprocessor.wavefronts([0], 16) == 1
    # Five warps of the weight phase at 20 units: in four of them the rows wrap within a quarter warp.
    assert multiprocessor.mean_wavefronts(lambda t: t % 20 * 272, 160) == pytest.approx(4.8)


def test_wavefronts_against_the_fewest_that_banks_allow():
    generator = random.Random(3)
    for _ in range(200):
        addresses = [4 * generator.randrange(256) for _ in range(32)]
        words = set(addresses)
        fewest = max(Counter(word // 4 % 32 for word in words).values())
        assert multiprocessor.wavefronts(addresses, 4) == fewest
        wide = [16 * generator.randrange(64) for _ in range(32)]
        assert 4 <= multiprocessor.wavefronts(wide, 16) <= 32


@pytest.mark.parametrize(
    ("architecture", "shared", "warps", "blocks", "block_shared"),
    [
        ("75", 64, 32, 16, 64),
        ("80", 164, 64, 32, 163),
        ("86", 100, 48, 16, 99),
        ("87", 164, 48, 16, 163),
        ("88", 100, 48, 16, 99),
        ("89", 100, 48, 24, 99),
        ("90", 228, 64, 32, 227),
        ("100", 228, 64, 32, 227),
        ("101", 228, 48, 24, 227),
        ("103", 228, 64, 32, 227),
        ("110", 228, 48, 24, 227),
        ("120", 100, 48, 24, 99),
        ("121", 100, 48, 24, 99),
    ],
)
def test_limits_of_a_multiprocessor(architecture, shared, warps, blocks, block_shared):
    most = multiprocessor.limits(architecture)
    assert (most.shared // 1024, most.warps, most.blocks) == (shared, warps, blocks)
    assert most.block_shared == block_shared * 1024 and most.registers == 65536
    major, minor = multiprocessor.parse(architecture)
    assert multiprocessor.limits(f"{major}.{minor}") == multiprocessor.limits(f"sm_{architecture}") == most


def test_every_architecture_of_the_build_has_limits():
    for major, minor in cuda_build.NVCC_SINCE:
        assert multiprocessor.limits(f"{major}.{minor}").warps >= 32
    for wrong in ("70", "72", "6.1", "130", "9", "", "sm_", "compute_90", "90a", "-90", "9.0.0", "1000"):
        with pytest.raises(ValueError, match="expected an architecture from 7.5 to 12.x"):
            multiprocessor.limits(wrong)


@pytest.mark.parametrize("architecture", ["75", "80", "86", "87", "89", "90", "100", "103", "110", "120", "121"])
def test_a_kernel_over_its_budget_is_reported(architecture):
    def found(name, registers=100, static=0, local=0):
        read = machine_code.Kernel(name, registers, static, local, 0, [])
        warps = sass.resident_warps(read, architecture)
        assert 0 <= warps <= multiprocessor.limits(architecture).warps
        return sass.check(read, architecture, {"gather": {"registers": 64, "registers with large shared memory": 48}})

    large = architecture in ("80", "87", "90", "100", "103", "110")
    assert found("gather_kernel", 48) == []
    assert bool(found("gather_kernel", 64)) == large and found("gather_kernel", 65)
    assert found("upload_table_kernel", local=8) and not found("upload_table_kernel", 255)
    # The compiler's report includes the KiB kept for the system from 9.0 on.
    most = multiprocessor.limits(architecture).block_shared
    most += 1024 if multiprocessor.parse(architecture) >= (9, 0) else 0
    assert found("upload_table_kernel", static=most) == []
    (said,) = found("upload_table_kernel", static=most + 16)
    assert "bytes of shared memory" in said


def test_the_budget_names_what_is_checked():
    budget = json.loads((ROOT / "bench" / "sass_budget.json").read_text())
    keys = {"registers", "registers with large shared memory"}
    keys |= {f"{ratio} {gpu.name}" for ratio in ("issue_ratio", "ratio") for gpu in sass.GPUS}
    assert {key for limits in budget.values() for key in limits} <= keys
    prefixes = ("step_kernel<", "normalized_step_kernel<", "layered_step_kernel<", "backward_kernel<")
    prefixes += ("layered_backward_kernel<", "normalized_backward_kernel<", "stored_step_kernel<")
    prefixes += ("mma_step_kernel<", "mma_stored_step_kernel<")
    assert all(prefix.startswith(prefixes) for prefix in budget)


@pytest.mark.parametrize(("argument", "said"), [("70", "from 7.5 to 12.x"), ("nonsense", "got 'nonsense'")])
def test_the_command_refuses_an_unknown_architecture(argument, said):
    done = subprocess.run([sys.executable, "-m", "bench.sass", argument], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said in done.stderr or "nvcc was not found" in done.stderr
