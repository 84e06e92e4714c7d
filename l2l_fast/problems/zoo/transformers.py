"""Tiny transformers: blocks of attention and a perceptron, which language models and (held out) pictures share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .draws import Draw
from .layers import ACTIVATIONS, Init, Leaf, Theta, embed, embedding_leaf, layer_norm, linear, norm_leaves
from .optimizee import Batch, Optimizee
from .pixels import Images
from .sequences import material, next_symbol_losses


@dataclass(frozen=True)
class Blocks:
    """``depth`` blocks x + attention(norm(x)), x + perceptron(norm(x)) and a last norm, or, with ``pre`` False, the
    norms behind the sums as in Vaswani et al. 2017. Layers of block k are ``b{k}_qkv``, ``b{k}_proj``, ``b{k}_up``,
    ``b{k}_down`` and norms ``b{k}_n1``, ``b{k}_n2``; the last norm is ``n``."""

    depth: int
    width: int
    heads: int
    inner: int
    activation: str
    pre: bool

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves: dict[str, Leaf] = {}
        for k in range(self.depth):
            leaves.update(norm_leaves(f"b{k}_n1", self.width))
            leaves.update(init.linear(f"b{k}_qkv", self.width, 3 * self.width))
            leaves.update(init.linear(f"b{k}_proj", self.width, self.width))
            leaves.update(norm_leaves(f"b{k}_n2", self.width))
            leaves.update(init.linear(f"b{k}_up", self.width, self.inner))
            leaves.update(init.linear(f"b{k}_down", self.inner, self.width))
        if self.pre:
            leaves.update(norm_leaves("n", self.width))
        return leaves

    def __call__(self, theta: Theta, x: Tensor, mask: Tensor | None) -> Tensor:
        """``[K, batch, length, width]``; ``mask`` is added to the scores ``[length, length]``."""
        shape = x.shape
        x = x.flatten(1, 2)
        for k in range(self.depth):
            name = f"b{k}"
            if self.pre:
                x = x + self._attention(theta, name, layer_norm(theta, f"{name}_n1", x), shape, mask)
                x = x + self._perceptron(theta, name, layer_norm(theta, f"{name}_n2", x))
            else:
                x = layer_norm(theta, f"{name}_n1", x + self._attention(theta, name, x, shape, mask))
                x = layer_norm(theta, f"{name}_n2", x + self._perceptron(theta, name, x))
        return (layer_norm(theta, "n", x) if self.pre else x).view(shape)

    def _attention(self, theta: Theta, name: str, x: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor:
        problems, batch, length, width = shape
        parts = linear(theta, f"{name}_qkv", x).view(problems * batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        scores = torch.bmm(q * (width // self.heads) ** -0.5, k.transpose(1, 2))
        if mask is not None:
            scores = scores + mask
        mixed = torch.bmm(scores.softmax(2), v).view(problems, batch, self.heads, length, width // self.heads)
        return linear(theta, f"{name}_proj", mixed.transpose(2, 3).reshape(problems, batch * length, width))

    def _perceptron(self, theta: Theta, name: str, x: Tensor) -> Tensor:
        return linear(theta, f"{name}_down", ACTIVATIONS[self.activation](linear(theta, f"{name}_up", x)))


@dataclass(frozen=True)
class Transformer:
    """``embedding`` [symbols, width] and ``places`` [length, width], blocks, and a read-out "out": a layer of its own
    or, ``tied``, the embedding again."""

    blocks: Blocks
    symbols: int
    length: int
    first: int
    tied: bool

    def leaves(self, init: Init, embedding: float) -> dict[str, Leaf]:
        width = self.blocks.width
        leaves = {
            "embedding": embedding_leaf(self.symbols, width),
            "places": Leaf((self.length, width), "normal", embedding),
        }
        if embedding != 1.0:
            leaves["embedding"] = Leaf((self.symbols, width), "normal", embedding)
        leaves.update(self.blocks.leaves(init))
        if not self.tied:
            leaves.update(init.linear("out", width, self.symbols))
        return leaves

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        symbols = batch[0]
        x = embed(theta["embedding"], symbols[:, :, :-1]) + theta["places"].unsqueeze(1)
        mask = torch.full((self.length, self.length), -torch.inf, device=x.device, dtype=x.dtype).triu_(1)
        x = self.blocks(theta, x, mask)
        flat = x.flatten(1, 2)
        if self.tied:
            scores = torch.bmm(flat, theta["embedding"].transpose(1, 2))
        else:
            scores = linear(theta, "out", flat)
        return next_symbol_losses(scores.unflatten(1, x.shape[1:3]), symbols, self.first)


def drawn_blocks(draw: Draw) -> Blocks:
    """One or two blocks of width 8 to 16."""
    width = draw.one_of((8, 12, 16))
    return Blocks(
        draw.whole(1, 2),
        width,
        draw.one_of((1, 2, 4)),
        width * draw.one_of((1, 2, 4)),
        draw.one_of(("gelu", "relu", "silu")),
        draw.chance(0.75),
    )


def transformer(draw: Draw, images: Images, split: str) -> Optimizee:
    """A language model on synthetic sequences or text."""
    given = material(draw, split)
    net = Transformer(drawn_blocks(draw), given.symbols, given.length, given.first, draw.chance(0.3))
    # torch's embeddings are standard normal; GPT-2 and most code since has 0.02. Tied ones of the former size would
    # start with enormous scores.
    embedding = 0.02 if net.tied or draw.chance(0.5) else 1.0
    init = Init.drawn(draw)
    blocks = net.blocks
    label = (
        f"{blocks.depth} blocks of width {blocks.width}, {blocks.heads} heads, inner {blocks.inner}, "
        f"{blocks.activation}, norms {'before' if blocks.pre else 'behind'}, "
        f"{'tied, ' if net.tied else ''}on {given.label}"
    )
    return Optimizee(net.leaves(init, embedding), net, given.source, label)
