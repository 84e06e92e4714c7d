"""What a network with normalized inputs is told of a tensor in every step: its age, its inputs, and ``nominal``. The
default inputs are those of :mod:`l2l_fast.kernels.tensor_inputs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import normalized, operators
from ..kernels.tensor_inputs import DEFAULT_INPUTS, fan_ins_of
from ..networks import effective
from ..networks.lstm import CoordinatewiseLSTM

TensorFeatures = Callable[[Tensor, int, int | None], tuple[Any, Any]]
"""``(param, age, total_steps) -> (tensor_inputs, nominal)``: so many numbers as the network has tensor_inputs, or None
if it has none; and five numbers, or None for what the network makes of its inputs."""


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
    alignments: Sequence[Tensor] = (),
) -> tuple[Common, Sequence[Tensor]]:
    """What the kernels take of ``params`` in the step that makes them ``ages`` steps old, and their alignments then.

    Args:
        tensor_features: what to ask for each of them; None for the default inputs.
        sums, alignments: what these are made of, see :func:`l2l_fast.kernels.operators.tensor_inputs`.

    Raises:
        ValueError, TypeError: what comes from it is not what the network takes.
    """
    if not params:
        return Common(), ()
    config = network.config
    if tensor_features is None:
        if config.tensor_inputs not in (0, len(DEFAULT_INPUTS)):
            raise ValueError(
                f"tensor_features: expected a function for a network with tensor_inputs={config.tensor_inputs}; the "
                f"default gives {len(DEFAULT_INPUTS)}"
            )
        if not config.tensor_inputs:
            return Common(ages), ()
        assert sums is not None
        fan_ins = fan_ins_of(param.shape for param in params)
        weight = effective.weight(network, "weight_nominal")
        inputs, nominal, after = operators.tensor_inputs(sums, alignments, fan_ins, ages, total_steps, weight)
        return Common(ages, inputs, nominal), after
    device = params[0].device
    given = [tensor_features(param, age, total_steps) for param, age in zip(params, ages, strict=True)]
    own_inputs: Tensor | None = None
    own_nominal: Tensor | None = None
    if config.tensor_inputs:
        own_inputs = torch.stack([_row("tensor_inputs", x, config.tensor_inputs, device) for x, _ in given])
        own_nominal = network.nominal_of(own_inputs)
    if any(each is not None for _, each in given):
        default = normalized.default_nominal(len(given), device) if own_nominal is None else own_nominal
        rows = [
            own if each is None else _row("nominal", each, len(normalized.NOMINAL), device)
            for (_, each), own in zip(given, default, strict=True)
        ]
        own_nominal = torch.stack(rows)
    return Common(ages, own_inputs, own_nominal), ()


def _row(name: str, value: Any, size: int, device: torch.device) -> Tensor:
    row = torch.as_tensor(value if value is not None else [], dtype=torch.float32, device=device).detach()
    if row.shape != (size,):
        raise ValueError(f"tensor_features: expected {size} numbers as {name}, got shape {tuple(row.shape)}")
    return row
