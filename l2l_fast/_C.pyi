"""The compiled extension (csrc/module.cpp); importing it registers the operators of ``torch.ops.l2l_fast``."""

from typing import Any

version: str
TILE: int

def isa() -> str:
    """The instruction set in use."""

def isa_available() -> list[str]:
    """Instruction sets this build and machine have, slowest first."""

def set_isa(name: str) -> None:
    """Switch the instruction set; ValueError if not available."""

def fma_rate(seconds: float = 0.2) -> float:
    """Multiply-adds per second of the calling thread."""

def build_info() -> dict[str, Any]:
    """Versions this extension was built with."""
