"""A convolutional network on images (Andrychowicz et al. 2016, section 3.3), for two networks: "conv" and "fc"."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.checks import non_negative, one_of, positive_int, widths
from .base import FLOAT32, Problem, Task
from .data.images import load_cifar10, load_fashion_mnist
from .data.mnist import load_mnist
from .data.splits import ImageData, ImageSplit, draw

_DATA: dict[str, Callable[[Any], ImageData]] = {
    "fashion-mnist": load_fashion_mnist,
    "cifar-10": load_cifar10,
    "mnist": load_mnist,
}
DATA_SETS = tuple(_DATA)
_CLASSES = 10
_KERNEL = 5
_EPS = 1e-3  # of the batch normalisation in the authors' library


class ConvTask(Task):
    """Three blocks (convolution 5x5, batch normalisation, ReLU, 2x2 max-pooling), a hidden layer, a linear read-out.

    Batch normalisation uses the minibatch's own statistics, always, and has an offset but no gain, as in the authors'
    code. Parameters: ``conv{k}`` [out, in, 5, 5], ``conv{k}_bias``, ``conv{k}_offset`` [out], ``hidden`` [units, in],
    ``hidden_bias``, ``hidden_offset`` [units], ``out`` [10, units], ``out_bias`` [10].
    """

    hidden: torch.Tensor
    hidden_bias: torch.Tensor
    hidden_offset: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor

    def __init__(
        self,
        generator: torch.Generator,
        images: ImageSplit,
        channels: tuple[int, ...],
        hidden: int,
        batch_size: int,
        init_std: float,
        device: torch.device,
    ) -> None:
        super().__init__(generator)
        split = images.to(device)
        self._images, self._labels = split.images, split.labels
        self._batch_size = batch_size
        self._blocks = len(channels)
        shape = images.images.shape[1:]
        depth, side = (1 if len(shape) == 2 else shape[0]), shape[-1]
        shapes: dict[str, tuple[int, ...]] = {}
        offsets = []
        for k, width in enumerate(channels):
            shapes[f"conv{k}"] = (width, depth, _KERNEL, _KERNEL)
            shapes[f"conv{k}_bias"] = (width,)
            offsets.append((f"conv{k}_offset", width))
            depth, side = width, (side + 1) // 2
        shapes.update({"hidden": (hidden, depth * side * side), "hidden_bias": (hidden,)})
        offsets.append(("hidden_offset", hidden))
        shapes.update({"out": (_CLASSES, hidden), "out_bias": (_CLASSES,)})
        for name, size in shapes.items():
            value = torch.randn(size, generator=generator, **FLOAT32) * init_std
            self.register_parameter(name, nn.Parameter(value.to(device)))
        for name, width in offsets:
            self.register_parameter(name, nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device)))

    def parameter_groups(self) -> dict[str, list[str]]:
        """ "conv": the kernels; "fc": everything else, biases and offsets included (as in the authors' code)."""
        kernels = [f"conv{k}" for k in range(self._blocks)]
        return {"conv": kernels, "fc": [name for name, _ in self.named_parameters() if name not in kernels]}

    def minibatch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next minibatch: pixels in [0, 1] ``[batch, channels, side, side]`` and labels int64 ``[batch]``."""
        pixels, labels = draw(self._images, self._labels, self._batch_size, self.generator, self.out.dtype)
        return (pixels.unsqueeze(1) if pixels.dim() == 3 else pixels), labels

    def forward(self) -> torch.Tensor:
        """Mean cross-entropy (in nats) over the next minibatch."""
        activity, labels = self.minibatch()
        for k in range(self._blocks):
            name = f"conv{k}"
            kernel = getattr(self, name).to(memory_format=torch.channels_last)
            activity = F.conv2d(activity, kernel, getattr(self, f"{name}_bias"), padding=_KERNEL // 2)
            # Pooling before the ReLU gives the same values, and the ReLU a quarter of the work.
            activity = F.max_pool2d(_normalised(activity, getattr(self, f"{name}_offset")), 2, ceil_mode=True).relu()
        activity = F.linear(activity.flatten(1), self.hidden, self.hidden_bias)
        activity = _normalised(activity, self.hidden_offset).relu()
        return F.cross_entropy(F.linear(activity, self.out, self.out_bias), labels)


def _normalised(activity: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(activity, None, None, bias=offset, training=True, eps=_EPS)


class ConvNet(Problem):
    """Cross-entropy of a small convolutional network on minibatches of images, drawn with replacement.

    Args:
        data: "fashion-mnist", "cifar-10" or "mnist".
        folder: where that data set lies; None: its default place.
        channels: filters of the convolutional blocks (the paper's network has three; 16 each in the authors' code).
        hidden: units of the fully connected layer.
        batch_size: images in a minibatch.
        init_std: weights and biases ~ N(0, init_std^2); offsets start at zero.

    Raises:
        ValueError, TypeError: an option is out of its range, or a data file is damaged.
        FileNotFoundError: a data file is missing.
    """

    name = "conv"

    def __init__(
        self,
        data: str = "fashion-mnist",
        folder: str | os.PathLike[str] | None = None,
        channels: tuple[int, ...] = (16, 16, 16),
        hidden: int = 32,
        batch_size: int = 128,
        init_std: float = 0.01,
    ) -> None:
        data = one_of("data", data, _DATA)
        self.channels = widths("channels", channels, "filters")
        if not self.channels:
            raise ValueError("channels must name at least one block, got none")
        self.hidden = positive_int("hidden", hidden)
        self.batch_size = positive_int("batch_size", batch_size)
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2 for batch normalisation, got 1")
        self.init_std = non_negative("init_std", init_std)
        self.data: ImageData = _DATA[data](folder)
        self._kind = data

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> ConvTask:
        images = self.data.split(split)
        return ConvTask(generator, images, self.channels, self.hidden, self.batch_size, self.init_std, device)

    def config(self) -> dict[str, Any]:
        """As ``Problem.config``; the folder of the data is left out."""
        return {
            "name": self.name,
            "data": self._kind,
            "channels": list(self.channels),
            "hidden": self.hidden,
            "batch_size": self.batch_size,
            "init_std": self.init_std,
        }
