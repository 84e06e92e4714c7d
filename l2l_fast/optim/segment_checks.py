"""What a segment refuses: networks that cannot be recorded or trained, and arguments that do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.state import State
from ..networks.lstm import CoordinatewiseLSTM

if TYPE_CHECKING:
    from .joint import Reduce
    from .segment_sampling import Sampling


def check_recordable(
    name: str,
    network: CoordinatewiseLSTM,
    reduce: Reduce | None,
    sampling: Sampling | None = None,
    state_dtype: torch.dtype = torch.float32,
    precision: str = "float32",
) -> None:
    """Raise NotImplementedError, with ``name`` in front, unless the steps of ``network`` can be back-propagated;
    ValueError for another ``precision`` than float32."""
    if precision != "float32":
        raise ValueError(
            f"{name}: meta-training needs precision='float32', got {precision!r}: the way back is computed in float32 "
            "and would not be the derivative of such steps"
        )
    if state_dtype is not torch.float32:
        raise NotImplementedError(
            f"{name}: meta-training needs state_dtype='float32', got {str(state_dtype)[6:]!r}: what rounding does to a "
            "state has no derivative"
        )
    if network.orthogonal:
        raise NotImplementedError(
            f"{name}: a network that orthogonalizes its updates has no backward of segments; it is trained by "
            'evolution strategies (estimator="evolution")'
        )
    if network.has_memory or network.num_outputs > 1:
        raise NotImplementedError(
            f"{name}: a network with memory or several outputs is unrolled in autograd, not in segments"
        )
    if network.communicates and reduce is not None:
        raise NotImplementedError(f"{name}: not with coordinates sharded over a process_group, only with DTensors")
    if network.communicates and sampling is not None:
        raise NotImplementedError(f"{name}: coordinates that communicate cannot be sampled")


def check_trainable(moved: Iterable[CoordinatewiseLSTM], networks: Iterable[CoordinatewiseLSTM]) -> None:
    """Raise unless one of the ``networks`` that ``moved`` something in the segment can have a gradient: that of the
    others is zero, and no meta-gradient at all looks like one that was forgotten."""
    parameters = [parameter for network in moved for parameter in network.parameters()]
    if not any(parameter.requires_grad for parameter in parameters):
        if any(parameter.requires_grad for network in networks for parameter in network.parameters()):
            raise ValueError(
                "network: only parameters of a frozen network moved in the segment (requires_grad=False), none of one "
                "that can be trained: had they no gradients?"
            )
        raise ValueError(
            "network: none of its parameters requires grad, so there is nothing to train; call requires_grad_()"
        )
    if all(parameter.is_inference() for parameter in parameters if parameter.requires_grad):
        raise ValueError(
            "network: its parameters were made under torch.inference_mode() and cannot have gradients; load or copy "
            "it outside"
        )


def check_weights(weights: Sequence[float] | Tensor | None, steps: int) -> list[float]:
    """The weights of the losses after each of the recorded ``steps``; TypeError or ValueError if they are not that."""
    if weights is None:
        return [1.0] * steps
    if isinstance(weights, Tensor):
        if weights.dim() != 1 or weights.is_complex():
            raise ValueError(f"weights: expected a real tensor of shape ({steps},), got {tuple(weights.shape)}")
        weights = weights.tolist()
    if isinstance(weights, (str, bytes)):
        raise TypeError("weights: expected a sequence of numbers or a tensor, got a string")
    try:
        values = [float(value) for value in weights]
    except (TypeError, ValueError) as error:
        raise TypeError(f"weights: expected a sequence of numbers or a tensor: {error}") from error
    if len(values) != steps:
        raise ValueError(f"weights: expected {steps} values (one per recorded step), got {len(values)}")
    return values


def check_end_states(
    grad_end_states: Mapping[Tensor, State] | None, states: Mapping[Tensor, State]
) -> Mapping[Tensor, State]:
    """The given gradients of end states; TypeError or ValueError unless they are like the ``states``."""
    if grad_end_states is None:
        return {}
    if not isinstance(grad_end_states, Mapping):
        raise TypeError(
            f"grad_end_states: expected a mapping from parameters to State, got {type(grad_end_states).__name__}"
        )
    for param, grad in grad_end_states.items():
        if not isinstance(grad, State):
            raise TypeError(f"grad_end_states: expected l2l_fast.State values, got {type(grad).__name__}")
        state = states.get(param)
        if state is None:
            raise ValueError("grad_end_states: a key is not a parameter with a state in this optimizer")
        if grad.data.shape != state.data.shape or grad.numel != state.numel or grad.dtype != state.dtype:
            raise ValueError(f"grad_end_states: expected a gradient like {state!r}, got {grad!r}")
        if grad.device != state.device:
            raise ValueError(f"grad_end_states: expected device {state.device}, got {grad.device}")
    return grad_end_states
