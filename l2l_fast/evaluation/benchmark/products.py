"""Builds and loads bench/products.cpp: the kernels' matrix products without the activations.

Only in a source tree with g++; no benchmark code is in the package's own extension.
"""

from __future__ import annotations

import ast
import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .timing import Sampler

_ROOT = Path(__file__).resolve().parents[3]
_SOURCE = _ROOT / "bench" / "products.cpp"

# Function in bench/products.cpp, and what it is called in the table.
PRODUCTS = {
    "step_products": "products: step",
    "segment_forward_products": "products: segment forward",
    "segment_input_gradients": "products: input gradients",
    "segment_weight_gradients": "products: weight gradients",
}


def unavailable() -> str | None:
    """Why the products cannot be timed here, or None if they can."""
    if not _SOURCE.is_file():
        return f"the products alone need the source tree ({_SOURCE} does not exist)"
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return f"the products alone are timed on x86 and ARM, not on {platform.machine()}"
    if shutil.which(_compiler()) is None:
        return f"the products alone need a compiler ({_compiler()} not found)"
    return None


def load(isa: str) -> ctypes.CDLL:
    """Compile (a few seconds) and load the library of one instruction set.

    Raises:
        RuntimeError: the compiler failed.
    """
    isa = isa.removesuffix("bf16")  # whose products of floats are those of avx512
    kernels = _ROOT / "csrc" / "cpu" / "isa" / f"{isa}.cpp"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"products_{isa}.so"
        command = [_compiler(), *_package_flags(), "-w", "-shared", "-fPIC", "-fvisibility=default"]
        command += [f'-DL2L_KERNELS="{kernels}"', str(_SOURCE), "-o", str(library)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr[-3000:]}")
        loaded = ctypes.CDLL(str(library))  # stays mapped after the file is gone
    for name in PRODUCTS:
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
    return loaded


def sampler(library: ctypes.CDLL, name: str, threads: int, seconds: float) -> Sampler:
    """Samples multiply-adds per second of one product on ``threads`` threads (ctypes releases the GIL)."""
    function = getattr(library, name)
    pool = ThreadPoolExecutor(threads)
    return lambda: sum(pool.map(function, [seconds] * threads))


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _package_flags() -> list[str]:
    # The flags the package itself is compiled with; setup.py cannot be imported, it builds.
    for node in ast.parse((_ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "CXX_FLAGS":
            return list(ast.literal_eval(node.value))
    raise RuntimeError("setup.py: no CXX_FLAGS found")
