"""Networks of the kind "normalized": inputs without a scale, and an update that is Adam's where the head is zero.

The oracle of ``csrc/core/normalized.h``, in plain PyTorch; :mod:`l2l_fast.kernels.reference` has what lies between. Of
a coordinate's gradients g_1 ... g_t, with betas (b1, b2, b3, b4), the state keeps

    m1, m2 = sum_s (1 - b) b^(t-s) g_s               with b = b1, b2
    r1, r2 = sqrt(sum_s (1 - b) b^(t-s) g_s^2)       with b = b3, b4

The second moments are kept as their roots: the square of a gradient leaves the range of float32 above 1e19 and below
1e-19, its root mean square never does. A hat is the correction of Adam (Kingma & Ba 2015, algorithm 1): m / (1 - b^t)
and r / sqrt(1 - b^t). With q = max(r1^, 1e-30), which alone bounds the range of scales (eps 1e-60 beside v; 1e-8 beside
sqrt(v) or 1e-6 would break the invariance for gradients that do occur), the inputs of the first layer are

    g / q,  m1^ / q,  m2^ / q,  each clipped to [-5, 5];  the product of the latter two / 5;
    ln(q / max(r2^, 1e-30)), clipped to [-3, 3]

and of a gradient that was always zero all five are zero. m~ and g~ are those of RNNProp (Lv et al. 2017). The head has
two rows (a, o), and every tensor and step five numbers, ``nominal`` = (gain, mu, nu, lam, correction):

    n      = -[m1^ + mu (m2^ - m1^) + nu (g - m1^)] / (r2^ + 1e-8) * (r2^ / r1^)^lam,  clipped to [-20, 20]
    update = output_scale * (exp(clip(a + gain, -8, 3)) n + correction tanh(o))

with the ratio of the last input, clip included; n points downhill, as updates are added. So an update is at most
output_scale (20 e^3 + |correction|); n of Adam with its usual betas is at most 7.3. A nominal term times a bounded
gain, plus a bounded correction: STAR (Harrison et al. 2022). With a = o = 0 and the default ``NOMINAL`` it is
bias-corrected Adam with betas (b1, b4) and eps 1e-8.

Magnitudes above 2^125, infinite ones included, count as 2^125; a NaN stays a NaN in its own coordinate. Everything here
is made of gradients, which are constants in the meta-gradient: no derivative goes through it. It is computed in
float64, whatever the dtypes are: a beta of 0.999 that is rounded to float32 changes 1 - beta by a part in 10^5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .state import Averages

LARGEST = 2.0**125  # a gradient; its square root mean and what is made of it stay below float32's largest number
SMALLEST = 1e-30  # root mean square that gradients are divided by
FEATURE_BOUND, LOG_RATIO_BOUND, DIRECTION_BOUND = 5.0, 3.0, 20.0
GAIN_BOUNDS = (-8.0, 3.0)
EPS = 1e-8  # of Adam
NOMINAL = (0.0, 0.0, 0.0, 0.0, 0.5)
"""gain, mu, nu, lam, correction: what a tensor is given where nothing else is said."""
# Of gain (bounded with the head's), mu, nu and lam where they are learned: n stays near what Adam and its kin do.
NOMINAL_BOUNDS = ((-math.inf, math.inf), (-0.8, 1.0), (-0.8, 0.8), (-0.5, 1.0))


def default_nominal(tensors: int, device: torch.device) -> Tensor:
    """``NOMINAL`` for each, float32 ``[tensors, 5]``."""
    return torch.tensor(NOMINAL, dtype=torch.float32, device=device).expand(tensors, -1)


def nominal_of(weight: Tensor, inputs: Tensor) -> Tensor:
    """``nominal`` ``[..., 5]`` of tensors as a network with inputs per tensor makes it: gain, mu, nu and lam, each
    within its bounds, are linear in them, and correction is 0.5 exp(gain), gain in its bounds. float32, detached.

    Args:
        weight: ``[..., 4, tensor_inputs]``; where it is zero the result is ``NOMINAL``.
        inputs: ``[..., tensor_inputs]``.
    """
    # Not a matrix product, whose order of summation may depend on threads and on the number of tensors.
    rows = (weight.detach().double() * inputs.detach().double().unsqueeze(-2)).sum(-1)
    found = [row.clamp(low, high) for row, (low, high) in zip(rows.unbind(-1), NOMINAL_BOUNDS, strict=True)]
    # A step that shrinks must shrink as a whole.
    correction = NOMINAL[4] * found[0].clamp(*GAIN_BOUNDS).exp()
    return torch.stack([*found, correction], dim=-1).float()


def advance(grad: Tensor, averages: Averages, betas: Sequence[float]) -> Averages:
    """The moving averages after one more gradient ``[numel]``, in its dtype."""
    g, rows = _constant(grad).unsqueeze(1), averages.rows.detach().double()
    b = torch.tensor(betas, dtype=torch.float64, device=g.device)
    first = b[:2] * rows[:, :2] + (1 - b[:2]) * g
    root = (b[2:] * rows[:, 2:].square() + (1 - b[2:]) * g.square()).sqrt()
    return Averages(torch.cat([first, root], dim=1).to(grad.dtype), averages.age + 1)


def _constant(grad: Tensor) -> Tensor:
    return grad.detach().double().clamp(-LARGEST, LARGEST)


def _hats(averages: Averages, betas: Sequence[float]) -> tuple[Tensor, ...]:
    """m1^, m2^, r1^, r2^."""
    corrections = [1.0 / (1.0 - beta**averages.age) for beta in betas]
    factors = [*corrections[:2], *(math.sqrt(correction) for correction in corrections[2:])]
    return tuple(row * factor for row, factor in zip(averages.rows.double().unbind(1), factors, strict=True))


def _log_ratio(r1: Tensor, r2: Tensor) -> Tensor:
    bound = math.exp(LOG_RATIO_BOUND)
    return (r1.clamp_min(SMALLEST) / r2.clamp_min(SMALLEST)).clamp(1 / bound, bound).log()


def features(grad: Tensor, averages: Averages, betas: Sequence[float]) -> Tensor:
    """Inputs of the first layer ``[numel, 5]`` from a gradient ``[numel]`` and the averages that it is already in."""
    m1, m2, r1, r2 = _hats(averages, betas)
    q = r1.clamp_min(SMALLEST)
    x0, x1, x2 = ((value / q).clamp(-FEATURE_BOUND, FEATURE_BOUND) for value in (_constant(grad), m1, m2))
    return torch.stack([x0, x1, x2, x1 * x2 / FEATURE_BOUND, _log_ratio(r1, r2)], dim=1).to(grad.dtype)


def direction(grad: Tensor, averages: Averages, betas: Sequence[float], nominal: Tensor) -> Tensor:
    """n ``[numel]``, for ``nominal`` ``[5]``."""
    m1, m2, r1, r2 = _hats(averages, betas)
    _, mu, nu, lam, _ = nominal.double()
    u0, u1, u2 = (value / (r2 + EPS) for value in (_constant(grad), m1, m2))
    n = -(u1 + mu * (u2 - u1) + nu * (u0 - u1)) * torch.exp(-lam * _log_ratio(r1, r2))
    return n.clamp(-DIRECTION_BOUND, DIRECTION_BOUND).to(grad.dtype)


def tensor_sums(param: Tensor, grad: Tensor, averages: Averages, betas: Sequence[float]) -> Tensor:
    """Sums over the coordinates of a tensor before a step and, last, their number, ``[6]``, float64: of theta^2, g^2,
    q^2 with the gradient that the step is given in it, d^2 and g d, where d = m1^ / (r2^ + eps) is the direction,
    uphill, that Adam took in the step before; in the first step it is 0. ``averages`` are those before the step. What
    is not finite counts as 0: one bad coordinate must not reach the others through their tensor."""
    theta, g = (each.detach().reshape(-1).double() for each in (param, grad))
    d = q = torch.zeros_like(g)
    if averages.age:
        m1, _, _, r2 = _hats(averages, betas)
        d, q = m1 / (r2 + EPS), averages.rows[:, 2].double()
    products = torch.stack([theta * theta, g * g, q * q, d * d, g * d])
    products = torch.where(products.isfinite(), products, 0.0)
    # Of one length for all threads to share, on the CPU: its sums depend on how many there are.
    parts = products.split(1 << 14 if products.is_cpu else max(products.shape[1], 1), dim=1)
    sums = torch.stack([part.sum(1) for part in parts]).sum(0)
    rest = -math.expm1((averages.age + 1) * math.log(betas[2]))
    squares = (betas[2] * sums[2] + (1 - betas[2]) * sums[1]) / rest
    return torch.cat([sums[:2], squares.unsqueeze(0), sums[3:], sums.new_full((1,), param.numel())])


def update(read_out: Tensor, n: Tensor, nominal: Tensor, output_scale: float) -> Tensor:
    """The update ``[numel]`` from the head's rows ``[numel, 2]`` and the direction; differentiable in the former."""
    gain, _, _, _, correction = nominal.to(read_out.dtype)
    a, o = read_out.unbind(1)
    return output_scale * (torch.exp((a + gain).clamp(*GAIN_BOUNDS)) * n + correction * torch.tanh(o))
