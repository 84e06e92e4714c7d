"""The command ``bench``: the kernels beside eager and compiled PyTorch (:mod:`l2l_fast.evaluation.benchmark`)."""

from __future__ import annotations

import argparse

from .options import Commands, add_command


def add_to(commands: Commands) -> None:
    """Add the command to the parser, where it is only named: its options are the benchmark's own."""
    text = "measure the kernels side by side with eager and compiled PyTorch"
    add_command(commands, "bench", _run, text, "--quick", "--sizes 1e5 --only step --json step.json")


def run(argv: list[str]) -> int:
    """Hand its arguments to the benchmark; returns the exit status."""
    from ..evaluation import benchmark

    return benchmark.main(argv) or 0


def _run(arguments: argparse.Namespace) -> int:
    return run([])
