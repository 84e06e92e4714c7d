"""What a network with normalized inputs is told of a tensor in every step: its age, its inputs, and ``nominal``.

The inputs are those that VeLO (Metz et al. 2022) and Celo have shown to matter, progress and time, the size of the
parameters and of the gradient, the kind of tensor, and two that tell how a tensor fares: how far Adam's directions are
from noise, and whether the gradient still agrees with the step before (hypergradient descent, Baydin et al. 2018). All
are constants in the meta-gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import normalized
from ..networks.lstm import CoordinatewiseLSTM

TensorFeatures = Callable[[Tensor, int, int | None], tuple[Any, Any]]
"""``(param, age, total_steps) -> (tensor_inputs, nominal)``: so many numbers as the network has tensor_inputs, or None
if it has none; and five numbers, or None for what the network makes of its inputs."""

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


class Common(NamedTuple):
    """Of some tensors in one step: the ages of their averages, this step included, and float32 rows ``[tensors, ...]``.
    All empty for networks of other kinds."""

    ages: Sequence[int] = ()
    tensor_inputs: Tensor | None = None
    nominal: Tensor | None = None

    def of(self, places: Sequence[int]) -> Common:
        """Of some of the tensors."""
        rows = (None if each is None else each[list(places)] for each in self[1:])
        return Common([self.ages[place] for place in places], *rows) if self.ages else self


def needs_sums(network: CoordinatewiseLSTM, tensor_features: TensorFeatures | None) -> bool:
    """Whether the network is told the default inputs, which need sums over the coordinates of every tensor."""
    return tensor_features is None and network.config.tensor_inputs > 0


def common_of(
    params: Sequence[Tensor],
    ages: Sequence[int],
    network: CoordinatewiseLSTM,
    total_steps: int | None,
    tensor_features: TensorFeatures | None,
    sums: Tensor | None = None,
    alignments: Tensor | None = None,
) -> Common:
    """What the kernels take of ``params`` in the step that makes them ``ages`` steps old.

    Args:
        tensor_features: what to ask for each of them; None for :func:`default_inputs`, of sums and alignments.

    Raises:
        ValueError, TypeError: what comes from it is not what the network takes.
    """
    if not params:
        return Common()
    config = network.config
    if tensor_features is None:
        if config.tensor_inputs not in (0, len(DEFAULT_INPUTS)):
            raise ValueError(
                f"tensor_features: expected a function for a network with tensor_inputs={config.tensor_inputs}; the "
                f"default gives {len(DEFAULT_INPUTS)}"
            )
        if not config.tensor_inputs:
            return Common(ages)
        assert sums is not None and alignments is not None
        kinds = kinds_of([param.shape for param in params])
        own = default_inputs(kinds, ages, total_steps, sums, alignments)
        return Common(ages, own, network.nominal_of(own))
    device = params[0].device
    given = [tensor_features(param, age, total_steps) for param, age in zip(params, ages, strict=True)]
    inputs = nominal = None
    if config.tensor_inputs:
        inputs = torch.stack([_row("tensor_inputs", x, config.tensor_inputs, device) for x, _ in given])
        nominal = network.nominal_of(inputs)
    if any(each is not None for _, each in given):
        default = normalized.default_nominal(len(given), device) if nominal is None else nominal
        rows = [
            own if each is None else _row("nominal", each, len(normalized.NOMINAL), device)
            for (_, each), own in zip(given, default, strict=True)
        ]
        nominal = torch.stack(rows)
    return Common(ages, inputs, nominal)


def _row(name: str, value: Any, size: int, device: torch.device) -> Tensor:
    row = torch.as_tensor(value if value is not None else [], dtype=torch.float32, device=device).detach()
    if row.shape != (size,):
        raise ValueError(f"tensor_features: expected {size} numbers as {name}, got shape {tuple(row.shape)}")
    return row


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


def kinds_of(shapes: Iterable[Sequence[int]]) -> list[tuple[float, float, float]]:
    """What the shape of a tensor tells: whether it is a vector (or a scalar), whether not, and ln(fan in / 32) / 2. The
    fan-in is the number of coordinates per entry of the first dimension."""
    found = []
    for shape in shapes:
        if len(shape) < 2:
            found.append((1.0, 0.0, 0.0))
        else:
            found.append((0.0, 1.0, math.log(max(math.prod(shape[1:]), 1) / 32) / 2))
    return found


def default_inputs(
    kinds: Sequence[tuple[float, float, float]],
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
        kinds: of :func:`kinds_of`.
        sums: float64 ``[tensors, 6]``: those of :func:`l2l_fast.kernels.normalized.tensor_sums`, then the numbers of
            coordinates.
        alignments: float64 ``[tensors]``, this step included.
        optimizees: of so many, one after the other, with as many tensors each: "all tensors" are those of one.
    """
    timed = {age: _timed(age, total_steps) for age in set(ages)}
    rows = [
        (*timed[age], vector, vector * timed[age][1], fan, matrix, float(age == 1))
        for (vector, matrix, fan), age in zip(kinds, ages, strict=True)
    ]
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
