"""Perceptrons: classification of small images and of a random teacher's labels, autoencoders, regressions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draw
from .layers import (
    ACTIVATIONS,
    Init,
    Leaf,
    Theta,
    batch_norm,
    cross_entropy,
    layer_norm,
    linear,
    mean_by_problem,
    norm_leaves,
)
from .optimizee import Batch, Optimizee
from .pixels import CLASSES, SIDES, Images
from .sources import Pictures, Rows, standardised


@dataclass(frozen=True)
class Perceptron:
    """Linear layers "l0", "l1", ... between ``widths``, with a normalisation "n0", ... before each activation.

    ``loss`` compares the outputs with the batch's last tensor: "classes" (cross-entropy), "squares" (mean squares), or,
    for the inputs themselves as targets, "copies" (mean squares) and "bits" (cross-entropy of every input in [0, 1]).
    """

    widths: tuple[int, ...]
    activation: str
    norm: str
    loss: str

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves: dict[str, Leaf] = {}
        for k, (inputs, outputs) in enumerate(pairwise(self.widths)):
            leaves.update(init.linear(f"l{k}", inputs, outputs))
            if self.norm != "none" and k < len(self.widths) - 2:
                leaves.update(norm_leaves(f"n{k}", outputs))
        return leaves

    def outputs(self, theta: Theta, x: Tensor) -> Tensor:
        """``[K, n, out]`` of ``[K, n, in]``."""
        for k in range(len(self.widths) - 1):
            if k:
                if self.norm == "layer":
                    x = layer_norm(theta, f"n{k - 1}", x)
                elif self.norm == "batch":
                    x = batch_norm(theta, f"n{k - 1}", x)
                x = ACTIVATIONS[self.activation](x)
            x = linear(theta, f"l{k}", x)
        return x

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        outputs = self.outputs(theta, batch[0])
        if self.loss == "classes":
            return cross_entropy(outputs, batch[1])
        if self.loss == "bits":
            return mean_by_problem(F.binary_cross_entropy_with_logits(outputs, batch[0], reduction="none"))
        target = batch[0] if self.loss == "copies" else batch[1]
        return mean_by_problem((outputs - target).square())


def pictures(draw: Draw, images: Images, split: str, side: int, batch: int, kind: str | None = None) -> Pictures:
    """Minibatches of one of the image sets; a third of them with some of the labels wrong."""
    data = images.small(draw.one_of(images.names), split, side)
    scale, shift = standardised(kind or draw.one_of(("unit", "symmetric", "standard")), data)
    noise = draw.uniform(0.02, 0.3) if draw.chance(1 / 3) else 0.0
    return Pictures(data, batch, CLASSES, scale, shift, noise)


def batch_size(draw: Draw, low: int = 8, high: int = 128) -> int:
    """Log-uniform."""
    return draw.log_whole(low, high)


def image_perceptron(draw: Draw, images: Images, split: str) -> Optimizee:
    """Classification of small images by a perceptron of depth 1 to 4."""
    side = draw.one_of(SIDES)
    hidden = tuple(draw.log_whole(4, 48) for _ in range(draw.whole(1, 4)))
    source = pictures(draw, images, split, side, batch_size(draw))
    return _optimizee(draw, (side * side, *hidden, CLASSES), "classes", source)


def softmax_regression(draw: Draw, images: Images, split: str) -> Optimizee:
    """Classification of small images without hidden layers: convex."""
    side = draw.one_of(SIDES)
    source = pictures(draw, images, split, side, batch_size(draw))
    return _optimizee(draw, (side * side, CLASSES), "classes", source)


def autoencoder(draw: Draw, images: Images, split: str) -> Optimizee:
    """Small images through a narrow layer."""
    side = draw.one_of(SIDES)
    loss = draw.one_of(("copies", "bits"))
    source = pictures(draw, images, split, side, batch_size(draw), "unit" if loss == "bits" else None)
    outer = draw.one_of(((), (draw.log_whole(8, 24),)))
    widths = (side * side, *outer, draw.log_whole(2, 16), *reversed(outer), side * side)
    return _optimizee(draw, widths, loss, source)


def teacher_classification(draw: Draw, images: Images, split: str) -> Optimizee:
    """Labels that a random perceptron gives to Gaussian inputs."""
    inputs, classes = draw.log_whole(4, 64), draw.log_whole(2, 16)
    x = _correlated(draw, inputs)
    scores = _teacher(draw, x, classes)
    # Without this some classes would hardly occur.
    labels = (scores - scores.mean(0)).div_(scores.std(0)).argmax(1)
    noise = draw.uniform(0.02, 0.3) if draw.chance(1 / 3) else 0.0
    hidden = tuple(draw.log_whole(8, 64) for _ in range(draw.whole(0, 4)))
    source = Rows((x, labels), batch_size(draw), classes, noise)
    return _optimizee(draw, (inputs, *hidden, classes), "classes", source)


def teacher_regression(draw: Draw, images: Images, split: str) -> Optimizee:
    """Outputs of a random perceptron, with or without noise, at Gaussian inputs."""
    inputs, outputs = draw.log_whole(2, 64), draw.log_whole(1, 8)
    x = _correlated(draw, inputs)
    y = _teacher(draw, x, outputs)
    y = y.div_(y.std())
    if draw.chance(0.5):
        y += draw.normal(*y.shape) * draw.log_uniform(0.03, 1.0)
    hidden = tuple(draw.log_whole(8, 64) for _ in range(draw.whole(1, 4)))
    return _optimizee(draw, (inputs, *hidden, outputs), "squares", Rows((x, y), batch_size(draw)))


def sine_regression(draw: Draw, images: Images, split: str) -> Optimizee:
    """A sum of one to three sines on [-5, 5], as in Finn et al. 2017, section 5.1."""
    x = draw.rand(4096, 1) * 10 - 5
    waves = [
        draw.uniform(0.1, 5.0) * torch.sin(draw.uniform(0.5, 3.0) * x + draw.uniform(0, math.pi))
        for _ in range(draw.whole(1, 3))
    ]
    y = torch.stack(waves).sum(0)
    hidden = tuple(draw.log_whole(12, 64) for _ in range(draw.whole(1, 3)))
    return _optimizee(draw, (1, *hidden, 1), "squares", Rows((x, y), batch_size(draw)))


def _optimizee(draw: Draw, widths: tuple[int, ...], loss: str, source: Pictures | Rows) -> Optimizee:
    # Half of them without normalisation, as most perceptrons are.
    norm = draw.one_of(("none", "layer", "batch"), (2.0, 1.0, 1.0)) if len(widths) > 2 else "none"
    net = Perceptron(widths, draw.one_of(tuple(ACTIVATIONS)), norm, loss)
    init = Init.drawn(draw)
    label = f"{'-'.join(map(str, widths))} {net.activation}, norm {norm}, {init.kind} init, batch {source.batch}"
    return Optimizee(net.leaves(init), net, source, label)


def _correlated(draw: Draw, inputs: int, rows: int = 4096) -> Tensor:
    """Gaussian inputs, in half the cases with standard deviations from 1 down to 0.03."""
    x = draw.normal(rows, inputs)
    return x * draw.spread(inputs, 1.5) if draw.chance(0.5) else x


def _teacher(draw: Draw, x: Tensor, outputs: int) -> Tensor:
    width = draw.log_whole(4, 32)
    hidden = torch.tanh(x @ draw.normal(x.shape[1], width) * (draw.log_uniform(0.5, 3.0) / x.shape[1] ** 0.5))
    return hidden @ draw.normal(width, outputs) / width**0.5
