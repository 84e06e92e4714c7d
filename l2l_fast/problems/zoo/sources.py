"""Minibatches: rows of a table, pictures, windows of a text. A table is drawn once per task and shared by its problems;
the rows of a minibatch are drawn with replacement, anew for every problem and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.text import Text
from .draws import Draw
from .optimizee import Batch
from .pixels import Small


@dataclass(frozen=True)
class Rows:
    """The same rows of each of ``columns`` ``[rows, ...]``: a batch of ``[K, batch, ...]``.

    Labels, the last column, are replaced by random ones with probability ``noise`` where there are ``classes``.
    """

    columns: tuple[Tensor, ...]
    batch: int
    classes: int = 0
    noise: float = 0.0

    def draw(self, problems: int, draw: Draw) -> Batch:
        rows = draw.below(len(self.columns[0]), problems * self.batch)
        found = [column.index_select(0, rows).unflatten(0, (problems, self.batch)) for column in self.columns]
        if self.noise:
            found[-1] = noisy(found[-1], self.classes, self.noise, draw)
        return tuple(found)


@dataclass(frozen=True)
class Pictures:
    """Pictures ``[K, batch, pixels]`` and labels ``[K, batch]``.

    Pixels are x * scale + shift, x in [0, 1] and scale and shift ``[pixels]``.
    """

    data: Small
    batch: int
    classes: int
    scale: Tensor
    shift: Tensor
    noise: float = 0.0

    def draw(self, problems: int, draw: Draw) -> Batch:
        rows = draw.below(len(self.data.labels), problems * self.batch)
        # Bytes are gathered, a quarter of the memory that floats would be.
        pixels = self.data.pixels.index_select(0, rows).to(torch.float32).mul_(self.scale / 255).add_(self.shift)
        labels = self.data.labels.index_select(0, rows).view(problems, self.batch)
        if self.noise:
            labels = noisy(labels, self.classes, self.noise, draw)
        return pixels.view(problems, self.batch, -1), labels


def standardised(kind: str, data: Small) -> tuple[Tensor, Tensor]:
    """Scale and shift of pixels that stay in [0, 1] ("unit"), are in [-1, 1] ("symmetric"), or have nearly zero mean
    and unit variance, pixel by pixel ("standard"); black borders stay finite."""
    if kind == "standard":
        scale = 1 / (data.std + 0.1)
        return scale, -data.mean * scale
    scale = torch.full_like(data.mean, 2.0 if kind == "symmetric" else 1.0)
    return scale, torch.full_like(data.mean, -1.0 if kind == "symmetric" else 0.0)


@dataclass(frozen=True)
class Windows:
    """Stretches of a text, int64 ``[K, batch, length + 1]``, each within a block."""

    text: Text
    split: str
    batch: int
    length: int

    def draw(self, problems: int, draw: Draw) -> Batch:
        blocks = self.text.split(self.split)
        count, size = blocks.shape
        first = draw.below(count * (size - self.length), problems * self.batch, 1)
        starts = first // (size - self.length) * size + first % (size - self.length)
        return (blocks.view(-1)[starts + torch.arange(self.length + 1, device="cpu")].view(problems, self.batch, -1),)


def noisy(labels: Tensor, classes: int, noise: float, draw: Draw) -> Tensor:
    """Labels of which that fraction, drawn anew, is replaced by random ones."""
    other = draw.below(classes, *labels.shape)
    return torch.where(draw.rand(*labels.shape) < noise, other, labels)
