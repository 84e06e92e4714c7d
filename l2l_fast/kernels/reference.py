"""The learned optimizer in plain PyTorch: the oracle of the fused kernels, and the path of float64.

Nothing here is fast and nothing is clever: it is meant to be read beside Andrychowicz et al. 2016, "Learning to
learn by gradient descent by gradient descent" (section 2.1 for the coordinatewise LSTM, equation 3 for the meta-loss,
appendix A for the preprocessing, appendix D for global averaging cells; inputs and output of the kind "normalized" are
in :mod:`l2l_fast.kernels.normalized`). States are logical: one pair ``(h, c)`` per layer, each
``[numel, hidden_size]``, and the moving averages, where a network has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import normalized
from .config import FEATURES
from .products import product
from .renamed import takes_groups
from .state import Averages

if TYPE_CHECKING:
    from ..networks.lstm import CoordinatewiseLSTM
    from .config import Config
    from .state import LogicalState


class Weights(NamedTuple):
    """phi, taken apart: ``(weight_ih, weight_hh, bias)`` per layer, then the read-out, then the weights of the inputs
    per tensor."""

    layers: list[tuple[Tensor, Tensor, Tensor]]
    weight_out: Tensor
    bias_out: Tensor
    weight_tensor: Tensor


def input_size(preprocess: str) -> int:
    """Number of inputs of the first layer: two features for log_sign, the gradient itself for identity, five for
    normalized."""
    return FEATURES[preprocess]


def phi_size(config: Config) -> int:
    """Length P of the flat parameter vector phi."""
    hidden = config.hidden_size
    total = config.read_outs * (hidden + 1) + 4 * hidden * config.tensor_inputs
    for k in range(config.num_layers):
        inputs = config.inputs(k)
        total += 4 * hidden * (inputs + hidden + 1)
    return total


def unpack_phi(phi: Tensor, config: Config) -> Weights:
    """Split the flat vector phi ``[P]`` into views: weight_ih [4H, in], weight_hh [4H, H], bias [4H] per layer,
    weight_out [O, H], bias_out [O] (O = config.read_outs), weight_tensor [4H, tensor_inputs]. Gate rows are in the
    order i, f, g, o; the extra inputs' columns of the first weight_ih come after those of the preprocessed gradient."""
    hidden, position = config.hidden_size, 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        size = math.prod(shape)
        position += size
        return phi[position - size : position].view(shape)

    layers = []
    for k in range(config.num_layers):
        inputs = config.inputs(k)
        layers.append((take(4 * hidden, inputs), take(4 * hidden, hidden), take(4 * hidden)))
    read_out = take(config.read_outs, hidden), take(config.read_outs)
    return Weights(layers, *read_out, take(4 * hidden, config.tensor_inputs))


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


@takes_groups()
def global_average(
    h: Tensor, gac_cells: int, num_problems: int, add: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Outgoing activations ``h`` ``[numel, H]`` with those of the first ``gac_cells`` cells replaced by their mean over
    the coordinates of each of ``num_problems`` equal, consecutive parts (appendix D: LSTM+GAC). One that is not finite
    (its gradient was not) is left out of the mean and goes out itself, so that it stays in its own coordinate. ``add``
    adds up a tensor over the processes that hold coordinates, in autograd; None if all are here."""
    if gac_cells == 0 or (h.shape[0] == 0 and add is None):
        return h
    finite = h.isfinite()
    by_problem = (num_problems, h.shape[0] // num_problems)
    cells, counted = (x[:, :gac_cells].unflatten(0, by_problem) for x in (torch.where(finite, h, 0.0), finite))
    sums, counts = cells.sum(dim=1, keepdim=True), counted.sum(dim=1, keepdim=True)
    if add is not None:
        sums, counts = add(torch.stack([sums, counts.to(sums.dtype)]))
    mean = sums / counts.clamp_min(1)
    outgoing = torch.where(finite[:, :gac_cells], mean.expand_as(cells).flatten(0, 1), h[:, :gac_cells])
    return torch.cat([outgoing, h[:, gac_cells:]], dim=1)


@takes_groups()
def lstm_step(
    grad: Tensor,
    logical_state: Sequence[tuple[Tensor, Tensor]],
    phi: Tensor,
    config: Config,
    num_problems: int = 1,
    extra: Tensor | None = None,
    tensor_inputs: Tensor | None = None,
    nominal: Tensor | None = None,
    add: Callable[[Tensor], Tensor] | None = None,
    precision: str = "float32",
) -> tuple[Tensor, LogicalState]:
    """One step of the coordinatewise LSTM with the weights in the flat vector ``phi``.

    Args:
        grad: any shape, a real floating-point dtype.
        logical_state: one pair (h, c) per layer, each ``[numel, hidden_size]``; then, of a network with normalized
            inputs, its :class:`l2l_fast.kernels.state.Averages` before this step.
        phi: ``[P]``, in the order of :func:`unpack_phi`.
        config: hidden_size, num_layers, preprocess, p, output_scale, and those of :class:`l2l_fast.GacConfig`.
        num_problems: independent problems side by side: the averages of global averaging cells run over
            ``numel / num_problems`` consecutive coordinates each. Several tensors: see :func:`join`. Called ``groups``
            before 0.2, here and elsewhere, which is understood with a DeprecationWarning.
        extra: ``[extra_inputs, *grad.shape]``; None without extra inputs.
        tensor_inputs: ``[config.tensor_inputs]``, what all coordinates have in common, a constant; None if there are
            none. nominal: ``[5]``, see :mod:`l2l_fast.kernels.normalized`, a constant; None for its default, and for
            all other kinds.
        add: that of :func:`global_average`.
        precision: "float32": nothing is rounded. "bfloat16": what the products of a layer multiply is, inputs, h and
            weights, see :func:`rounded_weight`.

    Returns:
        The update, of grad's shape and dtype (with several outputs: all of them, ``[num_outputs, *grad.shape]``, the
        update first, in the dtype of the arithmetic), and the new logical state. The arithmetic is done in the dtype of
        grad or state, whichever is wider, and at least in float32.
    """
    numel, hidden = grad.numel(), config.hidden_size
    logical_state, averages = split_averages(logical_state, numel, config)
    if len(logical_state) != config.num_layers:
        raise ValueError(f"logical_state: expected {config.num_layers} (h, c) pairs, got {len(logical_state)}")
    for k, (h, c) in enumerate(logical_state):
        for name, part in (("h", h), ("c", c)):
            if tuple(part.shape) != (numel, hidden):
                raise ValueError(f"logical_state[{k}] {name}: expected {(numel, hidden)}, got {tuple(part.shape)}")
    if tuple(phi.shape) != (phi_size(config),):
        raise ValueError(f"phi: expected shape {(phi_size(config),)}, got {tuple(phi.shape)}")
    if num_problems < 1 or numel % num_problems != 0:
        raise ValueError(f"num_problems: expected a divisor of the {numel} coordinates, got {num_problems}")
    expected = (config.extra_inputs, *grad.shape) if config.extra_inputs else None
    if (None if extra is None else tuple(extra.shape)) != expected:
        raise ValueError(f"extra: expected shape {expected}, got {None if extra is None else tuple(extra.shape)}")
    check_common(config, num_problems, tensor_inputs, nominal)
    held = averages.rows if averages is not None else logical_state[0][0]
    dtype = torch.promote_types(torch.promote_types(grad.dtype, held.dtype), torch.float32)

    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
    rounds = precision == "bfloat16"
    weights = unpack_phi(phi.to(dtype), config)
    flat = grad.to(dtype).reshape(-1)
    if averages is None:
        x = preprocess_gradient(flat, config.preprocess, config.p)
    else:
        assert config.betas is not None
        averages = normalized.advance(flat, averages, config.betas)
        x = normalized.features(flat, averages, config.betas)
    if extra is not None:
        x = torch.cat([x, extra.to(dtype).reshape(extra.shape[0], numel).T], dim=1)
    new_state: LogicalState = []
    for k, ((weight_ih, weight_hh, bias), (h, c)) in enumerate(zip(weights.layers, logical_state, strict=True)):
        if k == 0 and tensor_inputs is not None:
            bias = bias + weights.weight_tensor @ tensor_inputs.detach().to(dtype)
        before = h.to(dtype)
        if rounds:
            x, before = (each.to(torch.bfloat16).to(dtype) for each in (x, before))
            weight_ih, weight_hh = rounded_weight(weight_ih), rounded_weight(weight_hh)
        gates = product(x, weight_ih.T) + product(before, weight_hh.T) + bias
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c.to(dtype) + torch.sigmoid(i) * torch.tanh(g)
        h = global_average(torch.sigmoid(o) * torch.tanh(c), config.gac_cells, num_problems, add)
        new_state.append((h, c))
        x = h
    # Without layers, nothing but the bias.
    outputs = product(x if config.num_layers else x[:, :0], weights.weight_out.T) + weights.bias_out
    if averages is not None:
        nominal = flat.new_tensor(normalized.NOMINAL) if nominal is None else nominal.detach()
        n = normalized.direction(flat, averages, config.betas or (), nominal)
        update = normalized.update(outputs, n, nominal, config.output_scale)
        return update.reshape(grad.shape).to(grad.dtype), [*new_state, averages]
    if config.num_outputs == 1:
        return (config.output_scale * outputs).reshape(grad.shape).to(grad.dtype), new_state
    update = config.output_scale * outputs[:, :1]
    return torch.cat([update, outputs[:, 1:]], dim=1).T.reshape(config.num_outputs, *grad.shape), new_state


def rounded_weight(weight: Tensor) -> Tensor:
    """A layer's weight ``[4H, in]`` as a step with bfloat16 products has it, in its dtype: the nearest bfloat16 (ties
    to even) of the weight times log2(e), for the gate g 2 log2(e), as kernels keep it in float32; divided by that
    again."""
    log2e = 1 / math.log(2)
    scale = torch.tensor([-log2e, -log2e, 2 * log2e, -log2e], dtype=torch.float32, device=weight.device)
    scale = scale.repeat_interleave(weight.shape[0] // 4).unsqueeze(1)
    return (weight.float() * scale).to(torch.bfloat16).to(weight.dtype) / scale.to(weight.dtype)


def split_averages(
    logical_state: Sequence[Any], numel: int, config: Config
) -> tuple[Sequence[tuple[Tensor, Tensor]], Averages | None]:
    """The pairs (h, c) of a logical state, and its moving averages if the network has them; ValueError if it should
    have them and has not, or the other way round."""
    found = logical_state[-1] if logical_state and isinstance(logical_state[-1], Averages) else None
    expected = (numel, config.averages) if config.averages else None
    got = None if found is None else tuple(found.rows.shape)
    if got != expected:
        raise ValueError(f"logical_state: expected averages of shape {expected} at its end, got {got}")
    return (logical_state, None) if found is None else (logical_state[:-1], found)


def check_common(config: Config, num_problems: int, tensor_inputs: Tensor | None, nominal: Tensor | None) -> None:
    """ValueError unless what all coordinates of a tensor have in common is there, where the network takes it, and of
    its shape."""
    if config.averages and num_problems != 1:
        raise ValueError(
            f'num_problems: expected 1 for preprocess="normalized", whose tensors have one vector each, got '
            f"{num_problems}; give every problem tensors of its own"
        )
    for name, value, size in (
        ("tensor_inputs", tensor_inputs, config.tensor_inputs),
        ("nominal", nominal, len(normalized.NOMINAL) if config.averages else 0),
    ):
        expected = (size,) if size and not (name == "nominal" and value is None) else None
        got = None if value is None else tuple(value.shape)
        if got != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {got}")


@takes_groups()
def step(
    net: CoordinatewiseLSTM,
    grad: Tensor,
    logical_state: Sequence[tuple[Tensor, Tensor]],
    num_problems: int = 1,
    extra: Tensor | None = None,
    tensor_inputs: Tensor | None = None,
    nominal: Tensor | None = None,
    *,
    precision: str = "float32",
) -> tuple[Tensor, LogicalState]:
    """``update, new_logical_state = phi(grad, logical_state)`` (equation 1 and section 2.1), differentiable in
    everything, any number of times. Arguments and results as :func:`lstm_step`, with the weights of ``net``."""
    options = (num_problems, extra, tensor_inputs, nominal)
    return lstm_step(grad, logical_state, net.phi(), net.config, *options, precision=precision)


@takes_groups()
def join(parts: Sequence[Tensor], num_problems: int = 1) -> Tensor:
    """Several tensors' coordinates ``[numel_k, ...]`` as those of one tensor, in which each of the ``num_problems``
    problems is consecutive again: a network whose coordinates communicate sees all tensors of an optimizee at once."""
    if len(parts) == 1:
        return parts[0]
    split = [part.reshape(num_problems, part.shape[0] // num_problems, *part.shape[1:]) for part in parts]
    return torch.cat(split, dim=1).flatten(0, 1)


@takes_groups()
def separate(joined: Tensor, numels: Sequence[int], num_problems: int = 1) -> list[Tensor]:
    """The inverse of :func:`join`: one tensor ``[numel_k, ...]`` per entry of ``numels``."""
    if len(numels) == 1:
        return [joined]
    split = joined.view(num_problems, -1, *joined.shape[1:]).split([numel // num_problems for numel in numels], dim=1)
    return [part.flatten(0, 1) for part in split]


@takes_groups()
def join_states(states: Sequence[LogicalState], num_problems: int = 1) -> LogicalState:
    """:func:`join` for logical states. Averages are of one age: a network that has them steps every tensor alone."""
    if len(states) == 1:
        return states[0]
    return [
        (join([state[k][0] for state in states], num_problems), join([state[k][1] for state in states], num_problems))
        for k in range(len(states[0]))
    ]


@takes_groups()
def separate_states(joined: LogicalState, numels: Sequence[int], num_problems: int = 1) -> list[LogicalState]:
    """:func:`separate` for a logical state."""
    if len(numels) == 1:
        return [joined]
    parts = [(separate(h, numels, num_problems), separate(c, numels, num_problems)) for h, c in joined]
    return [[(h[k], c[k]) for h, c in parts] for k in range(len(numels))]


@takes_groups()
def segment_backward(
    start_states: Sequence[LogicalState],
    grads: Sequence[Sequence[Tensor | None]],
    loss_weights: Sequence[float],
    lrs: Sequence[float],
    decays: Sequence[float],
    phi: Tensor,
    config: Config,
    grad_end_states: Sequence[LogicalState] | None = None,
    num_problems: int = 1,
    tensor_inputs: Tensor | None = None,
    nominal: Tensor | None = None,
    add: Callable[[Tensor], Tensor] | None = None,
    grad_end_params: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, list[LogicalState]]:
    """Gradient of the meta-loss of one unrolled segment (equation 3 with the gradients of f held constant).

    For the trajectory ``theta[t+1] = decays[t] * theta[t] + lrs[t] * u[t]``, ``u[t], state[t+1] = phi(g[t], state[t])``
    the meta-loss ``sum_{s=1..T} w_s f(theta_s)`` reaches the parameters as ``A_T = w_T g_T`` and
    ``A_t = w_t g_t + decays[t] * A_{t+1}``, and the updates as ``dL/du_t = lrs[t] * A_{t+1}``. What remains is the
    chain of LSTM steps, left to autograd. Global averaging cells average over all tensors.

    Args:
        start_states: one logical state per tensor, at the start of the segment.
        grads: T + 1 lists of one gradient per tensor: g_0 ... g_T. A tensor with None did not move in that step, and
            its gradient counts as zero.
        loss_weights: w_1 ... w_T.
        lrs, decays: T values each.
        phi: ``[P]`` flat parameters. config: as in :func:`lstm_step`, without extra inputs and with one output.
        grad_end_states: optional, one logical state per tensor: dL/d(state after step T) from elsewhere.
        num_problems: as in :func:`lstm_step`.
        tensor_inputs, nominal: those of :func:`lstm_step`, ``[T, tensors, ...]``.
        add: that of :func:`global_average`. What is returned is then the part of it that goes through the coordinates
            given here.
        grad_end_params: optional, per tensor dL/d theta_T from elsewhere, which is added to A_T, or None; what leaves
            the segment at its start is :func:`segment_start_params`.

    Returns:
        ``dL/dphi`` ``[P]`` and, per tensor, dL/d(start state) as a logical state; both in phi's / the states' dtype.
        Moving averages are constants: their gradients, given or returned, are zero.
    """
    steps = len(grads) - 1
    if steps < 1:
        raise ValueError(f"grads: expected at least 2 entries (g_0 and g_1), got {len(grads)}")
    for name, values in (("loss_weights", loss_weights), ("lrs", lrs), ("decays", decays)):
        if len(values) != steps:
            raise ValueError(f"{name}: expected {steps} values, got {len(values)}")
    if config.extra_inputs or config.num_outputs != 1:
        raise ValueError(f"config: expected no extra inputs and one output, got {config}")
    ends = [None] * len(start_states) if grad_end_params is None else grad_end_params
    phi = phi.detach().requires_grad_()
    pairs = [state[: config.num_layers] for state in start_states]
    leaves = [[part.detach().requires_grad_() for pair in state for part in pair] for state in pairs]
    outputs: list[Tensor] = []
    upstream: list[Tensor] = []
    with torch.enable_grad():
        states: list[LogicalState] = [
            [*zip(parts[::2], parts[1::2], strict=True), *start[config.num_layers :]]
            for parts, start in zip(leaves, start_states, strict=True)
        ]
        for t in range(steps):
            moving = [k for k, g in enumerate(grads[t]) if g is not None]
            # Without global averages a tensor's steps depend on no other tensor's.
            for together in [moving] if config.gac_cells and moving else [[k] for k in moving]:
                parts = [grads[t][k].detach().reshape(-1) for k in together]  # type: ignore[union-attr]
                numels = [part.numel() for part in parts]
                state = join_states([states[k] for k in together], num_problems)
                told, vector = (None if rows is None else rows[t, together[0]] for rows in (tensor_inputs, nominal))
                joined = join(parts, num_problems)
                update, state = lstm_step(joined, state, phi, config, num_problems, None, told, vector, add)
                outputs += separate(update, numels, num_problems)
                for k, new in zip(together, separate_states(state, numels, num_problems), strict=True):
                    upstream.append(_adjoint(k, t, grads, loss_weights, decays, ends).reshape(-1) * lrs[t])
                    states[k] = new
    if grad_end_states is not None:
        outputs += [part for state in states for pair in state[: config.num_layers] for part in pair]
        upstream += [part for state in grad_end_states for pair in state[: config.num_layers] for part in pair]
    flat = [leaf for parts in leaves for leaf in parts]
    grad_phi, *grad_flat = torch.autograd.grad(
        outputs, [phi, *flat], upstream, allow_unused=True, materialize_grads=True
    )
    each = 2 * config.num_layers
    parts_of = [grad_flat[k * each : (k + 1) * each] for k in range(len(start_states))]
    return grad_phi, [
        [
            *zip(parts[::2], parts[1::2], strict=True),
            *(Averages(torch.zeros_like(rows), age) for rows, age in start[config.num_layers :]),
        ]
        for parts, start in zip(parts_of, start_states, strict=True)
    ]


def segment_start_params(
    grads: Sequence[Sequence[Tensor | None]],
    loss_weights: Sequence[float],
    decays: Sequence[float],
    grad_end_params: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """``A_0 = dL/d theta_0`` of every tensor of a segment, each of which has a gradient in some step; arguments as
    :func:`segment_backward` takes them. f(theta_0) is no part of the loss."""
    tensors = range(len(grads[0]))
    ends = [None] * len(tensors) if grad_end_params is None else grad_end_params
    factors = [1.0 if grads[0][k] is None else decays[0] for k in tensors]
    return [factors[k] * _adjoint(k, 0, grads, loss_weights, decays, ends) for k in tensors]


def _adjoint(
    k: int,
    t: int,
    grads: Sequence[Sequence[Tensor | None]],
    loss_weights: Sequence[float],
    decays: Sequence[float],
    ends: Sequence[Tensor | None],
) -> Tensor:
    """A_{t+1} of tensor k: its w-weighted later gradients and what comes from beyond, each times the decays between."""
    moved = next(g for step_grads in grads if (g := step_grads[k]) is not None)
    adjoint, factor = torch.zeros_like(moved), 1.0
    for s in range(t + 1, len(grads)):
        g = grads[s][k]
        if g is not None:
            adjoint = adjoint + factor * loss_weights[s - 1] * g.detach()
            factor *= decays[s] if s < len(decays) else 1.0
    end = ends[k]
    return adjoint if end is None else adjoint + factor * end.detach().reshape(adjoint.shape)
