"""The operators of networks whose coordinates communicate: Python signatures, fake kernels and autograd formulas.

They do what :mod:`l2l_fast.ops` does for the plain network, and take the eight numbers of
:class:`l2l_fast.GacConfig`. One step, over all coordinates of a group (appendix D of Andrychowicz et al. 2016): in
every layer the new h of the first ``gac_cells`` cells is replaced by its mean over the group, upward and in the new
state; one that is not finite stays what it is and out of the mean. Coordinate i of a tensor belongs to group
``i // (numel / groups)``; the padding of the state never counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import as_int
from .config import GacConfig
from .ops import _check_one_device, _require_dense, register, require_kernel
from .state import State


def check_groups(groups: Any, numel: int) -> int:
    """Raise TypeError or ValueError unless ``groups`` is a number of equal parts of ``numel`` coordinates."""
    number = as_int(groups)
    if number is None:
        raise TypeError(f"groups: expected an int >= 1, got {groups!r}")
    if number < 1 or numel % number != 0:
        raise ValueError(f"groups: expected a divisor of the {numel} coordinates, got {groups}")
    return number


def check_extra(extra: Tensor | None, extra_inputs: int, grad: Tensor) -> None:
    """Raise TypeError or ValueError unless ``extra`` holds ``extra_inputs`` numbers per coordinate of ``grad``."""
    if extra_inputs == 0:
        if extra is not None:
            raise ValueError("extra: expected None, the network has no extra inputs")
        return
    if not isinstance(extra, Tensor):
        raise TypeError(f"extra: expected a tensor for the {extra_inputs} extra inputs, got {type(extra).__name__}")
    if not extra.is_floating_point() or extra.layout is not torch.strided:
        raise TypeError(f"extra: expected a dense real floating-point tensor, got {extra.dtype}, {extra.layout}")
    if extra.shape != (extra_inputs, *grad.shape):
        raise ValueError(f"extra: expected shape {(extra_inputs, *grad.shape)}, got {tuple(extra.shape)}")
    if extra.device != grad.device:
        raise ValueError(f"extra: expected device {grad.device}, got {extra.device}")


def gac_step(
    grad: Tensor,
    extra: Tensor | None,
    state: Tensor,
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    gac_cells: int,
    extra_inputs: int,
    num_outputs: int,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Functional step of one tensor. Differentiable in grad, extra, state and phi.

    Args:
        grad: float32, bfloat16 or float16, any shape and strides.
        extra: float32 contiguous ``[extra_inputs, *grad.shape]``; None iff extra_inputs is 0.
        state: float32 ``[tiles, 2 * num_layers * hidden_size, 64]``, the layout of :class:`l2l_fast.State`.
        phi: float32 ``[P]``, the order of :func:`l2l_fast.reference.unpack_phi`.
        groups: independent problems, the leading dimension of grad's coordinates.

    Returns:
        float32 ``[num_outputs, *grad.shape]``, the update (output_scale included) first; and the new state.
    """
    _require_dense("grad", grad)
    if not grad.is_cpu:
        require_kernel("gac_step", grad.device)
    config = (hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs)
    return torch.ops.l2l_fast.gac_step(grad, extra, state, phi, *config, groups)


def gac_step_backward(
    grad_out: Tensor,
    grad_new_state: Tensor,
    grad: Tensor,
    extra: Tensor | None,
    state: Tensor,
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    gac_cells: int,
    extra_inputs: int,
    num_outputs: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of :func:`gac_step`, which recomputes the gates from the inputs of the step.

    Args:
        grad_out: float32 ``[num_outputs, *grad.shape]``. grad_new_state: as state. The rest: as :func:`gac_step`.

    Returns:
        Gradients with respect to grad (its shape and dtype), extra (``[extra_inputs, *grad.shape]``, empty without
        extra inputs), state and phi (float32).
    """
    config = (hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs)
    return torch.ops.l2l_fast.gac_step_backward(grad_out, grad_new_state, grad, extra, state, phi, *config, groups)


def gac_step_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    extra: Tensor | None,
    out: Tensor | None,
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    gac_cells: int,
    extra_inputs: int,
    num_outputs: int,
    lr: float,
    weight_decay: float,
    maximize: bool,
    record: Tensor | None,
    record_tiles: Sequence[int],
    groups: int,
    means: Tensor,
    sums: Tensor,
    first_phase: int,
    last_phase: int,
    check_only: bool = False,
) -> None:
    """In-place step of many tensors in one launch, the means over all of them; as :func:`l2l_fast.ops.lstm_step_`.

    Args:
        params, grads, states, phi, lr, weight_decay, maximize, record, record_tiles: as for ``lstm_step_``, and all
            other tensors are written, or read, in memory of their own too.
        extra: float32 contiguous ``[extra_inputs, N]``, N the coordinates of all tensors, tensor after tensor.
        out: float32 contiguous ``[num_outputs, N]``, written; may be None with one output.
        means: float32 contiguous ``[num_layers, groups, gac_cells]``, written: the means of every layer's new h.
        sums: float64 contiguous ``[2, groups, gac_cells]``, overwritten: of the last layer that was run, the sums of
            the finite activations, and how many they are.
        first_phase, last_phase: the whole step is 0 to num_layers + 1. Phase l < num_layers is layer l, up to its sums;
            the last phase is the read-out and the update of the parameters. A call that ends with last_phase <=
            num_layers leaves sums and counts of layer last_phase - 1 over the given coordinates in ``sums``; the
            caller adds those of other processes, sets ``means[last_phase - 1]`` to their quotients and calls again
            with first_phase = last_phase and the same arguments (``out`` is required then).
        check_only: as for ``lstm_step_``.
    """
    if torch.is_grad_enabled() and any(param.requires_grad for param in params):
        raise RuntimeError("gac_step_ writes to parameters that require grad: call it under torch.no_grad()")
    for grad in grads:
        _require_dense("grads", grad)
    if not phi.is_cpu:
        require_kernel("gac_step_", phi.device)
    config = (hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs)
    options = (lr, weight_decay, maximize, record, record_tiles, groups)
    phases = (means, sums, first_phase, last_phase, check_only)
    torch.ops.l2l_fast.gac_step_.default(params, grads, states, extra, out, phi, *config, *options, *phases)


def gac_segment_backward(
    start_states: list[Tensor],
    numels: Sequence[int],
    record_tiles: Sequence[int],
    records: list[Tensor],
    means: list[Tensor],
    loss_weights: Sequence[float],
    lrs: Sequence[float],
    decays: Sequence[float],
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    gac_cells: int,
    extra_inputs: int,
    num_outputs: int,
    groups: int,
    grad_end_states: list[Tensor],
    need_grad_start: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of ``sum_{s=1..T} w_s f(theta_s)`` with respect to phi, as :func:`l2l_fast.ops.lstm_segment_backward`.

    Args:
        means: T tensors, what :func:`gac_step_` wrote in the T steps.
        extra_inputs, num_outputs: only 0 and 1; a network with memory goes through the functional step.
        The rest: as for ``lstm_segment_backward``.
    """
    config = (hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs)
    return torch.ops.l2l_fast.gac_segment_backward(
        start_states,
        numels,
        record_tiles,
        records,
        means,
        loss_weights,
        lrs,
        decays,
        phi,
        *config,
        groups,
        grad_end_states,
        need_grad_start,
    )


# ---- fake kernels ----


def _fake_step(
    grad: Tensor, extra: Tensor | None, state: Tensor, phi: Tensor, *config_and_groups: Any
) -> tuple[Tensor, Tensor]:
    _check_one_device(phi, grad=grad, extra=extra, state=state)
    config = GacConfig(*config_and_groups[:-1])
    out = torch.empty((config.num_outputs, *grad.shape), dtype=torch.float32, device=grad.device)
    return out, torch.empty_like(state)


def _fake_step_backward(
    grad_out: Tensor,
    grad_new_state: Tensor,
    grad: Tensor,
    extra: Tensor | None,
    state: Tensor,
    phi: Tensor,
    *config_and_groups: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_one_device(phi, grad_out=grad_out, grad_new_state=grad_new_state, grad=grad, extra=extra, state=state)
    config = GacConfig(*config_and_groups[:-1])
    grad_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    grad_extra = torch.empty((config.extra_inputs, *grad.shape), dtype=torch.float32, device=grad.device)
    return grad_grad, grad_extra, torch.empty_like(state), torch.empty_like(phi)


def _fake_step_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    extra: Tensor | None,
    out: Tensor | None,
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    gac_cells: int,
    extra_inputs: int,
    num_outputs: int,
    lr: float,
    weight_decay: float,
    maximize: bool,
    record: Tensor | None,
    record_tiles: Sequence[int],
    groups: int,
    means: Tensor,
    sums: Tensor,
    first_phase: int,
    last_phase: int,
    check_only: bool = False,
) -> None:
    _check_one_device(phi, params=params, grads=grads, states=states, extra=extra, out=out)
    _check_one_device(phi, record=record, means=means, sums=sums)


def _fake_segment_backward(
    start_states: list[Tensor],
    numels: Sequence[int],
    record_tiles: Sequence[int],
    records: list[Tensor],
    means: list[Tensor],
    loss_weights: Sequence[float],
    lrs: Sequence[float],
    decays: Sequence[float],
    phi: Tensor,
    *options: Any,
) -> tuple[Tensor, list[Tensor]]:
    grad_end_states, need_grad_start = options[-2:]
    _check_one_device(phi, start_states=start_states, records=records, means=means, grad_end_states=grad_end_states)
    return torch.empty_like(phi), [torch.empty_like(s) for s in start_states] if need_grad_start else []


# ---- autograd formulas ----


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])  # grad, extra or None, state, phi
    ctx.options = inputs[4:]


def _step_vjp(ctx: Any, grad_out: Tensor, grad_new_state: Tensor) -> tuple[Any, ...]:
    grad_grad, grad_extra, grad_state, grad_phi = torch.ops.l2l_fast.gac_step_backward(
        grad_out.contiguous(), grad_new_state.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    extra = None if ctx.saved_tensors[1] is None else grad_extra
    return (grad_grad, extra, grad_state, grad_phi, *[None] * len(ctx.options))


def _save_step_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _step_backward_vjp(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
    # Second derivatives go through the reference, as those of the plain step: differentiate its product once more.
    create_graph = torch.is_grad_enabled()
    config, groups = GacConfig(*ctx.options[:-1]), ctx.options[-1]
    with torch.enable_grad():
        # Views, so that an input which depends on another one is not differentiated through it.
        saved = [
            x if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x in ctx.saved_tensors
        ]
        grad_out, grad_new_state, grad, extra, state, phi = saved
        logical = State(state, grad.numel(), config.hidden_size, config.num_layers).to_logical()
        out, new_logical = reference.lstm_step(grad, logical, phi, config, groups, extra)
        out = out.reshape(grad_out.shape)
        outputs = [out, State.from_logical(new_logical).data]
        wanted = [x for x in (grad, extra, state, phi) if x is not None]
        first = torch.autograd.grad(outputs, wanted, [grad_out.to(out.dtype), grad_new_state], create_graph=True)
        given = [g for g, x in zip(grad_outputs, (grad, extra, state, phi)) if x is not None]
        inputs = [x for x in saved if x is not None]
        grads = iter(torch.autograd.grad(first, inputs, given, create_graph=create_graph, allow_unused=True))
    return (*[None if x is None else next(grads) for x in saved], *[None] * len(ctx.options))


def _segment_backward_vjp(ctx: Any, *grad_outputs: Any) -> Any:
    raise RuntimeError(
        "l2l_fast::gac_segment_backward is itself a backward pass and cannot be differentiated; "
        "unroll the functional step (CoordinatewiseLSTM) or use l2l_fast.reference instead"
    )


register("gac_step", _fake_step, _step_vjp, _save_step)
register("gac_step_backward", _fake_step_backward, _step_backward_vjp, _save_step_backward)
register("gac_step_", _fake_step_)
register("gac_segment_backward", _fake_segment_backward, _segment_backward_vjp)
