"""Held out of training, without images: a deeper GRU on another text, a bag of embeddings, a differential equation, a
normalising flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import FLOAT32
from .draws import Draw
from .layers import Init, Leaf, Theta, cross_entropy, embed, embedding_leaf, linear
from .optimizee import Batch, Optimizee
from .perceptrons import batch_size
from .pixels import Images
from .recurrent import recurrent_model
from .sequences import text_material
from .sources import Rows


def deep_gru(draw: Draw, images: Images, split: str) -> Optimizee:
    """Two layers of GRU on text in Middle English."""
    return recurrent_model(draw, text_material(draw, split, "wycliffe-john"), "gru", 2)


@dataclass(frozen=True)
class EmbeddingBag:
    """The mean of the words' rows of ``embedding`` [words, width], then a linear layer "out": most coordinates have a
    gradient of zero at most steps."""

    words: int
    width: int
    classes: int

    def leaves(self, init: Init) -> dict[str, Leaf]:
        return {"embedding": embedding_leaf(self.words, self.width), **init.linear("out", self.width, self.classes)}

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        words, labels = batch
        return cross_entropy(linear(theta, "out", embed(theta["embedding"], words).mean(2)), labels)


def embedding_bag(draw: Draw, images: Images, split: str) -> Optimizee:
    """Topics of short documents: words are drawn by Zipf's law, tilted by the topic."""
    net = EmbeddingBag(draw.log_whole(100, 400), draw.log_whole(4, 12), draw.log_whole(2, 10))
    documents, length = 4096, draw.log_whole(4, 16)
    labels = draw.below(net.classes, documents)
    scores = (
        draw.normal(net.classes, net.words) * draw.log_uniform(0.7, 2.0)
        - torch.arange(1, net.words + 1, **FLOAT32).log()
    )
    chances = scores.softmax(1).cumsum(1)
    words = torch.searchsorted(chances[labels], draw.rand(documents, length)).clamp_(max=net.words - 1)
    source = Rows((words, labels), batch_size(draw, 8, 64), net.classes)
    label = f"{net.words} words, width {net.width}, {net.classes} topics, batch {source.batch}"
    return Optimizee(net.leaves(Init.drawn(draw)), net, source, label)


@dataclass(frozen=True)
class Equation:
    """u'' + stiffness * u = f on [-1, 1] with u(-1) and u(1) given: mean squared residual of a tanh perceptron with
    layers "l0", "l1", ..., plus ``weight`` times the squared errors at the ends (Raissi et al. 2019).

    u, u' and u'' are carried through the layers together, so that no derivative is taken inside the loss.
    """

    widths: tuple[int, ...]
    stiffness: float
    weight: float

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves: dict[str, Leaf] = {}
        for k in range(len(self.widths) - 1):
            leaves.update(init.linear(f"l{k}", self.widths[k], self.widths[k + 1]))
        return leaves

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        x, f, ends = batch
        points = torch.cat((x, x.new_tensor([[-1.0], [1.0]]).expand(len(x), 2, 1)), 1)
        u, _, curvature = self.jet(theta, points)
        residual = curvature[:, :-2] + self.stiffness * u[:, :-2] - f
        return residual.square().mean((1, 2)) + self.weight * (u[:, -2:] - ends).square().sum((1, 2))

    def jet(self, theta: Theta, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, u' and u'' ``[K, n, 1]`` at ``[K, n, 1]``."""
        value, slope, curvature = x, torch.ones_like(x), torch.zeros_like(x)
        for k in range(len(self.widths) - 1):
            if k:
                value = torch.tanh(value)
                first = 1 - value.square()
                # tanh'' = -2 tanh tanh'
                curvature = first * (curvature - 2 * value * slope.square())
                slope = first * slope
            weight = theta[f"l{k}_weight"].transpose(1, 2)
            value = linear(theta, f"l{k}", value)
            slope, curvature = torch.bmm(slope, weight), torch.bmm(curvature, weight)
        return value, slope, curvature


def equation(draw: Draw, images: Images, split: str) -> Optimizee:
    """Poisson's or Helmholtz's equation in one dimension; f belongs to a known sum of sines."""
    stiffness = draw.log_uniform(1.0, 30.0) if draw.chance(0.5) else 0.0
    hidden = tuple(draw.log_whole(12, 48) for _ in range(draw.whole(2, 3)))
    waves = [
        (draw.uniform(0.2, 1.0), draw.uniform(0.5, 3.0) * math.pi / 2, draw.uniform(0, math.pi))
        for _ in range(draw.whole(1, 3))
    ]
    x = draw.rand(2048, 1) * 2 - 1
    _, f = solution(waves, stiffness, x)
    at_ends, _ = solution(waves, stiffness, torch.tensor([[-1.0], [1.0]], **FLOAT32))
    net = Equation((1, *hidden, 1), stiffness, draw.log_uniform(1.0, 100.0))
    rows = Collocation(x, f, at_ends, batch_size(draw, 16, 64))
    label = f"hidden {hidden}, stiffness {stiffness:.1f}, batch {rows.batch}"
    return Optimizee(net.leaves(Init.drawn(draw)), net, rows, label)


def solution(waves: list[tuple[float, float, float]], stiffness: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """u and u'' + stiffness * u at x; u is a sum of waves size * sin(frequency * x + phase)."""
    u, f = torch.zeros_like(x), torch.zeros_like(x)
    for size, frequency, phase in waves:
        wave = size * torch.sin(frequency * x + phase)
        u = u + wave
        f = f + (stiffness - frequency**2) * wave
    return u, f


@dataclass(frozen=True)
class Collocation:
    """Points ``[K, batch, 1]``, f there, and u at the two ends ``[K, 2, 1]``."""

    x: Tensor
    f: Tensor
    ends: Tensor
    batch: int

    def draw(self, problems: int, draw: Draw) -> Batch:
        return *Rows((self.x, self.f), self.batch).draw(problems, draw), self.ends.expand(problems, 2, 1)


@dataclass(frozen=True)
class Flow:
    """Minus the log-likelihood per dimension of points under affine couplings (Dinh et al. 2017): half of a point is
    scaled and shifted by a tanh perceptron ``a{k}``, ``b{k}`` of the other half; halves take turns.

    ``floor``, the entropy per dimension that is known to remain, is taken off: losses are then positive, in the mean
    over the data, and can be compared by their ratio."""

    half: int
    hidden: int
    depth: int
    floor: float

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves: dict[str, Leaf] = {}
        for k in range(self.depth):
            leaves.update(init.linear(f"a{k}", self.half, self.hidden))
            leaves.update(init.linear(f"b{k}", self.hidden, 2 * self.half))
        return leaves

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        kept, moved = batch[0].chunk(2, 2)
        log_volume = torch.zeros_like(kept)
        for k in range(self.depth):
            scale, shift = linear(theta, f"b{k}", torch.tanh(linear(theta, f"a{k}", kept))).chunk(2, 2)
            scale = torch.tanh(scale)
            log_volume = log_volume + scale
            kept, moved = moved * scale.exp() + shift, kept
        energy = (kept.square() + moved.square()) / 2 + math.log(2 * math.pi) - log_volume
        return energy.mean((1, 2)) / 2 - self.floor


def flow(draw: Draw, images: Images, split: str) -> Optimizee:
    """Mixtures of Gaussians in two to eight dimensions."""
    spread = draw.log_uniform(0.1, 0.6)
    # The mixture has at least the entropy of one of its Gaussians.
    floor = math.log(spread) + math.log(2 * math.pi * math.e) / 2
    net = Flow(draw.whole(1, 4), draw.log_whole(16, 64), draw.whole(2, 6), floor)
    size, centres = 2 * net.half, draw.whole(2, 8)
    chosen = draw.below(centres, 4096)
    points = draw.normal(centres, size)[chosen] * 1.5 + draw.normal(4096, size) * spread
    source = Rows((points,), batch_size(draw))
    label = f"{size} dimensions, {net.depth} couplings of width {net.hidden}, batch {source.batch}"
    return Optimizee(net.leaves(Init.drawn(draw)), net, source, label)
