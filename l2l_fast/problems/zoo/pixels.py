"""Small pictures of the image sets: 14 x 14 (means of 2 x 2 pixels) and 8 x 8 (padded to 32 x 32, means of 4 x 4)."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.checks import one_of
from ..data import EMBEDDED, ENVIRONMENT_VARIABLE, FULL, ImageData, load_fashion_mnist, load_mnist

FASHION = "fashion-mnist"
SIDES = (8, 14)
CLASSES = 10

_made: dict[tuple[str, str, int], Small] = {}
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Small:
    """Pooled pictures of one split, uint8 ``[n, side * side]``, their labels int64 ``[n]``, and per pixel the mean and
    the standard deviation over the split ``[side * side]``, in units of 255. One per process, never written to; copies
    are the same object and pickles hold its name alone."""

    data: str
    split: str
    side: int
    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Small:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return small, (self.data, self.split, self.side)


def small(data: str, split: str, side: int) -> Small:
    """The pooled pictures of the image set of that name."""
    with _lock:
        found = _made.get((data, split, side))
    if found is not None:
        return found
    images = load(data).split(split)
    parts = []
    for chunk in images.images.split(4096):
        pictures = chunk.to(torch.float32).unsqueeze(1)
        pooled = F.avg_pool2d(pictures, 2) if side == 14 else F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2)), 4)
        parts.append(pooled.round_().to(torch.uint8).flatten(1))
    pixels = torch.cat(parts)
    scaled = pixels.to(torch.float32).div_(255)
    made = Small(data, split, side, pixels, images.labels, scaled.mean(0), scaled.std(0))
    with _lock:
        return _made.setdefault((data, split, side), made)


def load(name: str) -> ImageData:
    """The image set "mnist-10k-embedded", "mnist-60k" or "fashion-mnist".

    Raises:
        ValueError: there is no set of that name.
        FileNotFoundError: its files are missing.
    """
    if one_of("data", name, (EMBEDDED, FULL, FASHION)) != FASHION:
        return load_mnist(name)
    folder = _fashion_beside_mnist()
    return load_fashion_mnist(folder)


def present() -> tuple[str, ...]:
    """The image sets that are there: MNIST, in full if ``L2L_FAST_DATA`` is set, and Fashion-MNIST where it is
    installed or lies in the subfolder "fashion-mnist" of ``L2L_FAST_DATA``."""
    names = [load_mnist(None).name]
    try:
        names.append(load(FASHION).name)
    except FileNotFoundError:
        pass
    return tuple(names)


def _fashion_beside_mnist() -> Path | None:
    named = os.environ.get(ENVIRONMENT_VARIABLE, "")
    folder = Path(named).expanduser() / FASHION
    return folder if named and folder.is_dir() else None


@dataclass(frozen=True)
class Images:
    """The image sets that families may choose from, by name."""

    names: tuple[str, ...]

    def small(self, name: str, split: str, side: int) -> Small:
        """See :func:`small`."""
        return small(name, split, side)
