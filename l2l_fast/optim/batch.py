"""What a parameter group does in one step: collected and checked before anything is written, in any group."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import isfinite
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kernels.checks import check_gradient, check_problems
from ..kernels.config import Config
from ..kernels.operators import KERNEL_DTYPES
from ..kernels.state import num_tiles
from ..kernels.state_types import seed_of, tile_shape, zeros
from ..networks.lstm import CoordinatewiseLSTM
from ..networks.memory import Memory
from . import joint, sharding
from .checks import (
    check_devices,
    check_plain,
    check_precision,
    check_sharding,
    check_state_dtype,
    check_total_steps,
    check_whole_matrices,
    number,
    refuse_exact,
    refuse_reference,
    truth,
)
from .joint import Reduce
from .state import NUMEL_KEY, STATE_KEY, alignment_of, steps_of, tiles_of
from .tensor_features import Common, TensorFeatures, common_of, needs_sums
from .tensor_sums import sums_of

_EMPTY: Mapping[str, Any] = MappingProxyType({})


_EMPTY_OWNERS: Mapping[int, Tensor] = MappingProxyType({})


class Batch(NamedTuple):
    """What one parameter group does in one step, as :func:`gather` decides: which tensors the fused kernel takes and
    which are *exact*, and whether each of them is a step of its own or the step is *joint*, one of all of them.

    Exact are tensors with float64 in the parameter or its gradient: their state is float64, and they go through
    :mod:`l2l_fast.kernels.reference` in float64, in steps and in segments. Joint are the steps of networks with global
    averages, a memory or several outputs. All tensors of a joint step are either fused or exact.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    exact: list[tuple[Tensor, Tensor, Tensor]]
    fresh: list[tuple[Tensor, Tensor]]  # parameters with states that are not yet among the optimizer's
    network: CoordinatewiseLSTM
    phi: Tensor
    config: Config
    lr: float
    weight_decay: float
    maximize: bool
    joint: bool
    num_problems: int = 1
    memory: Memory | None = None
    reduce: Reduce | None = None
    common: Common = Common()  # of the fused tensors
    exact_common: Common = Common()
    alignments: Sequence[Tensor] = ()  # of the fused, then the exact tensors, after the step
    mesh: Any = None  # of a joint step whose coordinates are sharded over one, which ``reduce`` adds up over
    owners: Mapping[int, Tensor] = _EMPTY_OWNERS  # of shards, by their id: the parameters, DTensors
    steps: Sequence[int] = ()  # of the fused tensors after the step, where their states are not float32
    seeds: Sequence[int] = ()  # of the rounding of such states
    precision: str = "float32"  # of the products of the fused tensors

    def moving(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(parameter, gradient, state) of all tensors, the fused ones first."""
        return [*zip(self.params, self.grads, self.states, strict=True), *self.exact]

    def keys(self) -> list[Tensor]:
        """The parameters as the optimizer knows them, in the order of :meth:`moving`, which has shards of DTensors."""
        params = [*self.params, *(param for param, _, _ in self.exact)]
        return [self.owners.get(id(param), param) for param in params] if self.owners else params

    def exact_steps(self) -> list[tuple[list[tuple[Tensor, Tensor, Tensor]], Common]]:
        """The exact tensors (there are some), those that step together in one list, and what they have in common."""
        if self.joint:
            return [(self.exact, Common())]
        return [([each], self.exact_common.of([k])) for k, each in enumerate(self.exact)]

    def ages(self) -> list[tuple[Tensor, int]]:
        """The parameters whose steps are counted, and their numbers after the step."""
        if not self.config.averages:
            return list(zip(self.keys(), self.steps))
        return list(zip(self.keys(), [*self.common.ages, *self.exact_common.ages]))


def gather(
    group: Mapping[str, Any],
    network: CoordinatewiseLSTM,
    phi: Tensor,
    state: Mapping[Tensor, Mapping[str, Any]],
    reduce: Reduce | None,
    tensor_features: TensorFeatures | None = None,
    first: int = 0,
    precision: str = "float32",
) -> Batch:
    """What a parameter group does in a step, checked as far as Python sees it; ``state`` is the optimizer's, which is
    only read. tensor_features: see :func:`l2l_fast.optim.tensor_features.common_of`. first: parameters of the groups
    before it. precision: of the products of the layers' weights.

    Raises:
        TypeError, ValueError, NotImplementedError: an option, gradient, parameter or state that does not fit.
    """
    lr, decay = group["lr"], group["weight_decay"]
    lr = lr if type(lr) is float and isfinite(lr) else number("lr", lr)
    decay = decay if type(decay) is float and isfinite(decay) else number("weight_decay", decay)
    maximize = group["maximize"]
    maximize = maximize if type(maximize) is bool else truth("maximize", maximize)
    config = network.config
    batch = Batch([], [], [], [], [], network, phi, config, lr, decay, maximize, not config.is_plain)
    all_exact = False
    if batch.joint:
        batch, all_exact = _with_others(group, batch, state, reduce)
    if precision != "float32":
        check_precision(precision, network)
        batch = batch._replace(precision=precision)
    on_cpu, state_dtype = phi.is_cpu, check_state_dtype(group, network)
    rounded = state_dtype is not torch.float32
    params, grads, states, state_of = batch.params, batch.grads, batch.states, state.get
    owners: dict[int, Tensor] = {}
    entries: list[Mapping[str, Any]] = []  # of the fused tensors
    exact_entries: list[Mapping[str, Any]] = []
    steps: list[int] = []
    seeds: list[int] = []
    shapes: dict[int, tuple[int, ...]] = {}  # of states, by the number of coordinates
    for k, param in enumerate(group["params"]):
        grad = param.grad
        if grad is None:
            continue
        key, entry = param, state_of(param, _EMPTY)
        if type(param) is not Parameter or type(grad) is not Tensor:
            if sharding.is_dtensor(param):
                entry = sharding.local_entry(entry, key)
                param, grad = sharding.local(key), sharding.local_gradient(key, grad)
                owners[id(param)] = key
            check_plain(param, group, k, "params")
            check_plain(grad, group, k, "grad")
        fused = grad.dtype in KERNEL_DTYPES and param.dtype in KERNEL_DTYPES and not all_exact
        if not fused or grad.layout is not torch.strided:
            check_gradient("params", param)
            check_gradient("grad", grad)
            if rounded and not fused:
                refuse_exact(group, k)
            if precision != "float32" and not fused:
                refuse_reference(precision, group, k)
        if not (on_cpu and param.is_cpu and grad.is_cpu):
            check_devices(param, grad, phi, fused)
        dtype = state_dtype if fused else torch.float64
        tiles: Any = entry.get(STATE_KEY)
        numel = param.numel()
        shape = shapes.get(numel)
        if shape is None:
            shape = shapes[numel] = (num_tiles(numel), *tile_shape(config, state_dtype))
        fits = type(tiles) is Tensor and tiles.dtype is dtype and tiles.shape == shape and tiles.is_contiguous()
        if not fits or entry.get(NUMEL_KEY) != numel:
            with torch.inference_mode(False):  # a state outlives the mode that its first step is taken in
                tiles = tiles_of(entry, param, config, dtype)
                if tiles is None:
                    tiles = zeros(numel, config, dtype, param.device)
            batch.fresh.append((key, tiles))
        if fused:
            params.append(param)
            grads.append(grad)
            states.append(tiles)
            entries.append(entry)
            if rounded:
                steps.append(steps_of(entry, None if config.averages else 0) + 1)
                part = sharding.part_of(key) if key is not param else (0, 0)
                seeds.append(seed_of(first + k, steps[-1], *part))
        else:
            batch.exact.append((param, grad, tiles))
            exact_entries.append(entry)
    if owners:
        batch = batch._replace(owners=owners)
    if rounded:
        batch = batch._replace(steps=steps, seeds=seeds)
    return _with_common(group, batch, entries + exact_entries, reduce, tensor_features) if config.averages else batch


def _with_common(
    group: Mapping[str, Any],
    batch: Batch,
    entries: Sequence[Mapping[str, Any]],
    reduce: Reduce | None,
    tensor_features: TensorFeatures | None,
) -> Batch:
    """The batch with what a network with averages has to know of every tensor. entries: of the optimizer's state, in
    the order of ``batch.moving()``."""
    check_whole_matrices(batch.network, reduce)
    total_steps = check_total_steps(group["total_steps"])
    moving = batch.moving()
    params = batch.keys()
    ages = [steps_of(entry) + 1 for entry in entries]
    sums, before = None, []
    if needs_sums(batch.network, tensor_features):
        adds = sharding.adds_by_tensor(group["params"]) if reduce is None else reduce
        sums = sums_of(group["params"], moving, batch.config, batch.maximize, ages, adds, params)
        before = [alignment_of(entry, param) for entry, param in zip(entries, params, strict=True)]
    common, after = common_of(params, ages, batch.network, total_steps, tensor_features, sums, before)
    batch = batch._replace(alignments=after)
    if not batch.exact:
        return batch._replace(common=common)
    fused = len(batch.params)
    parts = common.of(range(fused)) if fused else Common(), common.of(range(fused, len(params)))
    return batch._replace(common=parts[0], exact_common=parts[1])


def _with_others(
    group: Mapping[str, Any], batch: Batch, state: Mapping[Tensor, Mapping[str, Any]], reduce: Reduce | None
) -> tuple[Batch, bool]:
    """The batch of a joint step, and whether it is exact as a whole."""
    if any(map(sharding.is_dtensor, group["params"])):
        check_sharding(group, batch.network, reduce)
        mesh = next(iter(sharding.meshes(group["params"])), None)
        if mesh is not None:
            reduce, batch = functools.partial(sharding.add_up, mesh=mesh), batch._replace(mesh=mesh)
    # One average cannot run over the kernel and the reference: a single float64 tensor takes all to the latter.
    params, network = group["params"], batch.network
    moving = [param for param in params if param.grad is not None]
    exact = any(torch.float64 in (param.dtype, param.grad.dtype) for param in moving)
    if exact and reduce is not None:
        raise NotImplementedError("step: float64 parameters cannot be sharded, only float32, bfloat16 and float16")
    if reduce is joint.refuse:
        reduce(torch.empty(0))
    num_problems = group["num_problems"]
    if type(num_problems) is not int or num_problems != 1:  # one problem fits always
        check_problems(num_problems, 0)
        for param in moving:
            if param.numel() % num_problems:
                check_problems(num_problems, param.numel())
    memory = None
    if moving and network.has_memory:
        joint.check_all_move(params)
        dtype, numel = torch.float64 if exact else torch.float32, sum(param.numel() for param in params)
        with torch.inference_mode(False):
            entries = joint.memory_entries(state.get(params[0], _EMPTY))
            memory = network.memory_for(numel, num_problems, params[0].device, dtype, entries)
    return batch._replace(num_problems=num_problems, memory=memory, reduce=reduce), exact


def only_make_state(
    batches: Sequence[Batch], state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], reduce: Reduce | None
) -> bool:
    """Whether a step asks for nothing but its state to be made: the first one, with every lr 0 and every gradient zero.

    An LSTM goes on with a gradient of zero as with any other, so that a checkpoint made before the first step would
    hold the state after one. ``groups``: all of the optimizer, whose processes agree; ``reduce``: that of a process
    group, if there is one."""
    if reduce is not None or not all(batch.lr == 0.0 for batch in batches):
        return False  # where a function adds up, other processes may have gradients, and wait
    if any(isinstance(entry, Mapping) and STATE_KEY in entry for entry in state.values()):
        return False
    grads = [grad for batch in batches for grad in (*batch.grads, *(grad for _, grad, _ in batch.exact))]
    zero = not any(grad.is_meta or bool(grad.any()) for grad in grads)
    return sharding.everywhere(zero, (param for group in groups for param in group["params"]))
