"""Recurrent language models: Elman's network, GRU and LSTM, in torch's parametrisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .draws import Draw
from .layers import Init, Leaf, Theta, embed, embedding_leaf
from .optimizee import Batch, Optimizee
from .pixels import Images
from .sequences import Material, logits, material, next_symbol_losses

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class Recurrent:
    """``embedding`` [symbols, width], layers r0, r1, ... of ``hidden`` units, a linear read-out "out".

    A layer has ``_weight_ih`` [gates * hidden, inputs], ``_weight_hh`` [gates * hidden, hidden], ``_bias_ih`` and
    ``_bias_hh`` [gates * hidden], with torch's order of gates (r, z, n and i, f, g, o).
    """

    cell: str
    symbols: int
    width: int
    hidden: int
    layers: int
    first: int

    def leaves(self, init: Init) -> dict[str, Leaf]:
        leaves = {"embedding": embedding_leaf(self.symbols, self.width)}
        rows, bound = GATES[self.cell] * self.hidden, self.hidden**-0.5
        for k in range(self.layers):
            for name, columns in (("ih", self.hidden if k else self.width), ("hh", self.hidden)):
                # torch bounds all of them by 1 / sqrt(hidden).
                size = init.gain * bound
                leaves[f"r{k}_weight_{name}"] = Leaf((rows, columns), init.kind, size)
            for name in ("ih", "hh"):
                leaves[f"r{k}_bias_{name}"] = Leaf((rows,), "uniform", bound)
        leaves.update(init.linear("out", self.hidden, self.symbols))
        return leaves

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        symbols = batch[0]
        inputs = symbols[:, :, :-1].transpose(1, 2)  # time before batch: each step then reads one stretch of memory
        # What the first layer makes of a symbol depends on the symbol alone: a table, and one product instead of many.
        table = _affine(theta, "r0", theta["embedding"], self.cell)
        x = embed(table, inputs)
        for k in range(self.layers):
            if k:
                x = _affine(theta, f"r{k}", x.flatten(1, 2), self.cell).unflatten(1, x.shape[1:3])
            x = run(theta, f"r{k}", x, self.cell)
        return next_symbol_losses(logits(theta, "out", x).transpose(1, 2), symbols, self.first)


def _affine(theta: Theta, name: str, x: Tensor, cell: str) -> Tensor:
    """Inputs' part of all gates; with the hidden states' bias where nothing but their sum matters."""
    bias = theta[f"{name}_bias_ih"]
    if cell != "gru":
        bias = bias + theta[f"{name}_bias_hh"]
    return torch.baddbmm(bias.unsqueeze(1), x, theta[f"{name}_weight_ih"].transpose(1, 2))


def run(theta: Theta, name: str, x: Tensor, cell: str) -> Tensor:
    """Hidden states ``[K, length, batch, hidden]`` for inputs' parts ``[K, length, batch, gates * hidden]``, from
    zeros."""
    weight = theta[f"{name}_weight_hh"].transpose(1, 2)
    hidden = weight.shape[1]
    h = c = x.new_zeros(x.shape[0], x.shape[2], hidden)
    bias = theta[f"{name}_bias_hh"].unsqueeze(1)
    states = []
    for part in x.unbind(1):
        if cell == "rnn":
            h = torch.tanh(torch.baddbmm(part, h, weight))
        elif cell == "lstm":
            gates = torch.baddbmm(part, h, weight)
            i, f, g, o = gates.chunk(4, 2)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            recurrent = torch.baddbmm(bias, h, weight)
            r, z = torch.sigmoid(part[:, :, : 2 * hidden] + recurrent[:, :, : 2 * hidden]).chunk(2, 2)
            n = torch.tanh(torch.addcmul(part[:, :, 2 * hidden :], r, recurrent[:, :, 2 * hidden :]))
            h = torch.lerp(n, h, z)
        states.append(h)
    return torch.stack(states, 1)


def recurrent_model(draw: Draw, material: Material, cell: str, layers: int) -> Optimizee:
    """A language model of that kind on the material."""
    width, hidden = draw.log_whole(4, 16), draw.log_whole(8, 24)
    net = Recurrent(cell, material.symbols, width, hidden, layers, material.first)
    label = f"{cell} {width}-{'-'.join([str(hidden)] * layers)} on {material.label}"
    return Optimizee(net.leaves(Init.drawn(draw)), net, material.source, label)


def recurrent(draw: Draw, images: Images, split: str) -> Optimizee:
    """One layer of any kind."""
    return recurrent_model(draw, material(draw, split), draw.one_of(tuple(GATES)), 1)
