"""How the meta-gradient of an episode is found: one file per way, see :class:`Estimator`."""

from __future__ import annotations

from .autograd import AutogradBPTT
from .base import Estimator, MetaLoss, MetaStep, SegmentTrace, weighted_sum
from .choice import choose
from .fused import FusedBPTT

__all__ = [
    "AutogradBPTT",
    "Estimator",
    "FusedBPTT",
    "MetaLoss",
    "MetaStep",
    "SegmentTrace",
    "choose",
    "weighted_sum",
]
