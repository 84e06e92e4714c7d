"""Meta-training: how phi learns to optimize (Andrychowicz et al. 2016, sections 2 and 3)."""

from __future__ import annotations

from ..networks.record import record_of
from .checkpoint import is_checkpoint, load_best
from .estimators import PES, Evolution, SegmentTrace, SyntheticGradients
from .evaluation import Summary, evaluate, summarize
from .mismatch import ProtocolWarning
from .protocol import Protocol
from .tensorboard import TensorBoardLog
from .trainer import MetaTrainer

__all__ = [
    "PES",
    "Evolution",
    "MetaTrainer",
    "Protocol",
    "ProtocolWarning",
    "SegmentTrace",
    "Summary",
    "SyntheticGradients",
    "TensorBoardLog",
    "evaluate",
    "is_checkpoint",
    "load_best",
    "record_of",
    "summarize",
]
