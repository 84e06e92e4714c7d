"""The command line of ``python -m l2l_fast bench``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ... import _C
from ...networks.writing import check_writable, write_atomically
from .cases import Bench, Options, default_isas
from .contenders import check_agreement, fused_runs_on, make_network
from .table import Row, render

MEASURES = ("products", "step", "segment", "gac", "backward", "episode", "memory")
_STDOUT = "-"  # as the name of a file
CONTENDERS = ("eager", "compile", "fused")
_FULL = {"sizes": (10**3, 10**4, 10**5, 10**6, 10**7), "segment_sizes": (10**3, 10**4, 10**5, 10**6)}
_QUICK = {"sizes": (10**3, 10**4), "segment_sizes": (10**3, 10**4)}


_EXAMPLES = """examples:
  python -m l2l_fast bench --quick
  python -m l2l_fast bench --sizes 1e5 1e6 --only step segment --json bench.json
  python -m l2l_fast bench --quick --json - > bench.json"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON; returns the exit status (2 if the device cannot be used)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    if device.type == "cpu":
        unknown = [isa for isa in arguments.isa or () if isa not in _C.isa_available()]
        if unknown:
            print(f"bench: --isa: expected some of {_C.isa_available()}, got {unknown}", file=sys.stderr)
            return 2
    if arguments.json not in (None, _STDOUT):
        try:
            check_writable(arguments.json, "--json")
        except (OSError, ValueError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    begin = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {what}", file=sys.stderr, flush=True)

    options = _options(arguments, device, say)
    threads_before = torch.get_num_threads()
    machine = {"command": shlex.join(["python", "-m", "l2l_fast", "bench", *argv]), **describe_machine(device)}
    # Where the JSON goes to stdout, what is for people goes to stderr.
    people = sys.stderr if arguments.json == _STDOUT else sys.stdout
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), file=people)
    if fused_runs_on(device):
        difference = check_agreement(make_network(device))
        print(f"eager and fused agree: relative difference {difference:.1e}", file=people)
    else:
        print(f"this build has no fused kernels for {device.type}: only the others are measured", file=people)
    print(file=people, flush=True)

    rows: list[Row] = []
    status = 0
    try:
        for row in Bench(options).rows():
            rows.append(row)
    except KeyboardInterrupt:
        say("interrupted; what follows is what has been measured")
        status = 130
    finally:
        torch.set_num_threads(threads_before)
    print(render(rows), file=people)
    machine["load average at the end"] = _load()
    took = f"{time.perf_counter() - begin:.0f} s; load average at the end: {machine['load average at the end']}"
    print(f"\n{took}", file=people)
    if arguments.json is not None:
        result = {"machine": machine, "rows": [row.as_json() for row in rows]}
        text = json.dumps(result, indent=1) + "\n"
        if arguments.json == _STDOUT:
            sys.stdout.write(text)
        else:
            write_atomically(arguments.json, text, "--json")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m l2l_fast bench",
        description="Eager PyTorch, torch.compile and the fused kernels side by side, in one run and one table.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, short samples: a look, not a result")
    parser.add_argument("--sizes", type=_size, nargs="+", metavar="N", help="coordinates, such as 1000 or 1e6")
    parser.add_argument(
        "--segment-sizes", type=_size, nargs="+", metavar="N", help="for the segment (default: as --sizes, up to 1e6)"
    )
    parser.add_argument("--threads", type=_positive, nargs="+", metavar="N", help="default: 1 and all cores")
    parser.add_argument("--isa", nargs="+", metavar="NAME", help="instruction sets (default: the best, and avx2)")
    parser.add_argument("--only", nargs="+", choices=MEASURES, metavar="NAME", help=f"some of {' '.join(MEASURES)}")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=CONTENDERS,
        metavar="NAME",
        help=f"some of {' '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help="unrolled steps of a segment (default 20)")
    parser.add_argument(
        "--rounds", type=_positive, metavar="N", help="alternating rounds, of which the median counts (default 7)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured, every sample included; -: to stdout")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured (%(default)s)")
    return parser


def _options(arguments: argparse.Namespace, device: torch.device, say: Any) -> Options:
    quick = arguments.quick
    sizes = _QUICK if quick else _FULL
    default_threads = (1,) if quick or device.type != "cpu" else tuple(sorted({1, torch.get_num_threads()}))
    segment_sizes = arguments.segment_sizes or arguments.sizes or sizes["segment_sizes"]
    if not arguments.segment_sizes and arguments.sizes:
        segment_sizes = [n for n in arguments.sizes if n <= 10**6] or [10**6]
    return Options(
        sizes=tuple(arguments.sizes or sizes["sizes"]),
        segment_sizes=tuple(segment_sizes),
        threads=tuple(arguments.threads or default_threads),
        isas=tuple(arguments.isa or default_isas(device)) if device.type == "cpu" else default_isas(device),
        contenders=tuple(arguments.contenders),
        measures=tuple(arguments.only or MEASURES),
        device=device,
        steps=arguments.steps or (5 if quick else 20),
        horizon=10 if quick else 100,
        rounds=arguments.rounds or (3 if quick else 7),
        min_seconds=0.01 if quick else 0.3,
        max_seconds=20.0 if quick else 120.0,
        memory_size=200_000 if quick else 10**6,
        plain_memory_size=20_000 if quick else 100_000,
        copy_megabytes=64 if quick else 256,
        say=say,
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    machine: dict[str, Any] = {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "instruction sets": " ".join(_C.isa_available()),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}, {_C.build_info()['compiler']}",
    }
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
    machine["load average at the start"] = _load()
    return machine


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _size(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"expected a positive integer such as 1000 or 1e6, got {text!r}")
    return int(value)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value
