"""Layers of K networks side by side, as functions: every tensor leads with K, and no number of one meets another's.

``theta`` is a dict of parameters; a layer called "l0" owns the names that begin with "l0_". Shapes behind the K are
those of torch's own modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draw

Theta = dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "elu": F.elu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Leaf:
    """A parameter of one problem and where it starts.

    Attributes:
        shape: without the leading K.
        kind: "uniform" from U(-size, size), "normal" from N(0, size^2), "constant" is ``size`` everywhere.
    """

    shape: tuple[int, ...]
    kind: str
    size: float

    def initial(self, problems: int, draw: Draw) -> Tensor:
        """float32 ``[problems, *shape]``."""
        if self.kind == "uniform":
            return (2 * draw.rand(problems, *self.shape) - 1) * self.size
        if self.kind == "normal":
            return draw.normal(problems, *self.shape) * self.size
        return torch.full((problems, *self.shape), self.size, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Init:
    """How the weights of an architecture start: uniformly, within torch's default bounds 1 / sqrt(fan_in)
    (``kaiming_uniform_(a=sqrt(5))``), or normally with standard deviation 1 / sqrt(fan_in), both times ``gain``.

    Biases start as torch's do, whatever the gain."""

    kind: str = "uniform"
    gain: float = 1.0

    @classmethod
    def drawn(cls, draw: Draw) -> Init:
        """Of either kind, with a gain from 0.5 to 2; torch's default in a third of the cases, as users' networks."""
        if draw.chance(1 / 3):
            return cls()
        return cls(draw.one_of(("uniform", "normal")), draw.log_uniform(0.5, 2.0))

    def weight(self, *shape: int) -> Leaf:
        """Of shape [out, in, ...]."""
        return Leaf(shape, self.kind, self.gain / math.sqrt(math.prod(shape[1:])))

    def linear(self, name: str, inputs: int, outputs: int) -> dict[str, Leaf]:
        """``{name}_weight`` [out, in] and ``{name}_bias`` [out]."""
        return {
            f"{name}_weight": self.weight(outputs, inputs),
            f"{name}_bias": Leaf((outputs,), "uniform", 1 / math.sqrt(inputs)),
        }

    def conv(self, name: str, inputs: int, outputs: int, kernel: int, bias: bool = True) -> dict[str, Leaf]:
        """``{name}_weight`` [out, in, kernel, kernel] and ``{name}_bias`` [out]."""
        leaves = {f"{name}_weight": self.weight(outputs, inputs, kernel, kernel)}
        if bias:
            leaves[f"{name}_bias"] = Leaf((outputs,), "uniform", 1 / (kernel * math.sqrt(inputs)))
        return leaves


def norm_leaves(name: str, width: int) -> dict[str, Leaf]:
    """``{name}_gain`` and ``{name}_offset`` [width] of a normalisation."""
    return {f"{name}_gain": Leaf((width,), "constant", 1.0), f"{name}_offset": Leaf((width,), "constant", 0.0)}


def embedding_leaf(symbols: int, width: int) -> Leaf:
    """[symbols, width], standard normal as torch's."""
    return Leaf((symbols, width), "normal", 1.0)


def linear(theta: Theta, name: str, x: Tensor) -> Tensor:
    """``[K, n, in]`` to ``[K, n, out]``."""
    return torch.baddbmm(theta[f"{name}_bias"].unsqueeze(1), x, theta[f"{name}_weight"].transpose(1, 2))


def conv(theta: Theta, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """``[n, K * in, side, side]`` to ``[n, K * out, side / stride, side / stride]``: K groups of one convolution."""
    weight, bias = theta[f"{name}_weight"], theta.get(f"{name}_bias")
    bias = None if bias is None else bias.flatten()
    return F.conv2d(x, weight.flatten(0, 1), bias, stride, weight.shape[-1] // 2, groups=weight.shape[0])


def to_conv(x: Tensor, side: int) -> Tensor:
    """Images ``[K, n, side * side]`` as :func:`conv` wants them: ``[n, K, side, side]``."""
    return x.transpose(0, 1).reshape(x.shape[1], -1, side, side)


def from_conv(x: Tensor, problems: int) -> Tensor:
    """``[n, K * channels, ...]`` as features ``[K, n, channels * ...]``."""
    return x.reshape(x.shape[0], problems, -1).transpose(0, 1)


def layer_norm(theta: Theta, name: str, x: Tensor) -> Tensor:
    """Over the last dimension of ``[K, n, width]``."""
    gain, offset = theta[f"{name}_gain"].unsqueeze(1), theta[f"{name}_offset"].unsqueeze(1)
    return torch.addcmul(offset, F.layer_norm(x, x.shape[-1:]), gain)


def batch_norm(theta: Theta, name: str, x: Tensor) -> Tensor:
    """Over the rows of ``[K, n, width]`` by their own statistics, as in training."""
    columns = x.transpose(0, 1).flatten(1)
    return batch_norm_columns(theta, name, columns).unflatten(1, x[:, 0].shape).transpose(0, 1)


def batch_norm_columns(theta: Theta, name: str, x: Tensor) -> Tensor:
    """Over all dimensions but the second of ``[n, K * channels, ...]``."""
    gain, offset = theta[f"{name}_gain"].flatten(), theta[f"{name}_offset"].flatten()
    return F.batch_norm(x, None, None, gain, offset, training=True)


def embed(table: Tensor, symbols: Tensor) -> Tensor:
    """Rows of ``[K, vocabulary, width]`` for int64 ``[K, ...]``: ``[K, ..., width]``."""
    starts = torch.arange(0, table.shape[0] * table.shape[1], table.shape[1], device=symbols.device)
    return F.embedding(symbols + starts.view(-1, *[1] * (symbols.dim() - 1)), table.flatten(0, 1))


def mean_by_problem(x: Tensor) -> Tensor:
    """``[K, ...]`` to ``[K]``."""
    return x.flatten(1).mean(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Means ``[K]`` in nats, of logits ``[K, n, classes]`` and int64 labels ``[K, n]``."""
    each = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return mean_by_problem(each.view(labels.shape))
