"""How the meta-gradient of an episode is found: one file per way, see :class:`Estimator`."""

from __future__ import annotations

from .autograd import AutogradBPTT
from .base import Estimator, MetaLoss, MetaStep, SegmentTrace, weighted_sum
from .choice import NAMES, choose, make, saved
from .evolution import Evolution
from .fused import FusedBPTT
from .pes import PES
from .synthetic import SyntheticGradients

__all__ = [
    "NAMES",
    "PES",
    "AutogradBPTT",
    "Estimator",
    "Evolution",
    "FusedBPTT",
    "MetaLoss",
    "MetaStep",
    "SegmentTrace",
    "SyntheticGradients",
    "choose",
    "make",
    "saved",
    "weighted_sum",
]
