"""Data sets: the embedded MNIST images and the loaders."""

from l2l_fast.data.idx import read_idx
from l2l_fast.data.mnist import (
    EMBEDDED,
    ENVIRONMENT_VARIABLE,
    FULL,
    ImageSplit,
    MNISTData,
    load_mnist,
)

__all__ = [
    "EMBEDDED",
    "ENVIRONMENT_VARIABLE",
    "FULL",
    "ImageSplit",
    "MNISTData",
    "load_mnist",
    "read_idx",
]
