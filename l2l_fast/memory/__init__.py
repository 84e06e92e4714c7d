"""An external memory for the learned optimizer: NTM-BFGS (Andrychowicz et al. 2016, appendix D)."""

from .network import NTMBFGS
from .store import DenseMemory, LowRankMemory, Memory

__all__ = ["NTMBFGS", "DenseMemory", "LowRankMemory", "Memory"]
