"""The learned optimizer in plain PyTorch: the oracle of the fused kernels, and the path of float64.

Nothing here is fast and nothing is clever: it is meant to be read beside Andrychowicz et al. 2016, "Learning to
learn by gradient descent by gradient descent" (section 2.1 for the coordinatewise LSTM, equation 3 for the meta-loss,
appendix A for the preprocessing). States are logical: one pair ``(h, c)`` per layer, each ``[numel, hidden_size]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .network import CoordinatewiseLSTM
    from .ops import Config
    from .state import LogicalState


class Weights(NamedTuple):
    """phi, taken apart: ``(weight_ih, weight_hh, bias)`` per layer, then the read-out."""

    layers: list[tuple[Tensor, Tensor, Tensor]]
    weight_out: Tensor
    bias_out: Tensor


def input_size(preprocess: str) -> int:
    """Number of inputs of the first layer: two features for log_sign, the gradient itself for identity."""
    return 2 if preprocess == "log_sign" else 1


def phi_size(config: Config) -> int:
    """Length P of the flat parameter vector phi."""
    hidden = config.hidden_size
    total = hidden + 1
    for k in range(config.num_layers):
        inputs = input_size(config.preprocess) if k == 0 else hidden
        total += 4 * hidden * (inputs + hidden + 1)
    return total


def unpack_phi(phi: Tensor, config: Config) -> Weights:
    """Split the flat vector phi ``[P]`` into views: weight_ih [4H, in], weight_hh [4H, H], bias [4H] per layer,
    weight_out [1, H], bias_out [1]. Gate rows are in the order i, f, g, o."""
    hidden, position = config.hidden_size, 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        size = math.prod(shape)
        position += size
        return phi[position - size : position].view(shape)

    layers = []
    for k in range(config.num_layers):
        inputs = input_size(config.preprocess) if k == 0 else hidden
        layers.append((take(4 * hidden, inputs), take(4 * hidden, hidden), take(4 * hidden)))
    return Weights(layers, take(1, hidden), take(1))


def preprocess_gradient(grad: Tensor, preprocess: str, p: float) -> Tensor:
    """Inputs of the first layer, ``[numel, 1 or 2]``, for a flat gradient ``[numel]`` (appendix A).

    log_sign: ``(log|grad| / p, sign(grad))`` where ``|grad| >= e^-p``, else ``(-1, e^p * grad)``.
    """
    if preprocess == "identity":
        return grad.unsqueeze(1)
    magnitude = grad.abs()
    large = magnitude >= math.exp(-p)
    # The branch not taken must be harmless too: log(0) would put a NaN into the derivative.
    log_feature = torch.where(large, torch.where(large, magnitude, 1.0).log() / p, -1.0)
    sign_feature = torch.where(large, grad.sign(), math.exp(p) * grad)
    return torch.stack([log_feature, sign_feature], dim=1)


def lstm_step(
    grad: Tensor, logical_state: Sequence[tuple[Tensor, Tensor]], phi: Tensor, config: Config
) -> tuple[Tensor, LogicalState]:
    """One step of the coordinatewise LSTM with the weights in the flat vector ``phi``.

    Args:
        grad: any shape, a real floating-point dtype.
        logical_state: one pair (h, c) per layer, each ``[numel, hidden_size]``.
        phi: ``[P]``, in the order of :func:`unpack_phi`.
        config: hidden_size, num_layers, preprocess, p, output_scale.

    Returns:
        The update, of grad's shape and dtype, and the new logical state in the dtype the arithmetic was done in: that
        of grad or state, whichever is wider, and at least float32.
    """
    numel, hidden = grad.numel(), config.hidden_size
    if len(logical_state) != config.num_layers:
        raise ValueError(f"logical_state: expected {config.num_layers} (h, c) pairs, got {len(logical_state)}")
    for k, (h, c) in enumerate(logical_state):
        for name, part in (("h", h), ("c", c)):
            if tuple(part.shape) != (numel, hidden):
                raise ValueError(f"logical_state[{k}] {name}: expected {(numel, hidden)}, got {tuple(part.shape)}")
    if tuple(phi.shape) != (phi_size(config),):
        raise ValueError(f"phi: expected shape {(phi_size(config),)}, got {tuple(phi.shape)}")
    dtype = torch.promote_types(torch.promote_types(grad.dtype, logical_state[0][0].dtype), torch.float32)

    weights = unpack_phi(phi.to(dtype), config)
    x = preprocess_gradient(grad.to(dtype).reshape(-1), config.preprocess, config.p)
    new_state = []
    for (weight_ih, weight_hh, bias), (h, c) in zip(weights.layers, logical_state, strict=True):
        gates = x @ weight_ih.T + h.to(dtype) @ weight_hh.T + bias
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c.to(dtype) + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        new_state.append((h, c))
        x = h
    update = config.output_scale * (x @ weights.weight_out.T + weights.bias_out)
    return update.reshape(grad.shape).to(grad.dtype), new_state


def step(
    net: CoordinatewiseLSTM, grad: Tensor, logical_state: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, LogicalState]:
    """``update, new_logical_state = phi(grad, logical_state)`` (equation 1 and section 2.1), differentiable in
    everything, any number of times. Shapes and dtypes as :func:`lstm_step`, with the weights of ``net``."""
    return lstm_step(grad, logical_state, net.phi(), net.config)


def segment_backward(
    start_states: Sequence[LogicalState],
    grads: Sequence[Sequence[Tensor]],
    loss_weights: Sequence[float],
    lrs: Sequence[float],
    decays: Sequence[float],
    phi: Tensor,
    config: Config,
    grad_end_states: Sequence[LogicalState] | None = None,
) -> tuple[Tensor, list[LogicalState]]:
    """Gradient of the meta-loss of one unrolled segment (equation 3 with the gradients of f held constant).

    For the trajectory ``theta[t+1] = decays[t] * theta[t] + lrs[t] * u[t]``, ``u[t], state[t+1] = phi(g[t], state[t])``
    the meta-loss ``sum_{s=1..T} w_s f(theta_s)`` reaches the parameters as ``A_T = w_T g_T`` and
    ``A_t = w_t g_t + decays[t] * A_{t+1}``, and the updates as ``dL/du_t = lrs[t] * A_{t+1}``. What remains is the
    chain of LSTM steps, left to autograd.

    Args:
        start_states: one logical state per tensor, at the start of the segment.
        grads: T + 1 lists of one gradient per tensor: g_0 ... g_T.
        loss_weights: w_1 ... w_T.
        lrs, decays: T values each.
        phi: ``[P]`` flat parameters. config: as in :func:`lstm_step`.
        grad_end_states: optional, one logical state per tensor: dL/d(state after step T) from elsewhere.

    Returns:
        ``dL/dphi`` ``[P]`` and, per tensor, dL/d(start state) as a logical state; both in phi's / the states' dtype.
    """
    steps = len(grads) - 1
    if steps < 1:
        raise ValueError(f"grads: expected at least 2 entries (g_0 and g_1), got {len(grads)}")
    for name, values in (("loss_weights", loss_weights), ("lrs", lrs), ("decays", decays)):
        if len(values) != steps:
            raise ValueError(f"{name}: expected {steps} values, got {len(values)}")
    phi = phi.detach().requires_grad_()
    grad_phi = torch.zeros_like(phi)
    grad_start_states = []
    for k, start_state in enumerate(start_states):
        g = [grads[t][k].detach() for t in range(steps + 1)]
        grad_updates: list[Tensor] = []
        adjoint = loss_weights[-1] * g[steps]
        for t in reversed(range(steps)):
            grad_updates.insert(0, lrs[t] * adjoint)
            if t > 0:
                adjoint = loss_weights[t - 1] * g[t] + decays[t] * adjoint
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for pair in start_state for part in pair]
            state: LogicalState = list(zip(leaves[::2], leaves[1::2], strict=True))
            updates = []
            for t in range(steps):
                update, state = lstm_step(g[t], state, phi, config)
                updates.append(update)
        outputs, upstream = updates, grad_updates
        if grad_end_states is not None:
            outputs = outputs + [part for pair in state for part in pair]
            upstream = upstream + [part for pair in grad_end_states[k] for part in pair]
        grad_phi_k, *grad_leaves = torch.autograd.grad(outputs, [phi, *leaves], upstream)
        grad_phi += grad_phi_k
        grad_start_states.append(list(zip(grad_leaves[::2], grad_leaves[1::2], strict=True)))
    return grad_phi, grad_start_states
