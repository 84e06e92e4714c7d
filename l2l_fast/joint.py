"""Steps of a parameter group whose coordinates communicate: global averages over all of its tensors, and a memory.

Global averaging cells and the external memory are those of Andrychowicz et al. 2016, appendix D. With coordinates
sharded over processes, the sums behind the averages are added up between the phases of the step, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import gac_ops, reference
from .memory import NTMBFGS, Memory
from .network import CoordinatewiseLSTM
from .state import State

if TYPE_CHECKING:
    from .optimizer import Batch

MEMORY_KEY = "memory"
Reduce = Callable[[Tensor], Any]


def as_reduce(process_group: Any) -> Reduce | None:
    """A function that adds up a tensor over the processes, in place, from a ``torch.distributed`` process group or from
    such a function.

    Raises:
        TypeError: it is neither.
    """
    if process_group is None or callable(process_group):
        return process_group
    if torch.distributed.is_available() and isinstance(process_group, torch.distributed.ProcessGroup):
        return lambda tensor: torch.distributed.all_reduce(tensor, group=process_group)
    raise TypeError(f"process_group: expected a ProcessGroup or a callable, got {type(process_group).__name__}")


def check_network(network: CoordinatewiseLSTM) -> None:
    """Raise ValueError if the network wants inputs that an optimizer does not have."""
    if network.extra_inputs and not isinstance(network, NTMBFGS):
        raise ValueError(
            f"network: an optimizer cannot supply its {network.extra_inputs} extra inputs; step it yourself"
        )


def fused_step(batch: Batch, record: Tensor | None, record_tiles: Sequence[int]) -> Tensor:
    """One step of the group by the fused operator; returns the means ``[num_layers, groups, gac_cells]``."""
    config, groups, phi = batch.config, batch.groups, batch.phi.float()
    numels = [param.numel() for param in batch.params]
    count = sum(numels) / groups
    means = torch.zeros(config.num_layers, groups, config.gac_cells, dtype=torch.float32, device=phi.device)
    sums = torch.zeros(groups, config.gac_cells, dtype=torch.float64, device=phi.device)
    extra = out = None
    if batch.memory is not None:
        extra = _by_tensor(batch.memory.read(batch.memory.reads), numels)
    if config.num_outputs > 1 or batch.reduce is not None:
        out = torch.empty(config.num_outputs, sum(numels), dtype=torch.float32, device=phi.device)

    def run(first_phase: int, last_phase: int) -> None:
        if batch.params:
            states = [state.data for state in batch.states]
            options = (batch.lr, batch.weight_decay, batch.maximize, record, record_tiles, groups)
            tensors = (batch.params, batch.grads, states, extra, out, phi)
            gac_ops.gac_step_(*tensors, *config, *options, means, sums, max(count, 1.0), first_phase, last_phase)

    if batch.reduce is None or config.gac_cells == 0:
        run(0, config.num_layers + 1)
    else:
        for layer in range(config.num_layers):
            run(layer, layer + 1)
            # A process without coordinates takes part with zeros, or the others would wait for it forever.
            totals = torch.cat([sums.flatten(), sums.new_tensor([count])])
            batch.reduce(totals)
            means[layer].copy_(totals[:-1].view_as(sums) / totals[-1].clamp_min(1.0))
            sums.zero_()
        run(config.num_layers, config.num_layers + 1)
    if batch.memory is not None and out is not None:
        assert isinstance(batch.network, NTMBFGS)
        joined = _by_problem(out, numels, groups)
        batch.memory.write_(*batch.network.heads(joined, batch.memory))
        if batch.network.add_read and extra is not None:
            for param, read in zip(batch.params, extra[0].split(numels), strict=True):
                param.add_(read.view_as(param).to(param.dtype), alpha=batch.lr)
    return means


@torch.no_grad()
def exact_step(batch: Batch) -> None:
    """One step of the group in float64, through the reference."""
    numels = [param.numel() for param, _, _ in batch.exact]
    sign = -1.0 if batch.maximize else 1.0
    grad = reference.join([sign * grad.reshape(-1).double() for _, grad, _ in batch.exact], batch.groups)
    state = reference.join_states([state.to_logical() for _, _, state in batch.exact], batch.groups)
    extra = None
    if batch.memory is not None:
        extra = batch.memory.read(batch.memory.reads).flatten(1)
    out, state = reference.lstm_step(grad, state, batch.phi.double(), batch.config, batch.groups, extra)
    out = out.view(batch.config.num_outputs, -1)
    update = out[0]
    if isinstance(batch.network, NTMBFGS) and batch.network.add_read and extra is not None:
        update = update + extra[0]
    updates = reference.separate(update, numels, batch.groups)
    new_states = reference.separate_states(state, numels, batch.groups)
    for (param, _, old), update, new in zip(batch.exact, updates, new_states, strict=True):
        param.mul_(1.0 - batch.lr * batch.weight_decay).add_(update.view_as(param).to(param.dtype), alpha=batch.lr)
        old.data.copy_(State.from_logical(new).data)
    if batch.memory is not None:
        assert isinstance(batch.network, NTMBFGS)
        batch.memory.write_(*batch.network.heads(out, batch.memory))


def memory_of(entry: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Memory:
    """The memory of a parameter group, kept in the state ``entry`` of its first parameter; a new one at the first step.

    Raises:
        ValueError: some parameter has no gradient: the memory has a place for every coordinate.
    """
    params, network = group["params"], group["network"]
    idle = sum(param.grad is None for param in params)
    if idle:
        raise ValueError(
            f"grad: a network with memory needs a gradient for every parameter of its group, {idle} have none"
        )
    memory = entry.get(MEMORY_KEY)
    if memory is None:
        memory = network.init_memory(sum(param.numel() for param in params), group["groups"], params[0].device, dtype)
    elif memory.reads.dtype != dtype:
        memory = memory.to(memory.reads.device, dtype)
    network.check_memory(memory, sum(param.numel() for param in params))
    entry[MEMORY_KEY] = memory
    return memory


def unpack_memory(saved: Any, params: Sequence[Tensor], network: CoordinatewiseLSTM, groups: int) -> Memory:
    """A group's memory from what :meth:`Memory.tensors` gave.

    Raises:
        TypeError, ValueError: it does not fit the group or the network.
    """
    if not isinstance(network, NTMBFGS):
        raise ValueError("state_dict: a memory was saved, but the group's network has none")
    dtype = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
    memory = network.init_memory(sum(param.numel() for param in params), groups, params[0].device, dtype)
    memory.load(saved)
    return memory


def _by_tensor(x: Tensor, numels: Sequence[int]) -> Tensor:
    """Coordinates ordered by problem ``[C, groups, n]`` to tensor after tensor ``[C, N]``."""
    channels, groups, _ = x.shape
    if len(numels) == 1 or groups == 1:
        return x.reshape(channels, -1).contiguous()
    parts = x.split([numel // groups for numel in numels], dim=2)
    return torch.cat([part.reshape(channels, -1) for part in parts], dim=1)


def _by_problem(x: Tensor, numels: Sequence[int], groups: int) -> Tensor:
    """The inverse of :func:`_by_tensor`, as ``[C, N]``."""
    if len(numels) == 1 or groups == 1:
        return x
    parts = [part.view(x.shape[0], groups, -1) for part in x.split(list(numels), dim=1)]
    return torch.cat(parts, dim=2).flatten(1)
