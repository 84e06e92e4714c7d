"""What a network with normalized inputs is told of a tensor in every step: its age, its inputs, and ``nominal``.

The inputs are those of VeLO (Metz et al. 2022) and Celo where they are known to matter: the progress t / T and the time
on several scales, the size of the parameters, and what kind of tensor they are. All are constants in the meta-gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import normalized, operators
from ..kernels.config import Config

UNKNOWN_PROGRESS = -1.0
"""t / T where the number of steps was not given: no progress that is known, and a value that training can show."""

TensorFeatures = Callable[[Tensor, int, int | None], tuple[Any, Any]]
"""``(param, age, total_steps) -> (tensor_inputs, nominal)``: so many numbers as the network has tensor_inputs, or None
if it has none; and five numbers, or None for the default."""


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


def common_of(
    params: Sequence[Tensor],
    ages: Sequence[int],
    config: Config,
    total_steps: int | None,
    tensor_features: TensorFeatures | None,
) -> Common:
    """What the kernels take of ``params`` in the step that makes them ``ages`` steps old.

    Args:
        tensor_features: what to ask for each of them; None for :func:`default_inputs` and the default of ``nominal``.

    Raises:
        ValueError, TypeError: what comes from it is not what the network takes.
    """
    if not params:
        return Common()
    device = params[0].device
    if tensor_features is None:
        if config.tensor_inputs not in (0, len(DEFAULT_INPUTS)):
            raise ValueError(
                f"tensor_features: expected a function for a network with tensor_inputs={config.tensor_inputs}; the "
                f"default gives {len(DEFAULT_INPUTS)}"
            )
        return Common(ages, default_inputs(params, ages, total_steps) if config.tensor_inputs else None)
    given = [tensor_features(param, age, total_steps) for param, age in zip(params, ages, strict=True)]
    inputs = nominal = None
    if config.tensor_inputs:
        inputs = torch.stack([_row("tensor_inputs", x, config.tensor_inputs, device) for x, _ in given])
    if any(each is not None for _, each in given):
        rows = [normalized.NOMINAL if each is None else each for _, each in given]
        nominal = torch.stack([_row("nominal", row, len(normalized.NOMINAL), device) for row in rows])
    return Common(ages, inputs, nominal)


def _row(name: str, value: Any, size: int, device: torch.device) -> Tensor:
    row = torch.as_tensor(value if value is not None else [], dtype=torch.float32, device=device).detach()
    if row.shape != (size,):
        raise ValueError(f"tensor_features: expected {size} numbers as {name}, got shape {tuple(row.shape)}")
    return row


DEFAULT_INPUTS = (
    "t / T",
    "tanh(t / 100 - 1)",
    "tanh(t / 1000 - 1)",
    "ln(1 + t) / ln 1e4",
    "ln(RMS + 1e-6) / 3",
    "one-dimensional",
    "ln(fan in) / ln 1024",
)


def default_inputs(params: Sequence[Tensor], ages: Sequence[int], total_steps: int | None) -> Tensor:
    """``[tensors, 7]``: :data:`DEFAULT_INPUTS` of tensors of one device, where t is the age of each, 1 in its first
    step; t / T is at most 1, and ``UNKNOWN_PROGRESS`` without ``total_steps``. The fan-in is the number of coordinates
    per entry of the first dimension, 1 of vectors and scalars."""
    rows = []
    for param, t in zip(params, ages, strict=True):
        vector = param.dim() < 2
        fan_in = 1 if vector else max(param.numel() // max(param.shape[0], 1), 1)
        rows.append(
            (
                UNKNOWN_PROGRESS if total_steps is None else min(t / total_steps, 1.0),
                math.tanh(t / 100 - 1),
                math.tanh(t / 1000 - 1),
                math.log1p(t) / math.log(1e4),
                0.0,
                float(vector),
                math.log(fan_in) / math.log(1024),
            )
        )
    inputs = torch.tensor(rows, dtype=torch.float32, device=params[0].device)
    inputs[:, 4] = (operators.mean_squares(params).sqrt() + 1e-6).log() / 3
    return inputs
