"""The default inputs of a tensor in every step, and its alignment, in plain PyTorch: the oracle of
``csrc/cpu/tensor_inputs.cpp``, and what serves other devices.

They are those that VeLO (Metz et al. 2022) and Celo have shown to matter, progress and time, the size of the parameters
and of the gradient, the kind of tensor, and two that tell how a tensor fares: how far Adam's directions are from noise,
and whether the gradient still agrees with the step before (hypergradient descent, Baydin et al. 2018). All are
constants in the meta-gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DEFAULT_INPUTS = (
    "1",
    "p - 1/2",
    "p^3 - 1/4",
    "exp(-t / 30)",
    "ln(1.02 - p) / 2",
    "ln(half a cosine from 1 to 0.002 along p) / 3",
    "ln(T / 1000) / 2",
    "vector",
    "vector (p - 1/2)",
    "matrix ln(fan in / 32) / 2",
    "matrix ln(RMS theta / 0.1) / 2",
    "vector ln(RMS theta / 0.1) / 3",
    "3 alignment",
    "ln(mean square of Adam's direction + 1e-4) / 4 + 1/2",
    "ln(RMS q / RMS q of all tensors) / 3",
)
_MEMORY = 0.9  # of the alignment


def progress(age: int, total_steps: int | None) -> tuple[float, float]:
    """p and T in the age-th step: (t - 1) / T, in [0, 1]. Where T is not known it is as if a quarter of the run were
    over, of 1,000 steps or more: no decay, and a T that grows with the run."""
    steps = max(1000.0, 4.0 * age) if total_steps is None else float(total_steps)
    return min((age - 1) / steps, 1.0), steps


def _timed(age: int, total_steps: int | None) -> list[float]:
    p, steps = progress(age, total_steps)
    cosine = math.log(0.998 * (1 + math.cos(math.pi * p)) / 2 + 0.002)
    of_age = [p**3 - 0.25, math.exp(-age / 30), math.log(1.02 - p) / 2, cosine / 3, math.log(steps / 1000) / 2]
    return [1.0, p - 0.5, *of_age]


def aligned(sums: Tensor, alignments: Tensor) -> Tensor:
    """The alignments ``[tensors]`` after a step of these ``sums``: a moving average of the cosine between the gradient
    and the direction, downhill, that Adam took in the step before. Negative while the way goes on."""
    cosine = -sums[:, 4] / (sums[:, 1].sqrt() * sums[:, 3].sqrt()).clamp_min(1e-290)
    return _MEMORY * alignments + (1 - _MEMORY) * cosine.clamp(-1.0, 1.0)


def fan_ins_of(shapes: Iterable[Sequence[int]]) -> list[int]:
    """What the shapes of tensors tell: the number of coordinates per entry of the first dimension, at least 1, and 0 of
    a vector or a scalar."""
    return [max(math.prod(shape[1:]), 1) if len(shape) > 1 else 0 for shape in shapes]


def _kind(fan_in: int, shifted: float) -> tuple[float, float, float, float]:
    """vector, vector (p - 1/2), ln(fan in / 32) / 2, matrix."""
    if fan_in:
        return 0.0, 0.0, math.log(fan_in / 32) / 2, 1.0
    return 1.0, shifted, 0.0, 0.0


def default_inputs(
    fan_ins: Sequence[int],
    ages: Sequence[int],
    total_steps: int | None,
    sums: Tensor,
    alignments: Tensor,
    optimizees: int = 1,
) -> Tensor:
    """``[tensors, 15]``, float32: :data:`DEFAULT_INPUTS` of tensors of one device, where t is the age of each, 1 in its
    first step, and p and T are its :func:`progress`. RMS theta / 0.1 + 1e-3 is clipped to e^-4 and e^4, the ratio of
    RMS q to e^-9 and e^9. Alignment is that of :func:`aligned`; Adam's direction is that of the step before, of mean
    square 1 in the first.

    Args:
        fan_ins: of :func:`fan_ins_of`.
        sums: float64 ``[tensors, 6]``, of :func:`l2l_fast.kernels.normalized.tensor_sums`.
        alignments: float64 ``[tensors]``, this step included.
        optimizees: of so many, one after the other, with as many tensors each: "all tensors" are those of one.
    """
    timed = {age: _timed(age, total_steps) for age in set(ages)}
    named = zip(fan_ins, ages, strict=True)
    rows = [(*timed[age], *_kind(fan_in, timed[age][1]), float(age == 1)) for fan_in, age in named]
    known = torch.tensor(rows, dtype=torch.float64, device=sums.device)
    vector, matrix, first = known[:, 7], known[:, 10], known[:, 11]
    numel = sums[:, 5].clamp_min(1.0)
    theta, _, q, adam = (sums[:, :4] / numel.unsqueeze(1)).unbind(1)
    size = (theta.sqrt() * 10 + 1e-3).log().clamp(-4.0, 4.0)
    all_q = sums[:, 2].view(optimizees, -1).sum(1) / numel.view(optimizees, -1).sum(1)
    ratio = (q + 1e-200).log().view(optimizees, -1) - (all_q + 1e-200).log().unsqueeze(1)
    found = [
        matrix * size / 2,
        vector * size / 3,
        3 * alignments,
        (torch.maximum(adam, first) + 1e-4).log() / 4 + 0.5,
        (ratio.flatten() / 2).clamp(-9.0, 9.0) / 3,
    ]
    return torch.cat([known[:, :10], torch.stack(found, dim=1)], dim=1).float()
