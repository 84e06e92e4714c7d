"""Many kinds of small optimizees: some to train general-purpose learned optimizers on, others to validate them."""

from l2l_fast.problems.zoo.families import TRAINING, VALIDATION
from l2l_fast.problems.zoo.problem import Zoo
from l2l_fast.problems.zoo.task import ZooTask

__all__ = ["TRAINING", "VALIDATION", "Zoo", "ZooTask"]
