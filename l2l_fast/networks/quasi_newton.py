"""A memory that is BFGS from the start: what its heads read and write, and the degrees of freedom around it.

With s the last step, y the change of the gradient since and rho = 1 / (s^T y), the memory becomes

    M' = (I - w rho s y^T) M (I - w rho y s^T) + w rho s s^T

(Nocedal and Wright, Numerical Optimization, equation 6.17), with a gate w from the controller: w = 1 is BFGS, w = 0
writes nothing, and M' is positive semidefinite for every w >= 0. The next step is

    gain * d + momentum * (last step) - rate * g + correction,    d = -M' g

with gain = exp(.), momentum = tanh(.), rate and w = 2 sigmoid(.) of means of the controller's outputs over a problem,
and a correction per coordinate in units of the root mean square of d. One more, lag = tanh(.), measures s and y from
means of former theta and gradients, ``mean = now + lag * (mean - now)``, which noise reaches less than the last ones.
Outputs of zero are BFGS itself; where the gain is near 0 it is heavy ball. A low-rank memory keeps the last pairs,
scaled with sqrt(w rho), and reads with the two-loop recursion of L-BFGS (algorithm 7.4 of that book), whose M_0 is
gamma I with gamma = s^T y / y^T y of the newest pair.

Vectors are ``[num_problems, n]``. Gradients, steps in pairs and what the controller is told count as constants in the
meta-gradient, which goes through the outputs, through M and through the averages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.products import product
from .memory import DenseMemory, LowRankMemory, Memory

OUTPUTS = 6  # of the controller: correction, gain, momentum, gate, lag, rate
SCALE = 0.25  # of all but the first, on which much depends: smaller steps of training for them than for the correction
INPUTS = 9  # beside the gradient
# What the memory keeps for the next step: the gradient to measure y from, theta as seen from there, the last step.
READS = 3


@dataclass(frozen=True)
class Safeguards:
    """What stands in for a line search.

    Attributes:
        first_step: without any pair to go by d is cut to this 1-norm, as torch.optim.LBFGS does; None: it is not.
        curvature: pairs with s^T y not above this are not written.
        growth: d, and the step, are cut to so many times the norm of the last step; None: they are not.
    """

    first_step: float | None
    curvature: float
    growth: float | None


def inputs(grad: Tensor, memory: Memory) -> Tensor:
    """What the controller sees beside the gradient ``[num_problems, n]``: ``[INPUTS, num_problems, n]``, all without a
    scale but for two logarithms. By coordinate: the direction that the memory has for the gradient, the last step and
    the gradient, over their root mean squares. By problem: how well s and y, d and -g agree, and the logarithms."""
    with torch.no_grad():
        grad = _finite(grad)
        before, s, last = memory.reads
        y = grad - before
        direction = -_read(memory, grad)
        sizes = [_rms(x) for x in (grad, before, last, direction)]
        logs = [torch.log10(size + 1e-30) for size in sizes]
        each = [x / (size + 1e-30) for x, size in ((direction, sizes[3]), (last, sizes[2]), (grad, sizes[0]))]
        whole = [
            _cosine(s, y),
            _cosine(direction, -grad),
            (logs[0] - logs[1]).clamp(-2.0, 2.0),
            (logs[3] - logs[2]).clamp(-2.0, 2.0),
            0.2 * logs[0].clamp(-10.0, 10.0),
            0.2 * logs[3].clamp(-10.0, 10.0),
        ]
        return torch.stack([*each, *(x.expand_as(grad) for x in whole)])


def move(out: Tensor, grad: Tensor, memory: Memory, safe: Safeguards, lr: float = 1.0) -> tuple[Tensor, Memory]:
    """The update ``[num_problems, n]`` for the controller's outputs ``[OUTPUTS, num_problems, n]`` and the gradient,
    and the memory with the last pair written to it, at its theta: :func:`remember` adds the step from there.

    lr: what the update will be multiplied by; it is the step that has its bound in the last step.

    What is not finite in the gradient counts as zero for the memory; what is not finite in an output reaches the update
    of its own coordinate only.
    """
    finite, growth = _finite(grad), None if safe.growth is None or lr == 0.0 else safe.growth / abs(lr)
    gain, momentum, gate, lag, rate = (SCALE * _mean(head) for head in out[1:])
    before, s, last = memory.reads
    y = finite.detach() - before
    written = _write(memory, s, y, 2.0 * torch.sigmoid(gate), safe.curvature)
    lag = torch.where((last == 0).all(1, keepdim=True), 0.0, torch.tanh(lag))  # at first there is no former gradient
    written.reads = torch.stack([finite.detach() - lag * y, lag * s, last])
    direction = -_read(written, finite)
    empty = _is_empty(written)
    direction = torch.where(empty, _shortened(-finite, safe.first_step), direction)
    direction = _bounded(direction, last, growth)
    correction = out[0] * _rms(direction.detach())
    update = torch.exp(gain) * direction + torch.tanh(momentum) * last - rate * finite + correction
    return _bounded(update, last, growth), written


def remember(memory: Memory, step: Tensor) -> Memory:
    """The memory from :func:`move` after the step ``[num_problems, n]`` that was taken in the end."""
    step = _finite(step)
    before, s, _ = memory.reads
    reads = torch.stack([before, s + step.detach(), step])
    if isinstance(memory, DenseMemory):
        return DenseMemory(memory.matrix, reads, memory.initial)
    assert isinstance(memory, LowRankMemory)
    return LowRankMemory(memory.left, memory.right, memory.written, reads, memory.initial)


def _write(memory: Memory, s: Tensor, y: Tensor, gate: Tensor, curvature: float) -> Memory:
    inner = _dot(s, y)
    taken = inner > curvature  # not if it is NaN
    rho = gate / torch.where(taken, inner, 1.0)
    if isinstance(memory, LowRankMemory):
        root = rho.sqrt()
        # Shifted, not a ring: of problems side by side some may skip a pair that others take.
        left, right = (
            torch.where(taken.unsqueeze(2), torch.cat([rows[:, 1:], (root * x).unsqueeze(1)], dim=1), rows)
            for rows, x in ((memory.left, s), (memory.right, y))
        )
        return LowRankMemory(left, right, memory.written + 1, memory.reads, memory.initial)
    assert isinstance(memory, DenseMemory)
    rho = torch.where(taken, rho, 0.0)
    matrix = memory.matrix
    if memory.initial == "zero":  # no pair yet: M = gamma I
        gamma = torch.where(taken & (_trace(matrix) == 0), inner / _dot(y, y).clamp_min(1e-30), 0.0)
        matrix = torch.diagonal_scatter(matrix, matrix.diagonal(dim1=1, dim2=2) + gamma, 0, 1, 2)
    u = product(matrix, y.unsqueeze(2)).squeeze(2)
    a = torch.stack([s, u, s], dim=2)
    b = torch.stack([-rho * u, -rho * s, (rho + rho.square() * _dot(y, u)) * s], dim=1)
    return DenseMemory(product(a, b, onto=matrix), memory.reads, memory.initial)


def _read(memory: Memory, r: Tensor) -> Tensor:
    if isinstance(memory, DenseMemory):
        return product(memory.matrix, r.unsqueeze(2)).squeeze(2)
    assert isinstance(memory, LowRankMemory)
    return two_loops(memory.left, memory.right, r)


def two_loops(left: Tensor, right: Tensor, r: Tensor) -> Tensor:
    """``M r`` of L-BFGS for the pairs sqrt(w rho) s and sqrt(w rho) y, both ``[num_problems, m, n]``, the newest last;
    pairs of zeros count for nothing. Without any, zero."""
    steps, changes = left.split(1, dim=1), right.split(1, dim=1)  # [num_problems, 1, n]
    q, alphas = r.unsqueeze(2), []
    for s, y in zip(reversed(steps), reversed(changes)):
        alphas.append(product(s, q))
        q = product(y.mT, -alphas[-1], onto=q)
    newest = _dot(right[:, -1], right[:, -1])
    q = q * (_dot(left[:, -1], right[:, -1]) / torch.where(newest > 0, newest, 1.0)).unsqueeze(2)
    for s, y, alpha in zip(steps, changes, reversed(alphas)):
        q = product(s.mT, alpha - product(y, q), onto=q)
    return q.squeeze(2)


def _is_empty(memory: Memory) -> Tensor:
    """Which problems have no curvature yet, ``[num_problems, 1]``."""
    if isinstance(memory, LowRankMemory):
        return (memory.left[:, -1] == 0).all(1, keepdim=True)
    assert isinstance(memory, DenseMemory)
    if memory.initial == "zero":
        return _trace(memory.matrix) == 0
    return (memory.reads[2] == 0).all(1, keepdim=True)  # the first step


def _shortened(direction: Tensor, bound: float | None) -> Tensor:
    if bound is None:
        return direction
    return direction * (bound / direction.abs().sum(1, keepdim=True).clamp_min(1e-30)).clamp(max=1.0)


def _bounded(update: Tensor, last: Tensor, growth: float | None) -> Tensor:
    """Cut to ``growth`` times the norm of the last step, by a factor that counts as a constant."""
    if growth is None:
        return update
    former, now = (_finite(x.detach()).norm(dim=1, keepdim=True) for x in (last, update))
    return update * torch.where(former > 0, growth * former / (now + 1e-30), 1.0).clamp(max=1.0)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1, keepdim=True).sqrt()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return _dot(a, b) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True) + 1e-30)


def _mean(x: Tensor) -> Tensor:
    """Over the coordinates of a problem, of what is finite there."""
    finite = x.isfinite()
    return torch.where(finite, x, 0.0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp_min(1)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)
