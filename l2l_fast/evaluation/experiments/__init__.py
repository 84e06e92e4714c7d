"""The paper's experiments, one configuration file each, run by one command: ``python -m l2l_fast experiment NAME``."""

from __future__ import annotations

from .config import Candidate, Experiment, Setting, Stage, available, load
from .evidence import measure
from .running import Outcome, evaluate_experiment, run, train

__all__ = [
    "Candidate",
    "Experiment",
    "Outcome",
    "Setting",
    "Stage",
    "available",
    "evaluate_experiment",
    "load",
    "measure",
    "run",
    "train",
]
