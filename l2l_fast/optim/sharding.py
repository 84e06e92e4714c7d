"""Parameters that are DTensors (``torch.distributed.tensor``): sharded by ``fully_shard`` (FSDP2), by tensor
parallelism, or replicated.

Kernels need a pointer, so every process steps its own shard, which the DTensor holds, and the optimizer's live state is
of the shard's size. What runs over all coordinates of a tensor, or of all tensors, is added up over the mesh: each
coordinate once, though several processes may hold copies of it. Those that are not at place 0 of every dimension of the
mesh that replicates add nothing; so what comes out is the same on all processes even where copies should differ. In
checkpoints a state is a DTensor with the placements of its parameter, whose dimensions come first in both.

Placements, shapes and dtypes are known to all processes alike. What is decided here is decided by them, or asked of all
(:func:`everywhere`): a process that raised or went another way would leave the others waiting.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kernels.state import TILE
from ..networks.lstm import CoordinatewiseLSTM
from .state import STATE_KEY, is_live

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# ---- one tensor ----


def is_dtensor(x: Any) -> TypeGuard[DTensor]:
    """Whether ``x`` is a DTensor; does not import them, which takes a while: who has one has done that."""
    if type(x) in (Tensor, Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, getattr(module, "DTensor", ()))


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, in the memory of the DTensor, or the plain tensor itself."""
    if not is_dtensor(x):
        return x
    held = x._local_tensor  # to_local() makes a new Parameter of it every time
    return held.wait() if hasattr(held, "wait") else held  # the result of a collective that may still be under way


def mark_written(params: Iterable[Tensor]) -> None:
    """Tell autograd that the shards of these DTensors were written to, as an operation on the DTensors would."""
    for param in params:
        if not param.is_inference():
            torch.autograd.graph.increment_version(param)


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient of this process's shard of ``param``. One of other placements (partial sums of a replicated
    parameter, say) is redistributed first, by all processes alike.

    Raises:
        ValueError: a DTensor on another mesh, or none where the parameter is one.
    """
    if not is_dtensor(param):
        return grad
    if not is_dtensor(grad):
        raise ValueError(f"grad: expected a DTensor, as its parameter of shape {tuple(param.shape)} is, got a tensor")
    if grad.device_mesh != param.device_mesh:
        raise ValueError(
            f"grad: expected the mesh of the parameter of shape {tuple(param.shape)}, {param.device_mesh}, got "
            f"{grad.device_mesh}"
        )
    return local(_placed(grad.detach(), param))


def _placed(x: Any, param: Any) -> Any:
    """A DTensor on the mesh of ``param``, with the placements of ``param``."""
    return x if x.placements == param.placements else x.redistribute(param.device_mesh, param.placements)


def _splits(placement: Any) -> bool:
    return not (placement.is_replicate() or placement.is_partial())  # strided shards have a class of their own


def _mesh_of(param: Any) -> Any:
    """The mesh over which a parameter is sharded; None where every process holds all of it."""
    return param.device_mesh if is_dtensor(param) and any(map(_splits, param.placements)) else None


def counts_here(param: Any, mesh: Any) -> bool:
    """Whether it is for this process to add its coordinates of ``param`` to a sum over ``mesh``. A plain tensor is held
    by all."""
    place = mesh.get_coordinate()
    if place is None:
        return False
    splits = map(_splits, param.placements) if is_dtensor(param) else [False] * mesh.ndim
    return all(split or index == 0 for split, index in zip(splits, place, strict=True))


def part_of(param: Any) -> tuple[int, int]:
    """tile and part of this process's shard, as :func:`l2l_fast.kernels.state_types.seed_of` takes them: random numbers
    are those of the coordinates, wherever they are, if the shard begins with a tile of the whole."""
    place = param.device_mesh.get_coordinate()
    splits = [(dim, each) for dim, each in enumerate(param.placements) if _splits(each)]
    if not splits or place is None:
        return 0, 0
    shape, rows, begin = param.shape, 0, 0
    if all(type(each).__name__ == "Shard" and each.dim == 0 for _, each in splits):
        rows = shape[0]
        for dim, _ in splits:  # as torch.chunk does, dimension by dimension
            size = -(-rows // param.device_mesh.size(dim))
            first = min(size * place[dim], rows)
            begin, rows = begin + first, min(size, rows - first)
        first_coordinate = begin * shape[1:].numel()
        if first_coordinate % TILE == 0:
            return first_coordinate // TILE, 0
    number = 0
    for dim, _ in splits:
        number = number * param.device_mesh.size(dim) + place[dim]
    return 0, 1 + number


# ---- sums over processes ----


def meshes(params: Iterable[Tensor], of_copies: bool = False) -> list[Any]:
    """The meshes over which some of the parameters are sharded, or also those that hold copies of some; each once, in
    an order that all processes agree on."""
    found: list[Any] = []
    for param in params:
        mesh = param.device_mesh if of_copies and is_dtensor(param) else _mesh_of(param)
        if mesh is not None and mesh not in found:
            found.append(mesh)
    return found


def add_up(x: Tensor, mesh: Any) -> None:
    """The sum of ``x`` over the processes of ``mesh``, in place; processes outside of it do nothing."""
    if mesh.get_coordinate() is None:
        return
    if mesh.ndim > 1 and mesh.size() == torch.distributed.get_world_size():
        _all_reduce(x, mesh, [None])
    else:
        _all_reduce(x, mesh, [mesh.get_group(dim) for dim in range(mesh.ndim)])


def _all_reduce(x: Tensor, mesh: Any, groups: Sequence[Any]) -> None:
    offloaded = x.device.type != mesh.device_type  # shards may be kept on the CPU
    there = x.to(mesh.device_type) if offloaded else x
    for group in groups:
        torch.distributed.all_reduce(there, group=group)
    if offloaded:
        x.copy_(there)


def everywhere(flag: bool, params: Iterable[Tensor]) -> bool:
    """Whether ``flag`` holds on all processes that hold any part of the parameters."""
    found = meshes(params, of_copies=True)
    if not found:
        return flag
    against = torch.full((1,), float(not flag), dtype=torch.float64, device=found[0].device_type)
    for mesh in found * len(found):  # as often as news may need to go from mesh to mesh
        add_up(against, mesh)
    return not bool(against.any())


class Adder:
    """Adds up over a mesh as :func:`add_up`, in autograd: what the sums reach on one process reaches all addends."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self._token = torch.zeros((), device="cpu")

    def __call__(self, x: Tensor) -> Tensor:
        total, self._token = _Added.apply(x, self._token, self.mesh)
        return total


class _Added(torch.autograd.Function):
    # The token makes a chain of all sums, so that all processes go back through them in one order.
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, mesh: Any) -> tuple[Tensor, Tensor]:
        ctx.mesh = mesh
        total = x.detach().clone()
        add_up(total, mesh)
        return total, token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, token: Tensor) -> tuple[Tensor, Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        add_up(total, ctx.mesh)
        return total, token, None


def adds_by_tensor(params: Sequence[Tensor]) -> Callable[[Tensor], None] | None:
    """A function that adds up rows ``[len(params), ...]``, one per parameter, over the processes that share it, in
    place, by one collective per mesh; None if none is sharded."""
    found = meshes(params)
    if not found:
        return None

    def add(rows: Tensor) -> None:
        for mesh in found:
            places = [k for k, param in enumerate(params) if _mesh_of(param) == mesh]
            if mesh.get_coordinate() is None:
                continue
            part = rows[places]
            for j, k in enumerate(places):
                if not counts_here(params[k], mesh):
                    part[j].zero_()  # not times 0: it may be infinite
            add_up(part, mesh)
            rows[places] = part

    return add


def from_counted(x: Tensor, param: Any, mesh: Any) -> Tensor:
    """To all processes with the same coordinates of ``param``, what the one has in which they count, where it is; the
    others have zeros of that shape, which is overwritten."""
    splits = map(_splits, param.placements) if is_dtensor(param) else [False] * mesh.ndim
    _all_reduce(x, mesh, [mesh.get_group(dim) for dim, split in enumerate(splits) if not split])
    return x


def by_mesh(params: Sequence[Tensor]) -> list[tuple[Any, bool, list[Tensor]]]:
    """The parameters in parts of one mesh, None where each process holds all of them, and whether they count here."""
    parts: list[tuple[Any, bool, list[Tensor]]] = []
    for param in params:
        mesh = _mesh_of(param)
        counts = mesh is None or counts_here(param, mesh)
        for known, same, members in parts:
            if known == mesh and same == counts:
                members.append(param)
                break
        else:
            parts.append((mesh, counts, [param]))
    return parts


class Totals:
    """Gradients of networks, added up over parts of their coordinates and then over processes."""

    def __init__(self) -> None:
        self._networks: dict[int, CoordinatewiseLSTM] = {}
        self._meshes: list[Any] = [None]
        self._sums: dict[tuple[int, int], Tensor] = {}  # by network and mesh

    def add(self, network: CoordinatewiseLSTM, grad_phi: Tensor, mesh: Any, counts: bool) -> None:
        """What a part of :func:`by_mesh` gives. It is for all processes to call this, in one order, also with zeros."""
        self._networks.setdefault(id(network), network)
        if mesh not in self._meshes:
            self._meshes.append(mesh)
        key = id(network), self._meshes.index(mesh)
        grad_phi = grad_phi if counts else torch.zeros_like(grad_phi)
        self._sums[key] = self._sums[key] + grad_phi if key in self._sums else grad_phi

    def over_processes(self) -> list[tuple[CoordinatewiseLSTM, Tensor]]:
        """The networks with their gradients, the same on all processes; one collective per mesh."""
        for j, mesh in enumerate(self._meshes):
            keys = [key for key in self._sums if key[1] == j]
            if mesh is None or not keys:
                continue
            together = torch.cat([self._sums[key].double() for key in keys])
            add_up(together, mesh)
            parts = together.split([self._sums[key].numel() for key in keys])
            self._sums.update((key, part.to(self._sums[key].dtype)) for key, part in zip(keys, parts, strict=True))
        found = []
        for number, network in self._networks.items():
            first, *others = (total for (owner, _), total in self._sums.items() if owner == number)
            found.append((network, sum(others, first)))
        return found


# ---- checks ----


def check_dtensor(name: str, param: Any) -> None:
    """Raise ValueError for a DTensor that is a sum yet to be made."""
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"params: parameter {name} is a DTensor of partial sums, {param.placements}; expected shards or copies"
        )


def check_group(
    params: Sequence[Tensor], names: Callable[[int], str], network: CoordinatewiseLSTM, num_problems: int, reduce: Any
) -> None:
    """Raise NotImplementedError or ValueError, naming the parameter, unless ``network`` can step these parameters where
    some are DTensors. reduce: that of a process group, if the optimizer was given one."""
    first = next((k for k, param in enumerate(params) if is_dtensor(param)), None)
    if first is None:
        return
    if network.has_memory:
        raise NotImplementedError(
            f"params: parameter {names(first)} is a DTensor, and the memory of NTMBFGS cannot be sharded; use a "
            "network without memory"
        )
    if reduce is not None and (network.communicates or network.tensor_inputs):
        raise ValueError(
            f"process_group: expected None, as parameter {names(first)} is a DTensor, whose mesh says over which "
            "processes to add up"
        )
    if not network.communicates:
        return
    if num_problems != 1:
        raise NotImplementedError(
            f"num_problems: parameter {names(first)} is a DTensor, and averages over it run over one problem, got "
            f"{num_problems}"
        )
    found = meshes(params)
    if len(found) > 1:
        other = next(k for k, param in enumerate(params) if _mesh_of(param) == found[1])
        raise NotImplementedError(
            f"params: parameter {names(other)} is sharded over another mesh than those before it in its group, and "
            "averages (gac_cells) run over all of a group; give it a group of its own"
        )


# ---- checkpoints ----


def whole(saved: Tensor, param: Any) -> Tensor:
    """The saved state of this process's shard, one dimension more than the shard has, as a DTensor that is placed as
    ``param`` is. Shards of a plain parameter, and states of other forms, are left as they are."""
    if not is_dtensor(param) or is_dtensor(saved) or saved.shape[:-1] != local(param).shape:
        return saved
    from torch.distributed.tensor import DTensor  # not above: see is_dtensor

    shape = torch.Size((*param.shape, saved.shape[-1]))  # of uneven shards it cannot be told from the local one
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = param.device_mesh, param.placements
    return DTensor.from_local(saved, mesh, placements, run_check=False, shape=shape, stride=stride)


def local_entry(entry: Mapping[str, Any], param: Any) -> Mapping[str, Any]:
    """An entry of the optimizer's state with the state of this process's shard of ``param``. A DTensor of any
    placements is redistributed, by all processes alike; of the state of a whole parameter, as one process saves it,
    each takes its part.

    Raises:
        ValueError: it is of no such shape.
    """
    saved = entry.get(STATE_KEY)
    if not isinstance(saved, Tensor):
        return entry
    if not is_dtensor(param):
        return {**entry, STATE_KEY: saved.full_tensor()} if is_dtensor(saved) else entry
    if is_live(entry) and not is_dtensor(saved):
        return entry
    if saved.shape[:-1] != param.shape and saved.dim() == 4 and saved.shape[0] == param.numel():
        saved = saved.reshape(*param.shape, saved.shape[1:].numel())  # before 0.2: flat
    if saved.shape[:-1] != param.shape:
        raise ValueError(
            f"state_dict: expected {STATE_KEY!r} of the shape {tuple(param.shape)} of the whole parameter, a DTensor, "
            f"and one dimension more, got {tuple(saved.shape)}"
        )
    if is_dtensor(saved) and saved.device_mesh != param.device_mesh:
        saved = saved.full_tensor()
    if not is_dtensor(saved):
        from torch.distributed.tensor import DTensor, Replicate

        copies = [Replicate()] * param.device_mesh.ndim
        saved = DTensor.from_local(saved.detach().contiguous(), param.device_mesh, copies, run_check=False)
    return {**entry, STATE_KEY: local(_placed(saved.detach(), param))}
