"""A normalized network whose updates of matrices are, in part, orthogonalized: what a coordinate cannot know by itself.

Muon (Jordan et al. 2024) moves a matrix along the nearest orthogonal one to its momentum: all its singular values are
made alike, so that directions which few gradients point to move as far as the common ones. Here that is a second term
beside the coordinatewise one, with a gain of its own, learned as the first one's is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import normalized, operators
from ..kernels.orthogonal import orthogonalized
from ..kernels.renamed import takes_groups
from ..kernels.state import State
from ..kernels.tensor_inputs import DEFAULT_INPUTS
from . import effective, files
from .lstm import CoordinatewiseLSTM, is_transformed

RMS = 0.2
"""Root mean square of the orthogonal direction at gain 1: about what Adam's has (Liu et al. 2025, "Muon is scalable for
LLM training", section 2.2), so that one size of step suits both."""


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a tensor as a matrix, output units (the first dimension) by fan-in (all others); None for
    what is none: fewer than two dimensions, or one row or column, whose direction would be its own."""
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if min(rows, columns) > 1 else None


@files.known
class OrthogonalLSTM(CoordinatewiseLSTM):
    """A normalized :class:`CoordinatewiseLSTM` with inputs per tensor that adds to its update u of a matrix

        output_scale * exp(gain) * 0.2 sqrt(max(rows, columns)) * orthogonalized(u)

    where ``orthogonalized`` is the Newton-Schulz iteration of :func:`l2l_fast.kernels.orthogonal.orthogonalized`, which
    does not depend on the scale of u, and gain, within [-8, 3], is linear in the inputs of the tensor:
    ``weight_orthogonal`` [tensor_inputs], at first zero. A matrix is a tensor of two dimensions or more, the first by
    all others, with at least two rows and columns; others, and the moving averages of all, go on as without.

    Its steps need whole matrices: of a DTensor every process gathers the update first, and shards given by hand
    (``process_group``) are refused. It has no fused backward: it is trained by evolution strategies
    (:class:`l2l_fast.meta.Evolution`).

    Args:
        hidden_size, num_layers: of the LSTM beside the nominal update, by default none.
        output_scale, tensor_inputs, betas, device, dtype: as of a normalized :class:`CoordinatewiseLSTM`; at least one
            tensor input.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; the message names it.
    """

    orthogonal = True

    def __init__(
        self,
        hidden_size: int = 0,
        num_layers: int = 0,
        output_scale: float = 0.01,
        *,
        tensor_inputs: int = len(DEFAULT_INPUTS),
        betas: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        options: dict[str, Any] = {"tensor_inputs": tensor_inputs, "betas": betas, "device": device, "dtype": dtype}
        super().__init__(hidden_size, num_layers, "normalized", output_scale=output_scale, **options)
        if not self.tensor_inputs:
            raise ValueError("tensor_inputs: expected 1..16, which the gain of a matrix is made of, got 0")
        self.weight_orthogonal = nn.Parameter(torch.empty(self.tensor_inputs, device=device, dtype=dtype))
        self._names = (*self._names, "weight_orthogonal")
        self.reset_parameters()

    def options(self) -> dict[str, Any]:
        """The constructor's arguments and the type, JSON-able."""
        names = ("hidden_size", "num_layers", "output_scale", "tensor_inputs", "betas")
        config = self.config.asdict()
        return {"type": "OrthogonalLSTM", **{name: config[name] for name in names}}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As :meth:`CoordinatewiseLSTM.reset_parameters`; both gains begin at 1."""
        super().reset_parameters(generator)
        if "weight_orthogonal" in self._parameters:  # the constructor of the class above calls this before it is there
            nn.init.zeros_(self.weight_orthogonal)

    def beside_phi(self) -> list[Tensor]:
        """See :meth:`CoordinatewiseLSTM.beside_phi`."""
        return [*super().beside_phi(), effective.weight(self, "weight_orthogonal")]

    def orthogonal_gains(self, tensor_inputs: Tensor) -> Tensor:
        """``exp(gain)`` float64 ``[tensors]`` of tensors with these inputs ``[tensors, tensor_inputs]``; detached.

        Raises:
            ValueError: ``weight_orthogonal`` is no longer of its shape, or on another device.
        """
        weight = effective.weight(self, "weight_orthogonal")
        expected = (self.tensor_inputs,), tensor_inputs.device
        if (tuple(weight.shape), weight.device) != expected:
            found = f"{tuple(weight.shape)} on {weight.device}"
            raise ValueError(f"weight_orthogonal: expected shape {expected[0]} on {expected[1]}, got {found}")
        return gains_of(weight, tensor_inputs)

    @takes_groups(stacklevel=4)  # through torch's __call__
    def forward(
        self,
        grad: Tensor,
        state: State,
        num_problems: int = 1,
        extra: Tensor | None = None,
        tensor_inputs: Tensor | Sequence[float] | None = None,
        nominal: Tensor | Sequence[float] | None = None,
    ) -> tuple[Tensor, State]:
        """As :meth:`CoordinatewiseLSTM.forward`, for one tensor; ``grad`` has its shape. The orthogonal term is
        differentiable in u, and a constant in ``weight_orthogonal`` as the nominal term is in ``weight_nominal``."""
        dtype = grad.dtype if isinstance(grad, Tensor) else None
        wide = grad.float() if dtype in (torch.bfloat16, torch.float16) else grad  # to be rounded once, at the end
        update, state = super().forward(wide, state, num_problems, extra, tensor_inputs, nominal)
        shape = matrix_shape(grad.shape)
        if shape is not None:
            inputs = torch.as_tensor(tensor_inputs, dtype=torch.float64, device=grad.device)
            scale = scales_of(self.output_scale, self.orthogonal_gains(inputs.unsqueeze(0)), [shape])[0]
            differentiable = update.requires_grad or is_transformed(update)
            how = orthogonalized if differentiable else operators.orthogonalized  # which has no derivative
            direction = how(update.reshape(1, *shape)).view(grad.shape)
            update = update + scale.to(update.dtype) * direction
        return update.to(grad.dtype), state

    @classmethod
    def from_lstm_cells(cls, *args: Any, **kwargs: Any) -> Any:
        """Not of such a network: ValueError."""
        raise ValueError("tensor_inputs: torch.nn.LSTMCell has no inputs in common, and an OrthogonalLSTM needs some")


def gains_of(weight: Tensor, tensor_inputs: Tensor) -> Tensor:
    """``exp(clip(weight . inputs, -8, 3))``, float64 ``[...]``, for ``[..., tensor_inputs]`` of both; detached."""
    # Not a matrix product, whose order of summation may depend on threads and on the number of tensors.
    rows = (weight.detach().double() * tensor_inputs.detach().double()).sum(-1)
    return rows.clamp(*normalized.GAIN_BOUNDS).exp()


def scales_of(output_scale: float, gains: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """What orthogonal directions of matrices of these ``shapes`` are multiplied by, as gains ``[..., matrices]``."""
    sizes = [output_scale * RMS * math.sqrt(max(shape)) for shape in shapes]
    return gains * torch.tensor(sizes, dtype=torch.float64, device=gains.device)
