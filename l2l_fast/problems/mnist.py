"""A small multilayer perceptron on MNIST (Andrychowicz et al. 2016, section 3.2)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.checks import flag, non_negative, one_of, positive_int, widths
from .base import FLOAT32, Problem, Task
from .data import ImageData, ImageSplit, load_mnist
from .data.splits import draw

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
}
_PIXELS = 28 * 28
_CLASSES = 10
_MEAN, _STD = 0.1307, 0.3081  # of the pixels of MNIST's training images, as everybody takes them
_DEFAULT = "default"


class MNISTTask(Task):
    """An MLP and its stream of minibatches.

    Parameters ``weight_l{k}`` float32 ``[out, in]`` and ``bias_l{k}`` ``[out]`` of layer k, in this order.
    """

    bias_l0: torch.Tensor

    def __init__(
        self,
        generator: torch.Generator,
        images: ImageSplit,
        widths: tuple[int, ...],
        activation: Callable[[torch.Tensor], torch.Tensor],
        batch_size: int,
        init_std: float | None,
        device: torch.device,
        held_out: ImageSplit | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__(generator)
        self._held_out = None if held_out is None else held_out.to(device)
        split = images.to(device)
        self._pixels = split.images.view(-1, _PIXELS)
        self._labels = split.labels
        self._activation = activation
        self._batch_size = batch_size
        self._standardize = standardize
        self._names = tuple((f"weight_l{k}", f"bias_l{k}") for k in range(len(widths) - 1))
        for (weight, bias), (fan_in, fan_out) in zip(self._names, pairwise(widths), strict=True):
            for name, shape in ((weight, (fan_out, fan_in)), (bias, (fan_out,))):
                if init_std is None:
                    value = (2.0 * torch.rand(shape, generator=generator, **FLOAT32) - 1.0) / math.sqrt(fan_in)
                else:
                    value = torch.randn(shape, generator=generator, **FLOAT32) * init_std
                self.register_parameter(name, nn.Parameter(value.to(device)))

    def minibatch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next minibatch: pixels in [0, 1] ``[batch, 784]`` in theta's dtype, and labels int64 ``[batch]``; not
        standardized yet."""
        return draw(self._pixels, self._labels, self._batch_size, self.generator, self.bias_l0.dtype)

    def forward(self) -> torch.Tensor:
        """Mean cross-entropy (in nats) over the next minibatch."""
        activity, labels = self.minibatch()
        return F.cross_entropy(self._logits(activity), labels)

    @torch.no_grad()
    def held_out_error(self) -> float | None:
        """On all test images, for a task with training images."""
        if self._held_out is None:
            return None
        pixels = self._held_out.images.view(-1, _PIXELS).to(self.bias_l0.dtype).mul_(1 / 255)
        return (self._logits(pixels).argmax(1) != self._held_out.labels).double().mean().item()

    def _logits(self, activity: torch.Tensor) -> torch.Tensor:
        if self._standardize:
            activity = (activity - _MEAN) / _STD
        for k, (weight, bias) in enumerate(self._names):
            if k:
                activity = self._activation(activity)
            activity = F.linear(activity, getattr(self, weight), getattr(self, bias))
        return activity


class MNIST(Problem):
    """Cross-entropy of a 784-``hidden``-10 perceptron on minibatches of MNIST, drawn with replacement.

    Tasks of one split differ in theta_0 and in the minibatches, as in the paper; a minibatch is drawn anew at every
    evaluation. The splits have disjoint images, see ``l2l_fast.data.mnist``.

    Args:
        hidden: widths of the hidden layers; an empty tuple is logistic regression.
        activation: "sigmoid" (the paper's), "relu", "tanh", "elu", "gelu", "silu", "softplus" or "leaky_relu".
        batch_size: images in a minibatch.
        data: None, a folder or the name of a data set, see ``l2l_fast.data.load_mnist``.
        init_std: weights and biases ~ N(0, init_std^2); the official code's 0.01 by default. A pair (low, high): every
            task draws its own, log-uniformly, to train for shorter and longer first plateaus. "default": as
            ``nn.Linear`` does, uniform within 1 / sqrt(fan_in), so that layers differ in scale.
        standardize: pixels with mean 0 and standard deviation 1 in place of [0, 1].

    Raises:
        ValueError, TypeError: an option is out of its range, or a data file is damaged.
        FileNotFoundError: a data file is missing.
    """

    name = "mnist"

    def __init__(
        self,
        hidden: Iterable[int] = (20,),
        activation: str = "sigmoid",
        batch_size: int = 128,
        data: str | os.PathLike[str] | None = None,
        init_std: float | tuple[float, float] | str = 0.01,
        standardize: bool = False,
    ) -> None:
        self.hidden = widths("hidden", hidden, "layer widths")
        self.activation = one_of("activation", activation, _ACTIVATIONS)
        self.batch_size = positive_int("batch_size", batch_size)
        self.init_std = _std("init_std", init_std)
        self.standardize = flag("standardize", standardize)
        self.data: ImageData = load_mnist(data)

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> MNISTTask:
        return MNISTTask(
            generator,
            self.data.split(split),
            (_PIXELS, *self.hidden, _CLASSES),
            _ACTIVATIONS[self.activation],
            self.batch_size,
            self._scale(generator),
            device,
            self.data.split("test") if split == "train" else None,
            self.standardize,
        )

    def config(self) -> dict[str, Any]:
        """As ``Problem.config``; ``data`` is the name of the data set used, not its folder."""
        # Not among the options of files that older releases wrote.
        later = {"standardize": True} if self.standardize else {}
        return {
            "name": self.name,
            "hidden": list(self.hidden),
            "activation": self.activation,
            "batch_size": self.batch_size,
            "data": self.data.name,
            "init_std": list(self.init_std) if isinstance(self.init_std, tuple) else self.init_std,
            **later,
        }

    def _scale(self, generator: torch.Generator) -> float | None:
        if isinstance(self.init_std, tuple):
            return _draw(*self.init_std, generator)
        return None if isinstance(self.init_std, str) else self.init_std


def _std(name: str, value: float | tuple[float, float] | str) -> float | tuple[float, float] | str:
    if isinstance(value, str):
        return one_of(name, value, (_DEFAULT,))
    if not isinstance(value, (tuple, list)):
        return non_negative(name, value)
    bounds = [non_negative(name, bound) for bound in value]
    if len(bounds) != 2 or not 0.0 < bounds[0] < bounds[1]:
        raise ValueError(f"{name} must be a number or a rising pair of positive numbers, got {value!r}")
    return bounds[0], bounds[1]


def _draw(low: float, high: float, generator: torch.Generator) -> float:
    return low * (high / low) ** torch.rand((), generator=generator, **FLOAT32).item()
