"""Held out of training, on images: residual networks, a mixer, a vision transformer, a variational autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draw
from .layers import (
    ACTIVATIONS,
    Init,
    Leaf,
    Theta,
    conv,
    cross_entropy,
    from_conv,
    layer_norm,
    linear,
    mean_by_problem,
    norm_leaves,
    to_conv,
)
from .optimizee import Batch, Optimizee
from .perceptrons import batch_size, pictures
from .pixels import CLASSES, SIDES, Images
from .sources import Pictures
from .transformers import Blocks, drawn_blocks


@dataclass(frozen=True)
class ResidualPerceptron:
    """A layer "in", blocks x + b(act(a(x))) with layers ``a{k}``, ``b{k}``, a read-out "out"."""

    pixels: int
    width: int
    inner: int
    depth: int
    activation: str

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves = init.linear("in", self.pixels, self.width)
        for k in range(self.depth):
            leaves.update(init.linear(f"a{k}", self.width, self.inner))
            leaves.update(init.linear(f"b{k}", self.inner, self.width))
        return {**leaves, **init.linear("out", self.width, CLASSES)}

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        x = linear(theta, "in", batch[0])
        for k in range(self.depth):
            x = x + linear(theta, f"b{k}", ACTIVATIONS[self.activation](linear(theta, f"a{k}", x)))
        return cross_entropy(linear(theta, "out", x), batch[1])


def residual_perceptron(draw: Draw, images: Images, split: str) -> Optimizee:
    """Two to six residual blocks without normalisation."""
    side = draw.one_of(SIDES)
    sizes = draw.log_whole(8, 24), draw.log_whole(8, 24)
    net = ResidualPerceptron(side * side, *sizes, draw.whole(2, 6), draw.one_of(("relu", "gelu", "tanh")))
    return _classifier(draw, net, pictures(draw, images, split, side, batch_size(draw)))


@dataclass(frozen=True)
class ResidualConvolutions:
    """A stem "in", per stage a strided convolution ``s{k}`` and a block x + b(act(norm(a(act(norm(x)))))), a mean over
    positions, a read-out "out": group normalisation before every convolution (He et al. 2016; Wu and He 2018)."""

    side: int
    channels: tuple[int, ...]
    groups: int

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves = init.conv("in", 1, self.channels[0], 3)
        depth = self.channels[0]
        for k, width in enumerate(self.channels):
            leaves.update(init.conv(f"s{k}", depth, width, 3))
            for part in ("a", "b"):
                leaves.update(norm_leaves(f"n{part}{k}", width))
                leaves.update(init.conv(f"{part}{k}", width, width, 3, bias=False))
            depth = width
        return {**leaves, **init.linear("out", depth, CLASSES)}

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        pixels, labels = batch
        x = conv(theta, "in", to_conv(pixels, self.side))
        for k in range(len(self.channels)):
            x = conv(theta, f"s{k}", x, stride=2)
            y = conv(theta, f"a{k}", self._norm(theta, f"na{k}", x).relu())
            x = x + conv(theta, f"b{k}", self._norm(theta, f"nb{k}", y).relu())
        return cross_entropy(linear(theta, "out", from_conv(x.relu().mean((2, 3)), len(labels))), labels)

    def _norm(self, theta: Theta, name: str, x: Tensor) -> Tensor:
        gain, offset = theta[f"{name}_gain"], theta[f"{name}_offset"]
        return F.group_norm(x, len(gain) * self.groups, gain.flatten(), offset.flatten())


def residual_convolutions(draw: Draw, images: Images, split: str) -> Optimizee:
    """One or two stages of strided residual blocks on small images."""
    side, groups = draw.one_of(SIDES), draw.one_of((1, 2))
    channels = tuple(2 * draw.whole(2, 5) for _ in range(draw.whole(1, 2)))
    net = ResidualConvolutions(side, channels, groups)
    return _classifier(draw, net, pictures(draw, images, split, side, draw.log_whole(8, 32 if side == 8 else 12)))


@dataclass(frozen=True)
class Mixer:
    """Patches through a layer "in"; blocks that mix patches (``t{k}_up``, ``t{k}_down``) and channels (``c{k}_up``,
    ``c{k}_down``) in turn, each behind a norm; a mean over patches, a read-out (Tolstikhin et al. 2021)."""

    side: int
    patch: int
    width: int
    inner: int
    depth: int

    def leaves(self, init: Init) -> dict[str, Leaf]:
        patches = (self.side // self.patch) ** 2
        leaves = init.linear("in", self.patch**2, self.width)
        for k in range(self.depth):
            for part, size in (("t", patches), ("c", self.width)):
                leaves.update(norm_leaves(f"{part}{k}_n", self.width))
                leaves.update(init.linear(f"{part}{k}_up", size, self.inner))
                leaves.update(init.linear(f"{part}{k}_down", self.inner, size))
        return {**leaves, **norm_leaves("n", self.width), **init.linear("out", self.width, CLASSES)}

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        pixels, labels = batch
        x = to_patches(pixels, self.side, self.patch)
        shape = (*x.shape[:3], self.width)
        x = linear(theta, "in", x.flatten(1, 2))
        for k in range(self.depth):
            mixed = layer_norm(theta, f"t{k}_n", x).view(shape).transpose(2, 3).reshape(shape[0], -1, shape[2])
            mixed = linear(theta, f"t{k}_down", F.gelu(linear(theta, f"t{k}_up", mixed)))
            x = x + mixed.view(*shape[:2], self.width, shape[2]).transpose(2, 3).reshape(x.shape)
            mixed = layer_norm(theta, f"c{k}_n", x)
            x = x + linear(theta, f"c{k}_down", F.gelu(linear(theta, f"c{k}_up", mixed)))
        x = layer_norm(theta, "n", x).view(shape).mean(2)
        return cross_entropy(linear(theta, "out", x), labels)


def patch_mixer(draw: Draw, images: Images, split: str) -> Optimizee:
    """One or two blocks on 16 or 4 patches of 8 x 8 images, or 4 of 14 x 14."""
    side, patch = draw.one_of(((8, 2), (8, 4), (14, 7)))
    net = Mixer(side, patch, draw.log_whole(8, 20), draw.log_whole(8, 24), draw.whole(1, 2))
    return _classifier(draw, net, pictures(draw, images, split, side, draw.log_whole(8, 32)))


@dataclass(frozen=True)
class VisionTransformer:
    """Patches through a layer "in", places added, blocks without a mask, a mean over patches, a read-out "out"
    (Dosovitskiy et al. 2021)."""

    blocks: Blocks
    side: int
    patch: int

    def leaves(self, init: Init) -> dict[str, Leaf]:
        width, patches = self.blocks.width, (self.side // self.patch) ** 2
        leaves = init.linear("in", self.patch**2, width)
        leaves["places"] = Leaf((patches, width), "normal", 0.02)
        return {**leaves, **self.blocks.leaves(init), **init.linear("out", width, CLASSES)}

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        patches = to_patches(batch[0], self.side, self.patch)
        x = linear(theta, "in", patches.flatten(1, 2)).unflatten(1, patches.shape[1:3])
        x = self.blocks(theta, x + theta["places"].unsqueeze(1), None)
        return cross_entropy(linear(theta, "out", x.mean(2)), batch[1])


def vision_transformer(draw: Draw, images: Images, split: str) -> Optimizee:
    """One or two blocks on 16 or 4 patches of 8 x 8 images, or 4 of 14 x 14."""
    side, patch = draw.one_of(((8, 2), (8, 4), (14, 7)))
    net = VisionTransformer(drawn_blocks(draw), side, patch)
    return _classifier(draw, net, pictures(draw, images, split, side, draw.log_whole(8, 24)))


@dataclass(frozen=True)
class VariationalAutoencoder:
    """The negative evidence bound per pixel (Kingma and Welling 2014): encoder "e0", "e1" to means and log-variances of
    ``codes`` Gaussians, decoder "d0", "d1" to logits of the pixels."""

    pixels: int
    hidden: int
    codes: int

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves = init.linear("e0", self.pixels, self.hidden)
        leaves.update(init.linear("e1", self.hidden, 2 * self.codes))
        leaves.update(init.linear("d0", self.codes, self.hidden))
        return {**leaves, **init.linear("d1", self.hidden, self.pixels)}

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        pixels, noise = batch
        mean, log_variance = linear(theta, "e1", torch.tanh(linear(theta, "e0", pixels))).chunk(2, 2)
        codes = torch.addcmul(mean, (log_variance / 2).exp(), noise)
        outputs = linear(theta, "d1", torch.tanh(linear(theta, "d0", codes)))
        divergence = (mean.square() + log_variance.exp() - log_variance - 1) / 2
        likelihood = F.binary_cross_entropy_with_logits(outputs, pixels, reduction="none")
        return mean_by_problem(likelihood) + mean_by_problem(divergence) * (self.codes / self.pixels)


@dataclass(frozen=True)
class NoisyPictures:
    """Pixels ``[K, batch, pixels]`` in [0, 1] and standard normal numbers ``[K, batch, codes]``."""

    pictures: Pictures
    codes: int

    def draw(self, problems: int, draw: Draw) -> Batch:
        pixels, _ = self.pictures.draw(problems, draw)
        return pixels, draw.normal(problems, self.pictures.batch, self.codes)


def variational_autoencoder(draw: Draw, images: Images, split: str) -> Optimizee:
    """Two to six codes for 8 x 8 images, two to four for 14 x 14."""
    side = draw.one_of(SIDES)
    net = VariationalAutoencoder(side * side, draw.log_whole(*((8, 24) if side == 8 else (4, 9))), draw.whole(2, 6))
    source = NoisyPictures(pictures(draw, images, split, side, batch_size(draw, 8, 64), "unit"), net.codes)
    init = Init.drawn(draw)
    label = f"{side} x {side}, hidden {net.hidden}, codes {net.codes}, batch {source.pictures.batch}"
    return Optimizee(net.leaves(init), net, source, label)


def to_patches(pixels: Tensor, side: int, patch: int) -> Tensor:
    """``[K, n, side * side]`` to ``[K, n, patches, patch * patch]``."""
    count = side // patch
    cut = pixels.view(*pixels.shape[:2], count, patch, count, patch).transpose(3, 4)
    return cut.reshape(*pixels.shape[:2], count**2, patch**2)


def _classifier(
    draw: Draw,
    net: ResidualPerceptron | ResidualConvolutions | Mixer | VisionTransformer,
    source: Pictures,
) -> Optimizee:
    init = Init.drawn(draw)
    return Optimizee(net.leaves(init), net, source, f"{net}, {init.kind} init, batch {source.batch}")
