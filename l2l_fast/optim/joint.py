"""Steps of a parameter group whose coordinates communicate: global averages over all of its tensors, and a memory.

Global averaging cells and the external memory are those of Andrychowicz et al. 2016, appendix D. With coordinates
sharded over processes, the sums behind the averages are added up between the phases of the step, layer by layer.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import operators, reference
from ..kernels.state import State
from ..networks.lstm import CoordinatewiseLSTM
from ..networks.memory import Memory
from ..networks.ntm_bfgs import NTMBFGS
from .state import as_state, modernized

if TYPE_CHECKING:
    from .batch import Batch

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


class Kept:
    """The process group of an optimizer, or the function given in its place, and how it adds up (``reduce``).

    Copies in this process share it. A process group cannot be pickled, so what is unpickled elsewhere has lost it: it
    warns then, and refuses to add up, for means over the own coordinates only would be wrong and look right."""

    def __init__(self, value: Any = None) -> None:
        self.value, self.reduce = value, as_reduce(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if callable(self.value) or self.value is None:
            try:
                pickle.dumps(self.value)
                return Kept, (self.value,)
            except Exception:  # whatever the objects that the function holds raise
                pass
        return _lost, ()


def _lost() -> Kept:
    warnings.warn(
        "process_group: the unpickled optimizer was sharded over a process group, which cannot be pickled; set "
        "optimizer.process_group before its next step",
        stacklevel=2,
    )
    return Kept(refuse)


def refuse(tensor: Tensor) -> None:
    """In the place of a reduction that is lost."""
    raise RuntimeError(
        "process_group: lost when the optimizer was pickled; set optimizer.process_group before the next step"
    )


def check_network(network: CoordinatewiseLSTM) -> None:
    """Raise ValueError if the network wants inputs that an optimizer does not have."""
    if network.extra_inputs and not isinstance(network, NTMBFGS):
        raise ValueError(
            f"network: an optimizer cannot supply its {network.extra_inputs} extra inputs; step it yourself"
        )


def fused_step(
    batch: Batch,
    record: Tensor | None,
    record_tiles: Sequence[int],
    begun: Callable[[], None] = lambda: None,
    check_only: bool = False,
) -> Tensor:
    """One step of the group by the fused operator; returns the means ``[num_layers, num_problems, gac_cells]``.
    ``begun`` is called when the operator has taken its arguments and written something; with ``check_only`` it writes
    nothing."""
    config, num_problems, phi = batch.config, batch.num_problems, batch.phi.float()
    means = torch.zeros(config.num_layers, num_problems, config.gac_cells, dtype=torch.float32, device=phi.device)
    sums = torch.zeros(2, num_problems, config.gac_cells, dtype=torch.float64, device=phi.device)
    extra = out = None
    numels = [] if config.num_outputs == 1 and batch.reduce is None else [param.numel() for param in batch.params]
    if batch.memory is not None:
        shape = (config.extra_inputs, sum(numels))
        reads = batch.memory.reads
        extra = reads.new_empty(shape) if check_only else _by_tensor(batch.memory.read(reads), numels)
    if config.num_outputs > 1 or batch.reduce is not None:
        out = torch.empty(config.num_outputs, sum(numels), dtype=torch.float32, device=phi.device)

    def run(first_phase: int, last_phase: int) -> None:
        if batch.params:
            operators.step_(
                *(batch.params, batch.grads, batch.states, phi, config, batch.lr, batch.weight_decay, batch.maximize),
                record=record,
                record_tiles=record_tiles,
                extra=extra,
                out=out,
                num_problems=num_problems,
                means=means,
                sums=sums,
                phases=(first_phase, last_phase),
                check_only=check_only,
            )
            begun()

    if check_only:
        run(0, config.num_layers + 1)
        return means
    if batch.reduce is None or config.gac_cells == 0:
        run(0, config.num_layers + 1)
    else:
        for layer in range(config.num_layers):
            run(layer, layer + 1)
            # A process without coordinates takes part with zeros, or the others would wait for it forever.
            batch.reduce(sums)  # and the counts of what is finite
            means[layer].copy_(sums[0] / sums[1].clamp_min(1.0))
            sums.zero_()
        run(config.num_layers, config.num_layers + 1)
    if batch.memory is not None and out is not None:
        assert isinstance(batch.network, NTMBFGS)
        joined = _by_problem(out, numels, num_problems)
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
    grad = reference.join([sign * grad.reshape(-1).double() for _, grad, _ in batch.exact], batch.num_problems)
    states = [as_state(tiles, param.numel(), batch.config) for param, _, tiles in batch.exact]
    state = reference.join_states([each.to_logical() for each in states], batch.num_problems)
    extra = None
    if batch.memory is not None:
        extra = batch.memory.read(batch.memory.reads).flatten(1)
    out, state = reference.lstm_step(grad, state, batch.phi.double(), batch.config, batch.num_problems, extra)
    out = out.view(batch.config.num_outputs, grad.numel())
    update = out[0]
    if isinstance(batch.network, NTMBFGS) and batch.network.add_read and extra is not None:
        update = update + extra[0]
    updates = reference.separate(update, numels, batch.num_problems)
    new_states = reference.separate_states(state, numels, batch.num_problems)
    for (param, _, old), update, new in zip(batch.exact, updates, new_states, strict=True):
        param.mul_(1.0 - batch.lr * batch.weight_decay).add_(update.view_as(param).to(param.dtype), alpha=batch.lr)
        old.copy_(State.from_logical(new).data)
    if batch.memory is not None:
        assert isinstance(batch.network, NTMBFGS)
        batch.memory.write_(*batch.network.heads(out, batch.memory))


def memory_of(
    entry: Mapping[str, Any], group: Mapping[str, Any], network: NTMBFGS, dtype: torch.dtype | None = None
) -> Memory | None:
    """The memory of a parameter group, in the state ``entry`` of its first parameter; None if there is none yet. It
    shares the tensors of the entry where they are of ``dtype`` (by default that of the group's arithmetic).

    Raises:
        TypeError, ValueError: it does not fit the group or the network.
    """
    if "step" in entry or "memory" in entry:
        entry = modernized(entry)
    entries = {key: entry[key] for key in Memory.KEYS if key in entry}
    if not entries:
        return None
    params = group["params"]
    if dtype is None:
        dtype = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
    memory = network.memory_from(entries, sum(param.numel() for param in params), group["num_problems"])
    if memory.reads.dtype != dtype or memory.reads.device != params[0].device:
        memory = memory.to(params[0].device, dtype)
    return memory


def check_all_move(params: Sequence[Tensor]) -> None:
    """Raise ValueError if some parameter has no gradient: a memory has a place for every coordinate."""
    idle = sum(param.grad is None for param in params)
    if idle:
        raise ValueError(
            f"grad: a network with memory needs a gradient for every parameter of its group, {idle} have none"
        )


def _by_tensor(x: Tensor, numels: Sequence[int]) -> Tensor:
    """Coordinates ordered by problem ``[C, num_problems, n]`` to tensor after tensor ``[C, N]``."""
    num_problems = x.shape[1]
    if len(numels) == 1 or num_problems == 1:
        return x.flatten(1).contiguous()
    parts = x.split([numel // num_problems for numel in numels], dim=2)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _by_problem(x: Tensor, numels: Sequence[int], num_problems: int) -> Tensor:
    """The inverse of :func:`_by_tensor`, as ``[C, N]``."""
    if len(numels) == 1 or num_problems == 1:
        return x
    parts = [part.view(x.shape[0], num_problems, -1) for part in x.split(list(numels), dim=1)]
    return torch.cat(parts, dim=2).flatten(1)
