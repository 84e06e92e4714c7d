"""Small convolutional networks on small images, with and without batch normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .draws import Draw
from .layers import (
    ACTIVATIONS,
    Init,
    Leaf,
    Theta,
    batch_norm_columns,
    conv,
    cross_entropy,
    from_conv,
    linear,
    norm_leaves,
    to_conv,
)
from .optimizee import Batch, Optimizee
from .perceptrons import pictures
from .pixels import CLASSES, SIDES, Images


@dataclass(frozen=True)
class Convolutions:
    """Blocks "c0", "c1", ... of convolution, batch normalisation "n0", ... or none, activation and 2 x 2 max-pooling;
    then a linear read-out "out" of all positions, or of their mean."""

    side: int
    channels: tuple[int, ...]
    kernel: int
    activation: str
    normalised: bool
    averaged: bool

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves: dict[str, Leaf] = {}
        depth, side = 1, self.side
        for k, width in enumerate(self.channels):
            # An offset follows: a bias would have no effect, and users leave it out.
            leaves.update(init.conv(f"c{k}", depth, width, self.kernel, bias=not self.normalised))
            if self.normalised:
                leaves.update(norm_leaves(f"n{k}", width))
            depth, side = width, side // 2
        leaves.update(init.linear("out", depth if self.averaged else depth * side * side, CLASSES))
        return leaves

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        pixels, labels = batch
        x = to_conv(pixels, self.side)
        for k in range(len(self.channels)):
            x = conv(theta, f"c{k}", x)
            if self.normalised:
                x = batch_norm_columns(theta, f"n{k}", x)
            if self.activation == "relu":
                # Pooling first gives the same values, and the ReLU a quarter of the work.
                x = F.max_pool2d(x, 2).relu()
            else:
                x = F.max_pool2d(ACTIVATIONS[self.activation](x), 2)
        if self.averaged:
            x = x.mean((2, 3))
        return cross_entropy(linear(theta, "out", from_conv(x, len(labels))), labels)


def convolutions(draw: Draw, images: Images, split: str) -> Optimizee:
    """One to three blocks on small images."""
    side = draw.one_of(SIDES)
    channels = tuple(draw.log_whole(4, 12) for _ in range(draw.whole(1, 2 if side == 8 else 3)))
    kernel = 3 if draw.chance(0.75) else 5
    activation = draw.one_of(tuple(ACTIVATIONS), (4.0, 1.0, 0.5, 1.0, 1.0, 1.0))
    net = Convolutions(side, channels, kernel, activation, draw.chance(0.5), draw.chance(0.3))
    # Convolutions cost as much as the pictures are large; batches make up for it.
    source = pictures(draw, images, split, side, draw.log_whole(8, 32 if side == 8 else 16))
    init = Init.drawn(draw)
    norm = "batch" if net.normalised else "none"
    label = f"{side} x {side}, channels {channels}, {kernel} x {kernel} {activation}, norm {norm}, batch {source.batch}"
    return Optimizee(net.leaves(init), net, source, label)
