"""Runs the project's CUDA device code on the CPU, to test it where there is no GPU. See README.md."""

from __future__ import annotations

from .build import SANITIZERS, compile_kernels, environment, run, sanitized_python, sanitizer_available
from .library import DeviceArray, DeviceError, Library

__all__ = [
    "SANITIZERS",
    "DeviceArray",
    "DeviceError",
    "Library",
    "compile_kernels",
    "environment",
    "run",
    "sanitized_python",
    "sanitizer_available",
]
