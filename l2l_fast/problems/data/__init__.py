"""Data sets: the embedded MNIST images and the loaders."""

from .idx import read_idx
from .images import load_cifar10, load_fashion_mnist, read_cifar10_file
from .mnist import EMBEDDED, ENVIRONMENT_VARIABLE, FULL, load_mnist
from .splits import ImageData, ImageSplit

MNISTData = ImageData  # its name before 0.2

__all__ = [
    "EMBEDDED",
    "ENVIRONMENT_VARIABLE",
    "FULL",
    "ImageData",
    "ImageSplit",
    "MNISTData",
    "load_cifar10",
    "load_fashion_mnist",
    "load_mnist",
    "read_cifar10_file",
    "read_idx",
]
