"""The command ``info``: what this installation is made of."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import _C
from ..problems.data import EMBEDDED, ENVIRONMENT_VARIABLE, FULL, load_mnist
from .console import say
from .options import Commands, add_command

_PACKAGES = ("l2l_fast", "torch", "numpy", "safetensors", "tqdm", "matplotlib", "tensorboard")


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "print versions, instruction sets, threads and data sets"
    parser = add_command(commands, "info", _run, text, "", "--json")
    parser.add_argument("--json", action="store_true", help="as JSON")


def information() -> dict[str, Any]:
    """Versions, instruction sets, threads and data sets of this installation; JSON-able."""
    facts: dict[str, Any] = {name: _version(name) for name in _PACKAGES}
    facts["python"] = f"{platform.python_version()} ({sys.executable})"
    facts["machine"] = platform.platform()
    facts["instruction set"] = _C.isa()
    facts["available instruction sets"] = list(_C.isa_available())
    facts["L2L_FAST_ISA"] = os.environ.get("L2L_FAST_ISA", "not set")
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    facts["CUDA"] = torch.version.cuda or "not in this torch"
    facts["build"] = ", ".join(f"{key} {value}" for key, value in _C.build_info().items())
    for name in (EMBEDDED, FULL):
        try:
            data = load_mnist(name)
            facts[name] = f"{sum(len(split) for split in data.splits.values()):,} images in {data.folder}"
        except (OSError, ValueError) as error:
            facts[name] = f"not found: {str(error).splitlines()[0]}"
    facts[ENVIRONMENT_VARIABLE] = os.environ.get(ENVIRONMENT_VARIABLE, "not set")
    return facts


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _run(arguments: argparse.Namespace) -> int:
    facts = information()
    if arguments.json:
        say(json.dumps(facts, indent=2))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        say(f"{name.ljust(width)}  {text}")
    return 0
