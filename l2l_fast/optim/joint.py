"""Steps of a parameter group: of each tensor by itself, or of all as one where the coordinates communicate.

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
from ..kernels.surroundings import without_autocast
from ..networks.memory import Memory
from . import orthogonal, sharding
from .state import as_state, modernized

if TYPE_CHECKING:
    from .batch import Batch
    from .tensor_features import Common

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


def fused_step(
    batch: Batch,
    gradients: Tensor | None,
    places: Sequence[int],
    begun: Callable[[], None] = lambda: None,
    check_only: bool = False,
) -> Tensor | None:
    """One step of the fused tensors of a group by the operator.

    Args:
        gradients, places: where the operator shall write what the network saw, if a segment keeps it; ``record`` and
            ``record_tiles`` of :func:`l2l_fast.kernels.operators.step_`.
        begun: called when the operator has taken its arguments and written something.
        check_only: raise what the operator would raise, and write nothing.

    Returns:
        The means ``[num_layers, num_problems, gac_cells]`` of a joint step, else None.
    """
    if batch.joint:
        with without_autocast(batch.phi.device):
            return _joint_step(batch, gradients, places, begun, check_only)
    scalars = batch.lr, batch.weight_decay, batch.maximize
    phi = batch.phi.float()
    if batch.network.orthogonal and not check_only:
        for part in orthogonal.parts_of(batch):
            own = part.places
            targets = orthogonal.targets_of(batch, part)
            tensors = targets, [batch.grads[k] for k in own], [batch.states[k] for k in own], phi
            seeds = [batch.seeds[k] for k in own] if batch.seeds else ()
            options = {"seeds": seeds, "precision": batch.precision, **batch.common.of(own)._asdict()}
            _launch(tensors, batch.config, *scalars, begun=begun, check_only=False, **options)
            orthogonal.move(batch, part, targets)
        return None
    recorded = {"record": gradients, "record_tiles": places, "seeds": batch.seeds, **batch.common._asdict()}
    recorded["precision"] = batch.precision
    tensors = batch.params, batch.grads, batch.states, phi
    _launch(tensors, batch.config, *scalars, begun=begun, check_only=check_only, **recorded)
    return None


def _launch(tensors: tuple[Any, ...], *args: Any, begun: Callable[[], None], check_only: bool, **options: Any) -> None:
    """:func:`operators.step_`, then ``begun``: also where an interrupt comes, which waits until the operator returns
    and is raised as if out of it. tensors: its first four arguments."""
    if check_only:
        operators.step_(*tensors, *args, check_only=True, **options)
        return
    first = next(iter(tensors[0]), None)
    version = None if first is None or first.is_inference() else first._version
    try:
        operators.step_(*tensors, *args, check_only=False, **options)
        begun()
    except Exception:
        raise  # refused: nothing has been written
    except BaseException:
        if first is not None and (version is None or first._version != version):
            begun()
        raise


def _joint_step(
    batch: Batch, gradients: Tensor | None, places: Sequence[int], begun: Callable[[], None], check_only: bool
) -> Tensor:
    config, num_problems, phi = batch.config, batch.num_problems, batch.phi.float()
    means = torch.zeros(config.num_layers, num_problems, config.gac_cells, dtype=torch.float32, device=phi.device)
    sums = torch.zeros(2, num_problems, config.gac_cells, dtype=torch.float64, device=phi.device)
    extra = out = gradient = None
    lr, decay = (0.0, 0.0) if batch.network.moves else (batch.lr, batch.weight_decay)  # then _move is what moves theta
    with_out = config.num_outputs > 1 or batch.reduce is not None or batch.memory is not None
    numels = [param.numel() for param in batch.params] if with_out else []
    if batch.memory is not None:
        reads = batch.memory.reads
        if check_only:
            extra = reads.new_empty(config.extra_inputs, sum(numels))
        elif batch.network.moves:
            gradient = _joined_gradient(batch, batch.memory)
            extra = _by_tensor(batch.network.seen(gradient, batch.memory), numels)
        else:
            extra = _by_tensor(batch.memory.read(reads), numels)
    if with_out:
        out = torch.empty(config.num_outputs, sum(numels), dtype=torch.float32, device=phi.device)
    launches = [(batch.params, batch.grads, batch.states, places, out, sums)]
    if batch.mesh is not None and out is not None:
        launches = _counted_and_copies(batch, places, out, sums)

    def run(first_phase: int, last_phase: int) -> None:
        for params, grads, states, tiles, outputs, own_sums in launches:
            if not params:
                continue
            _launch(
                *((params, grads, states, phi), config, lr, decay, batch.maximize),
                begun=begun,
                check_only=check_only,
                record=gradients,
                record_tiles=tiles,
                extra=extra,
                out=outputs,
                num_problems=num_problems,
                means=means,
                sums=own_sums,
                phases=(first_phase, last_phase),
            )

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
        if gradient is not None:
            _move(batch, batch.params, _by_problem(out, numels, num_problems), gradient, batch.memory)
            return means
        batch.network.write_(_by_problem(out, numels, num_problems), batch.memory)
        if batch.network.add_read and extra is not None:
            for param, read in zip(batch.params, extra[0].split(numels), strict=True):
                param.add_(read.view_as(param).to(param.dtype), alpha=batch.lr)
    return means


def _joined_gradient(batch: Batch, memory: Memory) -> Tensor:
    """What the network sees of the gradients, as one, ``[num_problems, n]``."""
    sign = -1.0 if batch.maximize else 1.0
    parts = [sign * grad.reshape(-1).to(memory.reads.dtype) for grad in batch.grads]
    return reference.join(parts, batch.num_problems).view(memory.num_problems, memory.size)


@torch.no_grad()
def _move(batch: Batch, params: Sequence[Tensor], out: Tensor, grad: Tensor, memory: Memory) -> None:
    """The step of a network that ``moves``: parameters and memory."""
    numels, num_problems = [param.numel() for param in params], batch.num_problems
    update, written = batch.network.move(out, grad, memory, batch.lr)
    step = batch.lr * update
    if batch.weight_decay:  # a part of the way that the change of the gradient belongs to
        theta = reference.join([param.reshape(-1).to(step.dtype) for param in params], num_problems)
        step = step - batch.lr * batch.weight_decay * theta.view_as(step)
    for param, part in zip(params, reference.separate(step.reshape(-1), numels, num_problems), strict=True):
        param.copy_(param.to(step.dtype) + part.view_as(param))
    batch.network.keep_(written, step, memory)


def _counted_and_copies(batch: Batch, places: Sequence[int], out: Tensor, sums: Tensor) -> list[tuple[Any, ...]]:
    """What is launched of a group on a mesh: the tensors whose coordinates this process counts, then those that others
    count, with sums of their own, which are dropped."""
    counts = [sharding.counts_here(key, batch.mesh) for key in batch.keys()]
    launches = []
    for wanted, into in ((True, sums), (False, torch.zeros_like(sums))):
        chosen = [k for k, counted in enumerate(counts) if counted == wanted]
        lists = [[each[k] for k in chosen] for each in (batch.params, batch.grads, batch.states)]
        tiles = [places[k] for k in chosen] if places else places
        numel = sum(param.numel() for param in lists[0])
        launches.append((*lists, tiles, out.new_empty(out.shape[0], numel), into))
    return launches


@torch.no_grad()
def exact_step(batch: Batch, together: Sequence[tuple[Tensor, Tensor, Tensor]], common: Common) -> None:
    """One step of those exact tensors (parameter, gradient, state) that are one, through the reference in float64."""
    with without_autocast(batch.phi.device):
        numels, num_problems = [param.numel() for param, _, _ in together], batch.num_problems
        sign = -1.0 if batch.maximize else 1.0
        grad = reference.join([sign * grad.reshape(-1).double() for _, grad, _ in together], num_problems)
        age = common.ages[0] - 1 if common.ages else 0  # a network with averages steps every tensor alone
        states = [as_state(tiles, param.numel(), batch.config, age) for param, _, tiles in together]
        told, nominal = (None if each is None else each[0].double() for each in common[1:])
        state = reference.join_states([each.to_logical() for each in states], num_problems)
        extra = by_problem = None
        if batch.memory is not None:
            if batch.network.moves:
                by_problem = grad.view(batch.memory.num_problems, batch.memory.size)
                extra = batch.network.seen(by_problem, batch.memory).flatten(1)
            else:
                extra = batch.memory.read(batch.memory.reads).flatten(1)
        phi = batch.phi.double()
        out, state = reference.lstm_step(grad, state, phi, batch.config, num_problems, extra, told, nominal)
        out = out.view(batch.config.num_outputs, grad.numel())
        for (_, _, old), new in zip(together, reference.separate_states(state, numels, num_problems), strict=True):
            old.copy_(State.from_logical(new).data)
        if batch.memory is not None and by_problem is not None:
            _move(batch, [param for param, _, _ in together], out, by_problem, batch.memory)
            return
        update = out[0] if extra is None or not batch.network.add_read else out[0] + extra[0]
        for (param, _, _), part in zip(together, reference.separate(update, numels, num_problems), strict=True):
            if batch.network.orthogonal:
                orthogonal.move_exact(batch, param, batch.lr * part, common)
                continue
            param.mul_(1.0 - batch.lr * batch.weight_decay).add_(part.view_as(param).to(param.dtype), alpha=batch.lr)
        if batch.memory is not None:
            batch.network.write_(out, batch.memory)


def memory_entries(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a memory is made of (:meth:`CoordinatewiseLSTM.memory_for`), in the state ``entry`` of the first parameter
    of its group; empty if there is none yet."""
    if "step" in entry or "memory" in entry:
        entry = modernized(entry)
    return {key: entry[key] for key in Memory.KEYS if key in entry}


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
