"""The operators of csrc/ops.cpp with Python signatures, their fake kernels and autograd formulas.

Every operator lives in ``torch.ops.l2l_fast`` and takes the same five configuration arguments in the same order (see
:class:`Config`). Wrong shapes and dtypes raise ValueError or TypeError before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C as _C  # loading the extension registers the operators
from . import reference
from .config import Config as Config
from .config import GacConfig as GacConfig
from .state import State

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether this build of the package has operator ``name`` for ``device``."""
    if device.type in ("cpu", "meta"):
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"l2l_fast::{name}", device.type.upper())


def require_kernel(name: str, device: torch.device) -> None:
    """Raise NotImplementedError, saying what would work, unless this build has operator ``name`` for ``device``."""
    if not has_kernel(name, device):
        supported = [d for d in ("cpu", "cuda") if has_kernel(name, torch.device(d))]
        raise NotImplementedError(
            f"l2l_fast::{name}: this build has no kernel for device {device.type!r}, only for {supported}; move the "
            "parameters there, or call l2l_fast.reference, which runs on any device"
        )


def _require_dense(name: str, tensor: Tensor) -> None:
    # A sparse tensor has a dispatch key of its own and would not reach the checks of the kernel.
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")


def lstm_step(
    grad: Tensor,
    state: Tensor,
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
) -> tuple[Tensor, Tensor]:
    """Functional step: ``update, new_state = phi(grad, state)``. Differentiable in grad, state and phi.

    Args:
        grad: float32, bfloat16 or float16, any shape and strides.
        state: float32 ``[tiles, 2 * num_layers * hidden_size, 64]``, the layout of :class:`l2l_fast.State`.
        phi: float32 ``[P]``, the order of :func:`l2l_fast.reference.unpack_phi`.

    Returns:
        update (grad's shape and dtype, contiguous, output_scale included) and the new state.
    """
    _require_dense("grad", grad)
    if not grad.is_cpu:
        require_kernel("lstm_step", grad.device)
    return torch.ops.l2l_fast.lstm_step(grad, state, phi, hidden_size, num_layers, preprocess, p, output_scale)


def lstm_step_backward(
    grad_update: Tensor,
    grad_new_state: Tensor,
    grad: Tensor,
    state: Tensor,
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of :func:`lstm_step`, which recomputes the gates from the inputs of the step.

    Args:
        grad_update: grad's shape, a kernel dtype. grad_new_state: as state. The rest: as :func:`lstm_step`.

    Returns:
        Gradients with respect to grad (its shape and dtype), state and phi (float32).
    """
    return torch.ops.l2l_fast.lstm_step_backward(
        grad_update, grad_new_state, grad, state, phi, hidden_size, num_layers, preprocess, p, output_scale
    )


def lstm_step_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    lr: float,
    weight_decay: float,
    maximize: bool,
    record: Tensor | None = None,
    record_tiles: Sequence[int] = (),
    check_only: bool = False,
) -> None:
    """In-place step of many tensors in one launch.

    With ``g = -grad if maximize else grad`` and ``u, state = phi(g, state)``:
    ``param = param * (1 - lr * weight_decay) + lr * u``. Not differentiable: call it under ``torch.no_grad()``.

    Args:
        params, grads: pairwise of one shape; float32, bfloat16 or float16 independently; any strides. What is written
            (params, states, record) must provably share no memory with itself or any other argument; a gradient may
            be its parameter.
        states: one float32 state per parameter, as :func:`lstm_step`; updated in place.
        phi: float32 ``[P]``.
        record: optional flat float32 buffer; g of tensor k is written to ``record[64 * record_tiles[k]:]`` in logical
            order, in whole tiles, padding lanes zero.
        record_tiles: first tile of every tensor in ``record``; empty without it.
        check_only: raise what the step would raise, and write nothing.
    """
    if torch.is_grad_enabled() and any(param.requires_grad for param in params):
        raise RuntimeError("lstm_step_ writes to parameters that require grad: call it under torch.no_grad()")
    for grad in grads:
        _require_dense("grads", grad)
    if not phi.is_cpu:
        require_kernel("lstm_step_", phi.device)
    torch.ops.l2l_fast.lstm_step_.default(
        params,
        grads,
        states,
        phi,
        hidden_size,
        num_layers,
        preprocess,
        p,
        output_scale,
        lr,
        weight_decay,
        maximize,
        record,
        record_tiles,
        check_only,
    )


def check_apart(params: list[Tensor], grads: list[Tensor], states: list[Tensor]) -> None:
    """Raise ValueError unless what an in-place step of all these tensors would write is provably apart from all else,
    whatever their dtypes, and may be written; as each step checks for its own tensors.

    Raises:
        NotImplementedError: torch.func transforms one of them, so that it has no memory to be written.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        for name, tensors in (("params", params), ("grads", grads), ("states", states)):
            if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
                raise NotImplementedError(
                    f"{name}: an in-place step cannot be transformed by torch.func (vmap, jvp, grad, ...); "
                    "CoordinatewiseLSTM and l2l_fast.reference can"
                )
    torch.ops.l2l_fast._check_apart(params, grads, states)


def lstm_segment_backward(
    start_states: list[Tensor],
    numels: Sequence[int],
    record_tiles: Sequence[int],
    records: list[Tensor],
    loss_weights: Sequence[float],
    lrs: Sequence[float],
    decays: Sequence[float],
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    grad_end_states: list[Tensor],
    need_grad_start: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of ``sum_{s=1..T} w_s f(theta_s)`` with respect to phi, the gradients of f held constant.

    The mathematics is that of :func:`l2l_fast.reference.segment_backward`; the kernel re-runs the T steps of a tile on
    chip from its start state and the recorded gradients, so nothing per step is kept in memory.

    Args:
        start_states: float32 states at theta_0, one per tensor.
        numels: coordinates of every tensor: what states and records hold beyond the last one reaches no result.
        record_tiles: first tile of every tensor in each record.
        records: T + 1 flat float32 buffers of one size with g_0 ... g_T, as :func:`lstm_step_` writes them.
        loss_weights: w_1 ... w_T. lrs, decays: T values, ``theta_{t+1} = decays[t] * theta_t + lrs[t] * u_t``.
        grad_end_states: empty, or one tensor per start state, added to the gradient of the state after step T.
        need_grad_start: whether to return the gradients of the start states.

    Returns:
        The gradient of phi ``[P]`` and those of the start states (an empty list unless asked for).
    """
    return torch.ops.l2l_fast.lstm_segment_backward(
        start_states,
        numels,
        record_tiles,
        records,
        loss_weights,
        lrs,
        decays,
        phi,
        hidden_size,
        num_layers,
        preprocess,
        p,
        output_scale,
        grad_end_states,
        need_grad_start,
    )


def vector_math(function: str, x: Tensor) -> Tensor:
    """An elementary function of a float32 tensor as the selected instruction set computes it; for the accuracy tests.

    function: ``"exp2"``, ``"log"`` (of normal numbers), ``"sigmoid_scaled"`` (sigmoid(x) from -log2(e) x) or
    ``"tanh_scaled"`` (tanh(x) from 2 log2(e) x): the kernels fold these factors into the weights.
    """
    return torch.ops.l2l_fast._vector_math(function, x)


# ---- fake kernels: shapes and dtypes for torch.compile, export and the meta device ----


def _check_one_device(phi: Tensor, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    # One meta tensor among others brings the call here, where nothing would be computed.
    for name, value in tensors.items():
        for tensor in (value,) if isinstance(value, Tensor) else value or ():
            if tensor.device != phi.device:
                raise ValueError(f"{name}: expected device {phi.device} as phi, got {tensor.device}")


@torch.library.register_fake("l2l_fast::lstm_step")
def _(grad: Tensor, state: Tensor, phi: Tensor, *config: Any) -> tuple[Tensor, Tensor]:
    _check_one_device(phi, grad=grad, state=state)
    return torch.empty_like(grad, memory_format=torch.contiguous_format), torch.empty_like(state)


@torch.library.register_fake("l2l_fast::lstm_step_backward")
def _(
    grad_update: Tensor, grad_new_state: Tensor, grad: Tensor, state: Tensor, phi: Tensor, *config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_one_device(phi, grad_update=grad_update, grad_new_state=grad_new_state, grad=grad, state=state)
    grad_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return grad_grad, torch.empty_like(state), torch.empty_like(phi)


@torch.library.register_fake("l2l_fast::lstm_step_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    lr: float,
    weight_decay: float,
    maximize: bool,
    record: Tensor | None,
    record_tiles: Sequence[int],
    check_only: bool = False,
) -> None:
    _check_one_device(phi, params=params, grads=grads, states=states, record=record)


@torch.library.register_fake("l2l_fast::lstm_segment_backward")
def _(
    start_states: list[Tensor],
    numels: Sequence[int],
    record_tiles: Sequence[int],
    records: list[Tensor],
    loss_weights: Sequence[float],
    lrs: Sequence[float],
    decays: Sequence[float],
    phi: Tensor,
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    grad_end_states: list[Tensor],
    need_grad_start: bool,
) -> tuple[Tensor, list[Tensor]]:
    _check_one_device(phi, start_states=start_states, records=records, grad_end_states=grad_end_states)
    return torch.empty_like(phi), [torch.empty_like(s) for s in start_states] if need_grad_start else []


@torch.library.register_fake("l2l_fast::_vector_math")
def _(function: str, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- autograd formulas ----


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.config = Config(*inputs[len(tensors) :])


def _lstm_step_vjp(ctx: Any, grad_update: Tensor, grad_new_state: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.l2l_fast.lstm_step_backward(
        grad_update, grad_new_state.contiguous(), *ctx.saved_tensors, *ctx.config
    )
    return (*grads, *[None] * len(ctx.config))


def _lstm_step_backward_vjp(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
    # Second derivatives of the LSTM itself are rare (a meta-loss that contains a meta-gradient), so they go through the
    # reference: differentiate its vector-Jacobian product once more.
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that an input which depends on another one is not differentiated through it.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors]
        grad_update, grad_new_state, grad, state, phi = inputs
        config = ctx.config
        logical = State(state, grad.numel(), config.hidden_size, config.num_layers).to_logical()
        update, new_logical = reference.lstm_step(grad, logical, phi, config)
        new_state = State.from_logical(new_logical).data
        upstream = [grad_update.to(update.dtype), grad_new_state]
        outputs = torch.autograd.grad([update, new_state], [grad, state, phi], upstream, create_graph=True)
        grads = torch.autograd.grad(outputs, inputs, grad_outputs, create_graph=create_graph, allow_unused=True)
    return (*grads, *[None] * len(config))


def _segment_backward_vjp(ctx: Any, *grad_outputs: Any) -> Any:
    raise RuntimeError(
        "l2l_fast::lstm_segment_backward is itself a backward pass and cannot be differentiated; "
        "unroll the functional step (CoordinatewiseLSTM) or use l2l_fast.reference instead"
    )


def register(
    name: str, fake: Callable[..., Any], vjp: Callable[..., Any] | None = None, save: Callable[..., Any] | None = None
) -> None:
    """Register the fake kernel and the autograd formula of an operator. The schemas name this module as their place, so
    it must be this module that does it."""
    torch.library.register_fake(f"l2l_fast::{name}", fake)
    if vjp is not None:
        torch.library.register_autograd(f"l2l_fast::{name}", vjp, setup_context=save)


torch.library.register_autograd("l2l_fast::lstm_step", _lstm_step_vjp, setup_context=_save_inputs)
torch.library.register_autograd("l2l_fast::lstm_step_backward", _lstm_step_backward_vjp, setup_context=_save_inputs)
torch.library.register_autograd("l2l_fast::lstm_segment_backward", _segment_backward_vjp)
