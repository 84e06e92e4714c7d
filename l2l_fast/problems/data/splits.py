"""What every image set is once it is loaded: images and labels, in splits that share nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images uint8 ``[n, 28, 28]`` or ``[n, 3, 32, 32]`` and labels int64 ``[n]``; shared by every task, never written
    to."""

    images: torch.Tensor
    labels: torch.Tensor
    _copies: dict[torch.device, ImageSplit] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.images.shape[0]

    def __deepcopy__(self, memo: dict[int, object]) -> ImageSplit:
        # A copied task goes on sharing the images.
        return self

    def to(self, device: torch.device | str | None) -> ImageSplit:
        """The same split on ``device``; copied there once per process."""
        target = self.images.device if device is None else torch.device(device)
        if target == self.images.device:
            return self
        if target not in self._copies:
            self._copies[target] = ImageSplit(self.images.to(target), self.labels.to(target))
        return self._copies[target]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A loaded data set: ``name`` says which ("mnist-60k", "cifar-10", ...), ``folder`` where it lay."""

    name: str
    folder: Path
    splits: dict[str, ImageSplit]

    def split(self, split: str) -> ImageSplit:
        """The images of ``split``: "train", "validation" or "test".

        Raises:
            ValueError: there is no such split.
        """
        if split not in self.splits:
            raise ValueError(f"split must be one of {tuple(self.splits)}, got {split!r}")
        return self.splits[split]


def cut(name: str, folder: Path, train: Pair, test: Pair) -> ImageData:
    """A published pair of sets, images and labels each, as three splits: every sixth pair of neighbours among the
    training images is held out for validation."""
    held_out = np.arange(len(train[1])) // 2 % 6 == 5
    parts = {"train": ~held_out, "validation": held_out}
    splits = {split: pick(train, mask) for split, mask in parts.items()}
    return ImageData(name, folder, {**splits, "test": pick(test, np.full(len(test[1]), True))})


def pick(pair: Pair, mask: np.ndarray) -> ImageSplit:
    """The images and labels where ``mask`` is true, copied."""
    images, labels = pair
    return ImageSplit(torch.from_numpy(images[mask]), torch.from_numpy(labels[mask].astype(np.int64)))


def draw(
    images: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A minibatch of ``count`` images, drawn with replacement by a CPU generator: pixels in [0, 1] and their labels."""
    indices = torch.randint(len(labels), (count,), generator=generator, device="cpu").to(labels.device)
    # Gathering rows of bytes and converting them is faster than gathering floats, in a quarter of the memory.
    return images.index_select(0, indices).to(dtype).mul_(1 / 255), labels.index_select(0, indices)
