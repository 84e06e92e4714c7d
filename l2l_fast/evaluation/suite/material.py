"""What the suite's networks are trained on: digits, fashion pictures, texts, and how minibatches of them are drawn.

Without a folder, pictures are the 10,000 digits of the package, all three splits of them: what is measured is how fast
a training loss falls. Networks would know so few by heart within 10,000 steps, so each is there nine times, moved by
-2, 0 or 2 pixels down and to the right, the usual augmentation. Full sets are taken as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.checks import one_of
from ...problems.data import EMBEDDED, ENVIRONMENT_VARIABLE, ImageData, load_fashion_mnist, load_mnist
from ...problems.data.images import FASHION_VARIABLE
from ...problems.data.text import load_text

Batch = tuple[Tensor, ...]
KINDS = ("digits", "fashion", "english", "middle-english", "none")
TEXTS = {"english": "asv-genesis-luke", "middle-english": "wycliffe-john"}
_FASHION_FOLDERS = ("fashion-mnist", "fashion", "FashionMNIST/raw")
_SHIFTS = (-2, 0, 2)
_CHUNK = 64  # minibatches whose rows are drawn at once: as few calls as one, and the same rows for runs of any length


@dataclass(frozen=True)
class Folder:
    """Where data sets lie: ``digits`` and ``fashion`` as the loaders take them, None: the digits in the package."""

    digits: Path | None = None
    fashion: Path | None = None

    @classmethod
    def named(cls, data: str | os.PathLike[str] | None = None) -> Folder:
        """The data sets of a folder: MNIST's files in it or in ``mnist``, Fashion-MNIST's in ``fashion-mnist``,
        ``fashion``, ``FashionMNIST/raw`` or where L2L_FAST_FASHION_MNIST says.

        Args:
            data: the folder; "mnist-10k-embedded": the digits in the package; None: what L2L_FAST_DATA names, or these.

        Raises:
            FileNotFoundError, ValueError: MNIST is incomplete or damaged there.
            TypeError: no path.
        """
        data = os.environ.get(ENVIRONMENT_VARIABLE) or None if data is None else data
        if data is None or data == EMBEDDED:
            return cls()
        found = load_mnist(data).folder
        places = [found / below for below in _FASHION_FOLDERS]
        if os.environ.get(FASHION_VARIABLE):
            places.insert(0, Path(os.environ[FASHION_VARIABLE]))
        there = [place for place in places if place.is_dir()]
        return cls(found, there[0] if there else None)

    def images(self, kind: str) -> ImageData:
        """The set that serves as "digits" or "fashion": without the latter, digits do."""
        if kind == "fashion" and self.fashion is not None:
            return load_fashion_mnist(self.fashion)
        return load_mnist(EMBEDDED if self.digits is None else self.digits)

    def name(self, kind: str) -> str:
        """The data set that serves as ``kind``, one of KINDS, as results name it."""
        one_of("kind", kind, KINDS)
        if kind in TEXTS:
            return TEXTS[kind]
        return "none" if kind == "none" else self.images(kind).name


@cache
def pictures(folder: Folder, kind: str, side: int) -> tuple[Tensor, Tensor]:
    """All pictures uint8 ``[n, side * side]``, side 28 or 14 (means of 2 x 2 pixels), and labels int64 ``[n]``."""
    data = folder.images(kind)
    images = torch.cat([split.images for split in data.splits.values()])
    labels = torch.cat([split.labels for split in data.splits.values()])
    shifts = [(0, 0)] if data.name != EMBEDDED else [(down, right) for down in _SHIFTS for right in _SHIFTS]
    edge = max(_SHIFTS)
    padded = F.pad(images, (edge,) * 4)
    parts = []
    for down, right in shifts:
        part = padded[:, edge - down : edge - down + 28, edge - right : edge - right + 28]
        if side == 14:
            part = part.reshape(-1, 14, 2, 14, 2).float().mean((2, 4)).round_().to(torch.uint8)
        parts.append(part.reshape(len(part), -1))
    return torch.cat(parts), labels.repeat(len(shifts))


@cache
def symbols(kind: str) -> Tensor:
    """The text as int64 ``[blocks, 2048]``; nothing is read across two blocks."""
    return torch.cat(list(load_text(TEXTS[kind]).splits.values()))


def rows(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Minibatches of row numbers below ``count``, int64 ``[batch]``, drawn with replacement, without an end."""
    while True:
        yield from torch.randint(count, (_CHUNK, batch), generator=generator, device="cpu")


def picture_batches(
    folder: Folder, kind: str, side: int, batch: int, shape: tuple[int, ...], mean: float = 0.0, scale: float = 1.0
) -> Callable[[torch.Generator], Iterator[Batch]]:
    """Pictures float32 ``[batch, *shape]``, (x - mean) / scale of pixels x in [0, 1], and labels int64 ``[batch]``."""

    def draw(generator: torch.Generator) -> Iterator[Batch]:
        pixels, labels = pictures(folder, kind, side)
        factor, shift = 1 / (255 * scale), -mean / scale
        for chosen in rows(len(labels), batch, generator):
            x = pixels.index_select(0, chosen).to(torch.float32).mul_(factor).add_(shift)
            yield x.view(batch, *shape), labels.index_select(0, chosen)

    return draw


def text_batches(kind: str, batch: int, length: int) -> Callable[[torch.Generator], Iterator[Batch]]:
    """Stretches of a text: symbols int64 ``[batch, length]`` and those that follow each, of the same shape."""

    def draw(generator: torch.Generator) -> Iterator[Batch]:
        text = symbols(kind)
        starts_in_block = text.shape[1] - length
        places = torch.arange(length + 1, device="cpu")
        for chosen in rows(text.shape[0] * starts_in_block, batch, generator):
            starts = chosen // starts_in_block * text.shape[1] + chosen % starts_in_block
            window = text.view(-1)[starts.unsqueeze(1) + places]
            yield window[:, :-1], window[:, 1:]

    return draw
