"""Noisy quadratics and logistic regression: convex, badly conditioned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draw
from .layers import Leaf, Theta
from .optimizee import Batch, Optimizee
from .pixels import Images
from .sources import Rows


@dataclass(frozen=True)
class Quadratic:
    """Matrices m0, m1, ... and a vector v around a minimum that jumps: mean squares of P (m - o) Q and of d * (v - o).

    The Hessian of a matrix is P^T P (x) Q Q^T, a Kronecker product as in layers of networks (Martens and Grosse 2015);
    o is drawn anew at every evaluation around the minimum, as in the noisy quadratic model (Zhang et al. 2019).
    """

    matrices: int

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        total = theta["v"].new_zeros(len(theta["v"]))
        for k in range(self.matrices):
            left, right, jump = batch[3 * k : 3 * k + 3]
            total = total + (left @ (theta[f"m{k}"] - jump) @ right).square().sum((1, 2))
        diagonal, jump = batch[-2:]
        return (total + (diagonal * (theta["v"] - jump)).square().sum(1)) / 2


@dataclass(frozen=True)
class Jumps:
    """For every matrix P ``[K, r, r]``, Q ``[K, c, c]`` and o ``[K, r, c]``, for the vector d ``[K, n]`` and o
    ``[K, n]``. All but the jumps of o around ``centres`` are the same for all problems."""

    factors: tuple[tuple[Tensor, Tensor], ...]
    diagonal: Tensor
    centres: tuple[Tensor, ...]
    noise: float

    def draw(self, problems: int, draw: Draw) -> Batch:
        batch: list[Tensor] = []
        for left, right in self.factors:
            batch += [left.expand(problems, -1, -1), right.expand(problems, -1, -1)]
            batch.append(self._around(self.centres[len(batch) // 3], problems, draw))
        return *batch, self.diagonal.expand(problems, -1), self._around(self.centres[-1], problems, draw)

    def _around(self, centre: Tensor, problems: int, draw: Draw) -> Tensor:
        return draw.normal(problems, *centre.shape).mul_(self.noise).add_(centre)


def noisy_quadratic(draw: Draw, images: Images, split: str) -> Optimizee:
    """One or two matrices and a vector; condition numbers from 10 to 10,000 per side.

    theta_0 is smaller than the minimum's distance from zero, larger, or like it: optimizers that see theta must not
    learn that zero is a good place. The minimum jumps by up to 0.3 of that."""
    condition = draw.log_uniform(10.0, 1e4)
    rotated = draw.chance(0.7)
    shapes = [(draw.log_whole(12, 50), draw.log_whole(12, 50)) for _ in range(draw.whole(1, 2))]
    factors = tuple((_factor(draw, r, condition, rotated), _factor(draw, c, condition, rotated)) for r, c in shapes)
    size = draw.log_whole(8, 64)
    diagonal = draw.spread(size, math.log10(condition) / 2)
    start, centre = draw.log_uniform(0.03, 1.0), draw.log_uniform(0.1, 3.0)
    noise = centre * draw.log_uniform(0.003, 0.3) if draw.chance(0.8) else 0.0
    centres = tuple(draw.normal(*shape) * centre for shape in (*shapes, (size,)))
    leaves = {f"m{k}": Leaf(shape, "normal", start) for k, shape in enumerate(shapes)}
    leaves["v"] = Leaf((size,), "normal", start)
    # So that the loss at theta_0 is about one, whatever the sizes and conditions.
    trace = sum((p.square().sum() * q.square().sum() for p, q in factors), diagonal.square().sum())
    scale = (2 / (trace * (start**2 + centre**2))).sqrt()
    factors = tuple((p * scale, q) for p, q in factors)
    label = f"matrices {shapes}, vector {size}, condition {condition:.0f}, noise {noise:.3f}"
    return Optimizee(leaves, Quadratic(len(shapes)), Jumps(factors, diagonal * scale, centres, noise), label)


def _factor(draw: Draw, size: int, condition: float, rotated: bool) -> Tensor:
    """A square root of a matrix with eigenvalues from 1 down to 1 / condition, log-spaced."""
    values = draw.spread(size, math.log10(condition) / 2)
    if not rotated:
        return torch.diag(values)
    basis = torch.linalg.qr(draw.normal(size, size)).Q
    return basis * values @ basis.T


@dataclass(frozen=True)
class Logistic:
    """Cross-entropy of one linear unit, with a penalty on its weight's squares."""

    penalty: float

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        x, y = batch
        logits = torch.baddbmm(theta["bias"].unsqueeze(1), x, theta["weight"].transpose(1, 2)).squeeze(2)
        each = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        return each.mean(1) + self.penalty / 2 * theta["weight"].square().sum((1, 2))


def logistic_regression(draw: Draw, images: Images, split: str) -> Optimizee:
    """Two classes by one linear unit of many inputs, whose standard deviations fall by up to 1,000; weights start at
    zero or as torch's."""
    inputs = draw.log_whole(400, 1600)
    rows = 512
    x = draw.normal(rows, inputs) * draw.spread(inputs, draw.uniform(0, 3))
    if draw.chance(0.5):
        # Directions that many inputs share, as in real tables.
        x += draw.normal(rows, 3) @ draw.normal(3, inputs) * draw.log_uniform(0.1, 1.0)
    x /= x.square().mean().sqrt()
    scores = x @ draw.normal(inputs) / inputs**0.5
    y = (draw.rand(rows) < torch.sigmoid(scores * draw.log_uniform(0.5, 10.0))).to(torch.float32)
    size = 0.0 if draw.chance(0.5) else inputs**-0.5
    leaves = {"weight": Leaf((1, inputs), "uniform", size), "bias": Leaf((1,), "uniform", size)}
    net = Logistic(draw.log_uniform(1e-5, 1e-2) if draw.chance(0.5) else 0.0)
    source = Rows((x, y), draw.log_whole(8, 64))
    return Optimizee(leaves, net, source, f"{inputs} inputs, penalty {net.penalty:.1e}, batch {source.batch}")
