"""What LearnedOptimizer checks before it writes anything."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels import checks, operators
from ..kernels.checks import check_gradient, check_problems
from ..networks.lstm import CoordinatewiseLSTM
from ..networks.memory import Memory
from . import joint, sharding
from .joint import Reduce
from .state import state_dtype_of

if TYPE_CHECKING:
    from .batch import Batch

OPTIONS = ("network", "lr", "weight_decay", "maximize", "num_problems", "total_steps", "state_dtype")
# What schedulers and users keep in a group beside the optimizer's own options.
BOOKKEEPING = {
    *("params", "param_names", "name", "names", "group_name"),
    *("initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "lr_scale", "lr_mult"),
}


def number(name: str, value: Any) -> float:
    """``value`` as a finite float: a real number of any kind, or a tensor with one element.

    Raises:
        TypeError: something else. ValueError: a tensor of several elements, NaN or infinity. NotImplementedError: one
            that carries a tangent or is transformed by torch.func, which would be lost.
    """
    if isinstance(value, Tensor):
        transformed = torch._C._functorch.is_functorch_wrapped_tensor(value)
        if transformed or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None):
            raise NotImplementedError(
                f"{name}: a step is not differentiable with respect to it, nor transformed by torch.func, got a tensor "
                "that is; expected a plain number, or call the network itself (CoordinatewiseLSTM)"
            )
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor with one element, got shape {tuple(value.shape)}")
        value = value.item()
    return checks.real(name, value)


def truth(name: str, value: Any) -> bool:
    """``value`` as a bool; what is one number counts as one.

    Raises:
        TypeError, ValueError: something else, as for :func:`number`.
    """
    if isinstance(value, Tensor) and value.dtype is torch.bool and value.numel() == 1:
        value = bool(value)
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if not isinstance(value, Tensor) and checks.as_float(value) is None:
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return bool(number(name, value))


def plain(value: Any) -> Any:
    """A group's option as plain data: numbers of numpy as those of Python, tensors as copies."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        value = value.item()
    # A long double, a Fraction or a Decimal is a number to a step, but not to torch.load(weights_only=True).
    known = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
    return float(value) if not known and checks.as_float(value) is not None else value


def check_new_options(group: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, naming the option, unless the options of a new group are valid; warn of those
    among the ``given`` ones (the others are defaults) that this optimizer does not have."""
    for name in ("lr", "weight_decay"):
        if number(name, group[name]) < 0:
            raise ValueError(f"{name}: expected a finite number >= 0, got {group[name]}")
    check_total_steps(group["total_steps"])
    checks.flag("maximize", group["maximize"])
    unknown = sorted(str(key) for key in set(given) - {*OPTIONS, *BOOKKEEPING})
    if unknown:
        warnings.warn(
            f"param_groups: LearnedOptimizer has no option {', '.join(map(repr, unknown))}, which will have no effect; "
            f"its options are {', '.join(map(repr, OPTIONS))}",
            stacklevel=4,
        )


def check_total_steps(value: Any) -> int | None:
    """The number of steps of a run as a plain int, None if it is not known; TypeError or ValueError for others."""
    steps = value if value is None else checks.integer("total_steps", value, 1)
    if steps is not None and steps >= 1 << 62:  # the operators take 64 bits
        raise ValueError(f"total_steps: expected a number below 2^62, got {steps}")
    return steps


def check_state_dtype(group: Mapping[str, Any], network: CoordinatewiseLSTM) -> torch.dtype:
    """The dtype that a group's ``state_dtype`` names.

    Raises:
        ValueError: it names none.
        NotImplementedError: one that steps of this network do not have.
    """
    dtype = state_dtype_of(group)
    if dtype is not torch.float32 and (network.communicates or network.has_memory or network.num_outputs > 1):
        raise NotImplementedError(
            "state_dtype: expected 'float32' for a network whose coordinates communicate, or with a memory or several "
            f"outputs, got {group['state_dtype']!r}"
        )
    return dtype


def refuse_exact(group: Mapping[str, Any], k: int) -> None:
    """Raise NotImplementedError for the k-th parameter, which goes through the reference."""
    raise NotImplementedError(
        "state_dtype: expected 'float32' for float64 parameters and gradients, which keep a float64 state, got "
        f"{group['state_dtype']!r} and parameter {_name(group, k)}"
    )


PRECISIONS = ("float32", "bfloat16")


def check_precision(precision: Any, network: CoordinatewiseLSTM) -> None:
    """Raise TypeError or ValueError unless ``precision`` is one, and the steps of this network have it."""
    if not isinstance(precision, str):
        raise TypeError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
    if precision == "float32":
        return
    if network.communicates or network.has_memory or not network.config.is_plain:
        raise ValueError(
            "precision: expected 'float32' for a network whose coordinates communicate, or with a memory, extra inputs "
            f"or several outputs, got {precision!r}"
        )
    if network.config.num_layers == 0:
        raise ValueError(
            f"precision: expected 'float32' for a network without layers, which has no products, got {precision!r}"
        )


def check_precision_of(precision: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError unless the parameters of a group can be stepped with this precision."""
    for k, param in enumerate(group["params"] if precision != "float32" else ()):
        if param.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"precision: {precision!r} is of the CPU; expected 'float32' for parameter {_name(group, k)}, which is "
                f"on {param.device}"
            )
        if param.dtype is torch.float64:
            refuse_reference(precision, group, k)


def refuse_reference(precision: str, group: Mapping[str, Any], k: int) -> None:
    """Raise ValueError for the k-th parameter, which goes through the reference."""
    raise ValueError(
        "precision: expected 'float32' for float64 parameters and gradients, which are stepped in float64, got "
        f"{precision!r} and parameter {_name(group, k)}"
    )


def check_parameters(group: Mapping[str, Any]) -> None:
    """Raise unless all parameters of a group are of a kind that the optimizer can write.

    Raises:
        TypeError: not dense and real floating point.
        ValueError: the same parameter twice.
        NotImplementedError: a tensor that is made of tensors, unless it is a DTensor; float64 with a state of fewer
            bytes.
    """
    params = group["params"]
    for k, param in enumerate(params):
        if sharding.is_dtensor(param):
            sharding.check_dtensor(_name(group, k), param)
            param = sharding.local(param)
        check_plain(param, group, k, "params")
        check_gradient("params", param)
        if param.dtype is torch.float64 and state_dtype_of(group) is not torch.float32:
            refuse_exact(group, k)
    if len(set(params)) != len(params):
        raise ValueError("params: the same parameter appears more than once in the group")


def check_plain(tensor: Tensor, group: Mapping[str, Any], k: int, what: str) -> None:
    """Raise NotImplementedError for a tensor without memory of its own: kernels need a pointer."""
    if type(tensor) in (Tensor, Parameter) or not is_traceable_wrapper_subclass(tensor):
        return
    raise NotImplementedError(
        f"{what}: parameter {_name(group, k)} is a {type(tensor).__name__}, and only plain tensors, or DTensors of "
        "them, can be stepped"
    )


def _name(group: Mapping[str, Any], k: int) -> str:
    """The k-th parameter of a group, for messages."""
    names = group.get("param_names")
    if names and k < len(names):
        return repr(names[k])
    return f"{k} of its group, of shape {tuple(group['params'][k].shape)}"


def check_group_problems(group: Mapping[str, Any], network: CoordinatewiseLSTM, reduce: Reduce | None) -> None:
    """Raise ValueError unless every parameter holds the group's number of problems side by side."""
    problems = check_problems(group["num_problems"], 0)
    if network.config.averages and problems != 1:
        raise ValueError(
            f'num_problems: expected 1 for a network with preprocess="normalized", whose tensors have one age and one '
            f"vector of inputs each, got {problems}; give every problem parameters of its own"
        )
    check_sharding(group, network, reduce)
    check_whole_matrices(network, reduce)
    if not network.communicates:
        return
    for param in group["params"]:
        check_problems(group["num_problems"], param.numel())
    if reduce is not None and network.has_memory:
        raise NotImplementedError("process_group: the memory of NTMBFGS cannot be sharded")


def check_sharding(group: Mapping[str, Any], network: CoordinatewiseLSTM, reduce: Reduce | None) -> None:
    """Raise ValueError or NotImplementedError unless ``network`` can step those parameters that are DTensors."""
    name = functools.partial(_name, group)
    sharding.check_group(group["params"], name, network, group["num_problems"], reduce)


def check_whole_matrices(network: CoordinatewiseLSTM, reduce: Reduce | None) -> None:
    """Raise NotImplementedError for matrices that are sharded by hand, whose shards cannot be put together."""
    if network.orthogonal and reduce is not None:
        raise NotImplementedError(
            "process_group: a network that orthogonalizes its updates needs whole matrices, and shards given by hand "
            "do not say what they are shards of; use DTensors"
        )


def check_together(batches: Sequence[Batch]) -> None:
    """Raise unless the kernels will take the tensors of every group, and none that is written is another's: the launch
    of a group checks as much, but by then the groups before it have been written."""
    launches = [batch for batch in batches if batch.params]
    exact = [each for batch in batches for each in batch.exact]
    memories = [(k, batch.memory) for k, batch in enumerate(batches) if batch.memory is not None]
    in_parts = [batch for batch in batches if batch.network.orthogonal]  # of several launches, to other memory
    for batch in in_parts:
        for common in (batch.common, batch.exact_common):
            if common.tensor_inputs is not None:
                batch.network.orthogonal_gains(common.tensor_inputs[:0])  # of none: whether the weight fits
    if len(launches) < 2 and not exact and not memories:
        if launches and in_parts:
            joint.fused_step(launches[0], None, (), check_only=True)
        return
    for batch in batches:
        # The first launch has nothing before it: what it refuses, it refuses in time.
        if batch.params and (batch is not launches[0] or exact or batch.network.orthogonal):
            joint.fused_step(batch, None, (), check_only=True)
        for param, grad, _ in batch.exact:
            if param.shape != grad.shape:
                raise ValueError(f"grad: expected shape {tuple(param.shape)} as params, got {tuple(grad.shape)}")
    params = [param for batch in batches for param in batch.params] + [param for param, _, _ in exact]
    grads = [grad for batch in batches for grad in batch.grads] + [grad for _, grad, _ in exact]
    states = [state for batch in batches for state in batch.states] + [state for _, _, state in exact]
    if memories:
        _check_apart_with_memories(params, grads, states, memories)
    else:
        operators.check_apart(params, grads, states)


_NOTHING: list[Tensor] = []  # in the place of the states that memories do not have


def _check_apart_with_memories(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], memories: Sequence[tuple[int, Memory]]
) -> None:
    """The same for what memories hold, too, which is written as parameters are; named as in the optimizer's state."""
    tensors = [value for _, memory in memories for value in memory.tensors().values()]
    while len(_NOTHING) < len(tensors):
        with torch.inference_mode(False):
            _NOTHING.append(torch.empty(1, device="cpu"))
    try:
        operators.check_apart(params + tensors, grads, states + _NOTHING[: len(tensors)])
    except (ValueError, RuntimeError) as error:
        held = [f"{name!r} of param_groups[{k}]" for k, memory in memories for name in memory.tensors()]
        names = {f"params[{len(params) + j}]": name for j, name in enumerate(held)}
        text = re.sub(r"params\[\d+\]", lambda found: names.get(found[0], found[0]), str(error))
        raise type(error)(text) from None


def check_devices(param: Tensor, grad: Tensor, phi: Tensor, fused: bool) -> None:
    """Raise unless all are on one device, for which there is a kernel."""
    if not param.device == grad.device == phi.device:
        raise ValueError(
            f"params, their gradients and the network must be on one device, got {param.device}, {grad.device} and "
            f"{phi.device}"
        )
    if fused:
        operators.require_kernel("step_", param.device)
