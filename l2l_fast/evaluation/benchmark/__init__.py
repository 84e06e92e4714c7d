"""``python -m l2l_fast bench``: the fused kernels beside eager PyTorch and torch.compile, in one run and one table.

bench/README.md explains the columns. Nothing else in the package imports this one.
"""

from __future__ import annotations

from .command import main

__all__ = ["main"]
