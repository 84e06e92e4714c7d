"""The operators of csrc/ops with Python signatures, their fake kernels and autograd formulas.

Every operator lives in ``torch.ops.l2l_fast`` and takes the configuration as the same three arguments, those of
:attr:`Config.arguments`. Wrong shapes and dtypes raise ValueError or TypeError before anything is written.

Where coordinates communicate (``gac_cells > 0``), one step is one over all coordinates of a problem (appendix D of
Andrychowicz et al. 2016): in every layer the new h of the first ``gac_cells`` cells is replaced by its mean over the
problem, upward and in the new state; one that is not finite stays what it is and out of the mean. Coordinate i of a
tensor belongs to problem ``i // (numel / num_problems)``; the padding of the state never counts.

A network with normalized inputs (:mod:`l2l_fast.kernels.normalized`) takes three more arguments, which others must not
have: ``ages``, one int per tensor, the steps that its moving averages are of, the present one included; if it has
tensor_inputs, these, float32 ``[tensors, tensor_inputs]``; and ``nominal``, float32 ``[tensors, 5]``, or None for the
default. All three are constants. It takes one problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C as _C  # loading the extension registers the operators
from . import normalized, orthogonal, reference
from .config import Config
from .state import Averages, State
from .state_types import decode_averages
from .tensor_inputs import DEFAULT_INPUTS, aligned, default_inputs

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


def step(
    grad: Tensor,
    extra: Tensor | None,
    state: Tensor,
    phi: Tensor,
    config: Config,
    num_problems: int = 1,
    *,
    ages: Sequence[int] = (),
    tensor_inputs: Tensor | None = None,
    nominal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Functional step of one tensor: ``out, new_state = phi(grad, extra, state)``. Differentiable in all four; with
    normalized inputs in the h and c of state, and in phi, and the gradients of all else are zero.

    Args:
        grad: float32, bfloat16 or float16, any shape and strides.
        extra: float32 contiguous ``[extra_inputs, *grad.shape]``; None iff extra_inputs is 0.
        state: float32 ``[tiles, config.rows, 64]``, the layout of :class:`l2l_fast.State`.
        phi: float32 ``[P]``, the order of :func:`l2l_fast.reference.unpack_phi`.
        num_problems: independent problems, the leading dimension of grad's coordinates.
        ages, tensor_inputs, nominal: see above, of this tensor.

    Returns:
        float32 ``[num_outputs, *grad.shape]``, contiguous, the update (output_scale included) first; and the new state.
    """
    _require_dense("grad", grad)
    if not grad.is_cpu:
        require_kernel("step", grad.device)
    common = (ages, tensor_inputs, nominal)
    return torch.ops.l2l_fast.step(grad, extra, state, phi, *config.arguments, num_problems, *common)


def step_backward(
    grad_out: Tensor,
    grad_new_state: Tensor,
    grad: Tensor,
    extra: Tensor | None,
    state: Tensor,
    phi: Tensor,
    config: Config,
    num_problems: int = 1,
    *,
    ages: Sequence[int] = (),
    tensor_inputs: Tensor | None = None,
    nominal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of :func:`step`, which recomputes the gates from the inputs of the step.

    Args:
        grad_out: float32 contiguous ``[num_outputs, *grad.shape]``. grad_new_state: as state. The rest: as
            :func:`step`.

    Returns:
        Gradients with respect to grad (its shape and dtype), extra (``[extra_inputs, *grad.shape]``, empty without
        extra inputs), state and phi (float32).
    """
    common = (ages, tensor_inputs, nominal)
    return torch.ops.l2l_fast.step_backward(
        grad_out, grad_new_state, grad, extra, state, phi, *config.arguments, num_problems, *common
    )


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    phi: Tensor,
    config: Config,
    lr: float,
    weight_decay: float,
    maximize: bool,
    *,
    record: Tensor | None = None,
    record_tiles: Sequence[int] = (),
    extra: Tensor | None = None,
    out: Tensor | None = None,
    num_problems: int = 1,
    means: Tensor | None = None,
    sums: Tensor | None = None,
    phases: tuple[int, int] | None = None,
    check_only: bool = False,
    ages: Sequence[int] = (),
    tensor_inputs: Tensor | None = None,
    nominal: Tensor | None = None,
    seeds: Sequence[int] = (),
    precision: str = "float32",
) -> None:
    """In-place step of many tensors in one launch, averages over all of them.

    With ``g = -grad if maximize else grad`` and ``u, state = phi(g, extra, state)``:
    ``param = param * (1 - lr * weight_decay) + lr * u[0]``. Not differentiable: call it under ``torch.no_grad()``.

    Args:
        params, grads: pairwise of one shape; float32, bfloat16 or float16 independently; any strides. What is written
            (params, states, record, out, means, sums) must provably share no memory with itself or any other argument;
            a gradient may be its parameter.
        states: one state per parameter, updated in place: float32, as :func:`step`, or all of another type of
            :mod:`l2l_fast.kernels.state_types`, for networks that are plain, in whole steps without ``out``.
        phi: float32 ``[P]``.
        record: optional flat float32 buffer; g of tensor k is written to ``record[64 * record_tiles[k]:]`` in logical
            order, in whole tiles, padding lanes zero.
        record_tiles: first tile of every tensor in ``record``; empty without it.
        extra: float32 contiguous ``[extra_inputs, N]``, N the coordinates of all tensors, tensor after tensor.
        out: float32 contiguous ``[num_outputs, N]``, written; may be None with one output.
        means: float32 contiguous ``[num_layers, num_problems, gac_cells]``, written: the means of every layer's new h.
        sums: float64 contiguous ``[2, num_problems, gac_cells]``, overwritten: of the last layer that was run, the
            sums of the finite activations, and how many they are. Both may be None if gac_cells is 0.
        phases: first and last, None for the whole step, ``(0, num_layers + 1)``. Phase l < num_layers is layer l, up
            to its sums; the last phase is the read-out and the update of the parameters. A call that ends with last <=
            num_layers leaves sums and counts of layer last - 1 over the given coordinates in ``sums``; the caller adds
            those of other processes, sets ``means[last - 1]`` to their quotients and calls again with first = last
            and the same arguments (``out`` is required then).
        check_only: raise what the step would raise, and write nothing.
        ages, tensor_inputs, nominal: see above, of every tensor.
        seeds: of states that are not float32, one 64-bit number per tensor: of the rounding in this step.
        precision: "float32", or "bfloat16": the products of the layers' weights take operands that are rounded to
            bfloat16, see :func:`l2l_fast.reference.lstm_step`. On the CPU, for plain networks with layers, in whole
            steps without ``record``.
    """
    if torch.is_grad_enabled() and any(param.requires_grad for param in params):
        raise RuntimeError("step_ writes to parameters that require grad: call it under torch.no_grad()")
    for grad in grads:
        _require_dense("grads", grad)
    if not phi.is_cpu:
        require_kernel("step_", phi.device)
    first, last = phases or (0, config.num_layers + 1)
    tensors = (params, grads, states, phi, *config.arguments)
    options = (lr, weight_decay, maximize, record, record_tiles, extra, out, num_problems)
    common = (ages, tensor_inputs, nominal)
    rest = (*common, seeds, precision)
    torch.ops.l2l_fast.step_.default(*tensors, *options, means, sums, first, last, check_only, *rest)


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


def segment_backward(
    start_states: list[Tensor],
    numels: Sequence[int],
    record_tiles: Sequence[int],
    records: list[Tensor],
    means: list[Tensor],
    loss_weights: Sequence[float],
    lrs: Sequence[float],
    decays: Sequence[float],
    phi: Tensor,
    config: Config,
    num_problems: int = 1,
    grad_end_states: Sequence[Tensor] = (),
    need_grad_start: bool = False,
    *,
    ages: Sequence[int] = (),
    tensor_inputs: Tensor | None = None,
    nominal: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of ``sum_{s=1..T} w_s f(theta_s)`` with respect to phi, the gradients of f held constant.

    The mathematics is that of :func:`l2l_fast.reference.segment_backward`; the kernel re-runs the T steps of a tile on
    chip from its start state and the recorded gradients, so nothing per step is kept in memory.

    Args:
        start_states: float32 states at theta_0, one per tensor.
        numels: coordinates of every tensor: what states and records hold beyond the last one reaches no result.
        record_tiles: first tile of every tensor in each record.
        records: T + 1 flat float32 buffers of one size with g_0 ... g_T, as :func:`step_` writes them.
        means: T tensors, what :func:`step_` wrote in the T steps; none if gac_cells is 0.
        loss_weights: w_1 ... w_T. lrs, decays: T values, ``theta_{t+1} = decays[t] * theta_t + lrs[t] * u_t``.
        config: without extra inputs and with one output; a network with memory goes through the functional step.
        grad_end_states: none, or one tensor per start state, added to the gradient of the state after step T.
        need_grad_start: whether to return the gradients of the start states.
        ages: see above, of every tensor in the first step; each moves in every step. tensor_inputs, nominal: see above,
            with those of the T steps: ``[T, tensors, ...]``.

    Returns:
        The gradient of phi ``[P]`` and those of the start states (an empty list unless asked for).
    """
    return torch.ops.l2l_fast.segment_backward(
        start_states,
        numels,
        record_tiles,
        records,
        means,
        loss_weights,
        lrs,
        decays,
        phi,
        *config.arguments,
        num_problems,
        grad_end_states,
        need_grad_start,
        ages,
        tensor_inputs,
        nominal,
    )


def vector_math(function: str, x: Tensor) -> Tensor:
    """An elementary function of a float32 tensor as the selected instruction set computes it; for the accuracy tests.

    function: ``"exp2"``, ``"log"`` (of normal numbers), ``"sigmoid_scaled"`` (sigmoid(x) from -log2(e) x) or
    ``"tanh_scaled"`` (tanh(x) from 2 log2(e) x): the kernels fold these factors into the weights.
    """
    return torch.ops.l2l_fast._vector_math(function, x)


def tensor_sums(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    config: Config,
    maximize: bool,
    ages: Sequence[int],
) -> Tensor:
    """What :func:`l2l_fast.kernels.normalized.tensor_sums` gives of every tensor of a step that :func:`step_` takes
    next: ``[tensors, 6]``, float64, on their device; the same from run to run, and for any number of threads.

    Args:
        states: as for :func:`step_`, of any type; float64 ones, and those on other devices, go through plain PyTorch.
        ages: of every tensor in the step, 1 in its first.
    """
    if all((state.is_cpu or state.is_cuda) and state.dtype is not torch.float64 for state in states):
        return torch.ops.l2l_fast._tensor_sums(params, grads, states, *config.arguments, maximize, ages)
    rows = []
    for param, grad, state, age in zip(params, grads, states, ages, strict=True):
        wide = state.dtype is torch.float64
        stored = state[:, config.rows - config.averages :] if wide else decode_averages(state, config)
        averages = Averages(stored.transpose(1, 2).reshape(-1, config.averages)[: param.numel()], age - 1)
        rows.append(normalized.tensor_sums(param, -grad if maximize else grad, averages, config.betas or ()))
    return torch.stack(rows)


def tensor_inputs(
    sums: Tensor,
    alignments: Sequence[Tensor],
    fan_ins: Sequence[int],
    ages: Sequence[int],
    total_steps: int | None,
    weight_nominal: Tensor | None = None,
    optimizees: int = 1,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The default inputs of tensors in a step, see :func:`l2l_fast.kernels.tensor_inputs.default_inputs`, and what is
    made of them.

    Args:
        sums: float64 ``[tensors, 6]``, of :func:`tensor_sums`.
        alignments: of every tensor, float64 scalars, before the step.
        ages, fan_ins, total_steps, optimizees: see there.
        weight_nominal: ``[4, inputs]``, or ``[optimizees, 4, inputs]``; None for the default ``nominal``.

    Returns:
        The inputs, float32 ``[tensors, 15]``; ``nominal``, float32 ``[tensors, 5]``; the alignments after the step.
    """
    weight = weight_nominal
    if weight is not None:
        wide = weight.dtype in (torch.float32, torch.float64)
        weight = weight.detach().contiguous() if wide else weight.detach().float().contiguous()
    if sums.is_cpu:
        given = alignments, fan_ins, ages, total_steps, weight, optimizees
        return torch.ops.l2l_fast._tensor_inputs(sums, *given)
    after = aligned(sums, torch.stack(list(alignments)))
    inputs = default_inputs(fan_ins, ages, total_steps, sums, after, optimizees)
    if weight is None:
        nominal = normalized.default_nominal(len(ages), sums.device)
    else:
        each = weight.expand(optimizees, *weight.shape[-2:]).unsqueeze(1)
        nominal = normalized.nominal_of(each, inputs.view(optimizees, -1, inputs.shape[1])).flatten(0, 1)
    return inputs, nominal, [each.clone() for each in after]


def orthogonalized(updates: Tensor, steps: int = 5) -> Tensor:
    """:func:`l2l_fast.kernels.orthogonal.orthogonalized`, and of float32 matrices on the CPU by an operator: the same
    from run to run, for any number of threads, and for a matrix alone or anywhere in a stack. It has no derivative;
    float64 matrices, and those on other devices, go through plain PyTorch.

    Args:
        updates: float32 or float64 ``[K, rows, cols]``. What is not finite counts as zero.
        steps: 0 ... 100.

    Returns:
        A contiguous tensor of the same shape and dtype.

    Raises:
        TypeError, ValueError: another dtype, layout, shape or number of steps.
    """
    orthogonal.check(updates, steps)
    if updates.is_cpu and updates.dtype is torch.float32:
        return torch.ops.l2l_fast._orthogonalized(updates.contiguous(), steps)
    return orthogonal.orthogonalized(updates, steps)


# ---- fake kernels: shapes and dtypes for torch.compile, export and the meta device ----


def _check_one_device(
    phi: Tensor, common: Sequence[Any] = (), beside: str = "phi", /, **tensors: Tensor | Sequence[Tensor] | None
) -> None:
    # One meta tensor among others brings the call here, where nothing would be computed. common: ages, tensor_inputs,
    # nominal, or the first of these; what comes after them are no tensors.
    tensors.update(zip(("tensor_inputs", "nominal"), common[1:]))
    for name, value in tensors.items():
        for tensor in (value,) if isinstance(value, Tensor) else value or ():
            if tensor.device != phi.device:
                raise ValueError(f"{name}: expected device {phi.device} as {beside}, got {tensor.device}")


@torch.library.register_fake("l2l_fast::step")
def _(
    grad: Tensor,
    extra: Tensor | None,
    state: Tensor,
    phi: Tensor,
    sizes: Sequence[int],
    preprocess: str,
    constants: Sequence[float],
    num_problems: int,
    *common: Any,
) -> tuple[Tensor, Tensor]:
    _check_one_device(phi, common, grad=grad, extra=extra, state=state)
    outputs = sizes[4]  # of Config.arguments
    out = torch.empty((outputs, *grad.shape), dtype=torch.float32, device=grad.device)
    return out, torch.empty_like(state)


@torch.library.register_fake("l2l_fast::step_backward")
def _(
    grad_out: Tensor,
    grad_new_state: Tensor,
    grad: Tensor,
    extra: Tensor | None,
    state: Tensor,
    phi: Tensor,
    sizes: Sequence[int],
    preprocess: str,
    constants: Sequence[float],
    num_problems: int,
    *common: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    upstream = {"grad_out": grad_out, "grad_new_state": grad_new_state}
    _check_one_device(phi, common, **upstream, grad=grad, extra=extra, state=state)
    grad_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    extra_inputs = sizes[3]
    grad_extra = torch.empty((extra_inputs, *grad.shape), dtype=torch.float32, device=grad.device)
    return grad_grad, grad_extra, torch.empty_like(state), torch.empty_like(phi)


@torch.library.register_fake("l2l_fast::step_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    phi: Tensor,
    sizes: Sequence[int],
    preprocess: str,
    constants: Sequence[float],
    lr: float,
    weight_decay: float,
    maximize: bool,
    record: Tensor | None,
    record_tiles: Sequence[int],
    extra: Tensor | None,
    out: Tensor | None,
    num_problems: int,
    means: Tensor | None,
    sums: Tensor | None,
    first_phase: int,
    last_phase: int,
    check_only: bool,
    *common: Any,
) -> None:
    _check_one_device(phi, common, params=params, grads=grads, states=states, record=record)
    _check_one_device(phi, extra=extra, out=out, means=means, sums=sums)


@torch.library.register_fake("l2l_fast::segment_backward")
def _(
    start_states: list[Tensor],
    numels: Sequence[int],
    record_tiles: Sequence[int],
    records: list[Tensor],
    means: list[Tensor],
    loss_weights: Sequence[float],
    lrs: Sequence[float],
    decays: Sequence[float],
    phi: Tensor,
    sizes: Sequence[int],
    preprocess: str,
    constants: Sequence[float],
    num_problems: int,
    grad_end_states: list[Tensor],
    need_grad_start: bool,
    *common: Any,
) -> tuple[Tensor, list[Tensor]]:
    ends = {"start_states": start_states, "grad_end_states": grad_end_states}
    _check_one_device(phi, common, **ends, records=records, means=means)
    return torch.empty_like(phi), [torch.empty_like(s) for s in start_states] if need_grad_start else []


@torch.library.register_fake("l2l_fast::_vector_math")
def _(function: str, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("l2l_fast::_tensor_sums")
def _(params: list[Tensor], grads: list[Tensor], states: list[Tensor], *others: Any) -> Tensor:
    _check_one_device(params[0], (), "params[0]", params=params, grads=grads, states=states)
    return torch.empty(len(params), 6, dtype=torch.float64, device=params[0].device)


@torch.library.register_fake("l2l_fast::_tensor_inputs")
def _(
    sums: Tensor,
    alignments: list[Tensor],
    fan_ins: Sequence[int],
    ages: Sequence[int],
    total_steps: int | None,
    weight_nominal: Tensor | None,
    optimizees: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check_one_device(sums, (), "sums", alignments=alignments, weight_nominal=weight_nominal)
    inputs = sums.new_empty(len(sums), len(DEFAULT_INPUTS), dtype=torch.float32)
    nominal = sums.new_empty(len(sums), len(normalized.NOMINAL), dtype=torch.float32)
    return inputs, nominal, [torch.empty_like(each) for each in alignments]


@torch.library.register_fake("l2l_fast::_orthogonalized")
def _(updates: Tensor, steps: int) -> Tensor:
    return torch.empty_like(updates, memory_format=torch.contiguous_format)


# ---- autograd formulas ----


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])  # grad, extra or None, state, phi
    ctx.options = inputs[4:]


def _step_vjp(ctx: Any, grad_out: Tensor, grad_new_state: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing makes them anew every time
    grad_grad, grad_extra, grad_state, grad_phi = torch.ops.l2l_fast.step_backward(
        grad_out.contiguous(), grad_new_state.contiguous(), *saved, *ctx.options
    )
    extra = None if saved[1] is None else grad_extra
    return (grad_grad, extra, grad_state, grad_phi, *[None] * len(ctx.options))


def _save_step_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _step_backward_vjp(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
    # Second derivatives of the LSTM itself are rare (a meta-loss that contains a meta-gradient), so they go through the
    # reference: differentiate its vector-Jacobian product once more.
    create_graph = torch.is_grad_enabled()
    *arguments, num_problems, ages, tensor_inputs, nominal = ctx.options
    config = Config.from_arguments(*arguments)
    age = (config.averages, ages[0] - 1) if config.averages else ()
    told, vector = (None if rows is None else rows[0] for rows in (tensor_inputs, nominal))
    with torch.enable_grad():
        # Views, so that an input which depends on another one is not differentiated through it.
        saved: list[Any] = [
            x if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x in ctx.saved_tensors
        ]
        grad_out, grad_new_state, grad, extra, state, phi = saved
        logical = State(state, grad.numel(), config.hidden_size, config.num_layers, *age).to_logical()
        out, new_logical = reference.lstm_step(grad, logical, phi, config, num_problems, extra, told, vector)
        out = out.reshape(grad_out.shape)
        outputs = [out, State.from_logical(new_logical).data]
        wanted = [x for x in (grad, extra, state, phi) if x is not None]
        first = torch.autograd.grad(
            outputs, wanted, [grad_out.to(out.dtype), grad_new_state], create_graph=True, materialize_grads=True
        )
        given = [g for g, x in zip(grad_outputs, (grad, extra, state, phi)) if x is not None]
        inputs = [x for x in saved if x is not None]
        grads = iter(torch.autograd.grad(first, inputs, given, create_graph=create_graph, allow_unused=True))
    return (*[None if x is None else next(grads) for x in saved], *[None] * len(ctx.options))


def _segment_backward_vjp(ctx: Any, *grad_outputs: Any) -> Any:
    raise RuntimeError(
        "l2l_fast::segment_backward is itself a backward pass and cannot be differentiated; "
        "unroll the functional step (CoordinatewiseLSTM) or use l2l_fast.reference instead"
    )


def _orthogonalized_vjp(ctx: Any, grad_output: Tensor) -> Any:
    raise RuntimeError(
        "l2l_fast::_orthogonalized has no derivative; detach the updates, or use "
        "l2l_fast.kernels.orthogonal.orthogonalized instead"
    )


torch.library.register_autograd("l2l_fast::step", _step_vjp, setup_context=_save_step)
torch.library.register_autograd("l2l_fast::step_backward", _step_backward_vjp, setup_context=_save_step_backward)
torch.library.register_autograd("l2l_fast::segment_backward", _segment_backward_vjp)
torch.library.register_autograd("l2l_fast::_orthogonalized", _orthogonalized_vjp)
