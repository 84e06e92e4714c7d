"""Updates of matrices with their singular values brought near one, in plain PyTorch: the oracle of
``csrc/cpu/orthogonalized.cpp``, and what serves float64 and other devices than the CPU.

The nearest matrix of orthogonal rows or columns is ``U V^T`` of a singular value decomposition. Muon (Jordan et al.
2024, "Muon: An optimizer for hidden layers in neural networks") takes a few steps of a Newton-Schulz iteration towards
it, with an odd polynomial of degree five in place of the cubic one: it lifts small singular values quickly, and leaves
all of them between about 0.7 and 1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import product

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LEAST_NORM = 1e-30
MOST_STEPS = 100


def check(updates: Tensor, steps: int) -> None:
    """TypeError or ValueError unless these are arguments of :func:`orthogonalized`."""
    if not isinstance(updates, Tensor):
        raise TypeError(f"updates: expected a tensor, got {type(updates).__name__}")
    if updates.layout is not torch.strided:
        raise TypeError(f"updates: expected a dense (strided) tensor, got layout {updates.layout}")
    if updates.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"updates: expected dtype float32 or float64, got {updates.dtype}")
    if updates.dim() != 3:
        raise ValueError(f"updates: expected shape [K, rows, cols], got {tuple(updates.shape)}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {steps!r}")
    if not 0 <= steps <= MOST_STEPS:
        raise ValueError(f"steps: expected 0..{MOST_STEPS}, got {steps}")


def orthogonalized(updates: Tensor, steps: int = 5) -> Tensor:
    """Each matrix U of a stack after ``steps`` steps ``X <- a X + (b A + c A^2) X``, ``A = X X^T`` (of a tall matrix,
    of its transpose), from ``U / max(|U|_F, 1e-30)``, where a, b, c are :data:`COEFFICIENTS`. Of full rank and not too
    badly conditioned, it has singular values between about 0.7 and 1.2 after five; a zero matrix stays zero.

    Args:
        updates: float32 or float64 ``[K, rows, cols]`` of any device. What is not finite counts as zero.
        steps: 0 ... 100.

    Returns:
        A tensor of the same shape and dtype, differentiable.

    Raises:
        TypeError, ValueError: another dtype, layout, shape or number of steps.
    """
    check(updates, steps)
    if updates.numel() == 0:
        return torch.empty_like(updates, memory_format=torch.contiguous_format)
    x = torch.where(updates.isfinite(), updates, 0.0)
    # Of numbers up to 1: their squares neither overflow nor vanish.
    x = x / x.detach().abs().amax(dim=(1, 2), keepdim=True).clamp_min(LEAST_NORM)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1.0)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = product(x, x.mT)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return (x.mT if tall else x).contiguous()
