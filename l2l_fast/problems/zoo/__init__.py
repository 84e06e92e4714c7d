"""Many kinds of small optimizees: some to train general-purpose learned optimizers on, others to validate them."""

from .families import TRAINING, VALIDATION
from .problem import Zoo
from .task import ZooTask

__all__ = ["TRAINING", "VALIDATION", "Zoo", "ZooTask"]
