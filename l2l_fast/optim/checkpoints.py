"""The state dict of LearnedOptimizer: made of the live state and groups, and taken apart again."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..kernels.config import Config
from ..networks.lstm import CoordinatewiseLSTM
from . import joint, sharding
from .checks import check_group_problems, check_total_steps, number, plain, truth
from .joint import Reduce
from .registry import check_same_network, digest, take_in_renamed
from .state import STATE_KEY, check_structure, dtype_of, modernized, pack_entry, unpack_entry

# In the groups of a checkpoint of half-written state, since nothing else goes through everybody's hands unchanged.
FAILURE_KEY = "half_way"


def pack(
    state: Mapping[Any, Any],
    param_groups: Sequence[Mapping[str, Any]],
    networks: Sequence[CoordinatewiseLSTM],
    failure: str | None = None,
) -> dict[str, Any]:
    """See :meth:`l2l_fast.LearnedOptimizer.state_dict`; ``networks`` are those of the groups, ``failure`` is what
    stopped a step half-way, if one was."""
    index: dict[int, int] = {}
    for k, param in enumerate(chain.from_iterable(group["params"] for group in param_groups)):
        index.setdefault(id(param), k)
    groups = []
    for group, network in zip(param_groups, networks, strict=True):
        packed = {key: plain(value) for key, value in group.items() if key != "params"}
        packed["network"] = {**group["network"], "digest": digest(network)}
        packed["params"] = [index[id(param)] for param in group["params"]]
        if failure is not None:
            packed[FAILURE_KEY] = failure
        groups.append(packed)
    configs = {
        id(param): network.config
        for group, network in zip(param_groups, networks, strict=True)
        for param in group["params"]
    }
    packed_state = {
        index[id(key)] if isinstance(key, Tensor) else key: _packed(value, key, configs.get(id(key)))
        for key, value in state.items()
    }
    return {"state": packed_state, "param_groups": groups}


def _packed(entry: Any, param: Any, config: Config | None) -> Any:
    if config is None:
        return entry  # of no parameter
    if not sharding.is_dtensor(param):
        return pack_entry(entry, param, config)
    packed = pack_entry(entry, sharding.local(param), config)
    if isinstance(packed, dict) and isinstance(packed.get(STATE_KEY), Tensor):
        packed[STATE_KEY] = sharding.whole(packed[STATE_KEY], param)
    return packed


def unpack(
    state_dict: Any,
    param_groups: Sequence[Mapping[str, Any]],
    networks: Sequence[CoordinatewiseLSTM],
    reduce: Reduce | None,
) -> tuple[defaultdict[Any, Any], list[dict[str, Any]]]:
    """State and groups from what :func:`pack` made, for an optimizer with these groups. Nothing is shared with
    ``state_dict`` but what is kept under keys that are no parameters.

    Raises:
        TypeError, ValueError: see :meth:`l2l_fast.LearnedOptimizer.load_state_dict`.
    """
    check_structure(state_dict)
    failures = [group[FAILURE_KEY] for group in state_dict["param_groups"] if FAILURE_KEY in group]
    if failures:
        raise ValueError(
            f"state_dict: saved after a step that failed half-way ({failures[0]}), so that parameters and state do not "
            "belong together; expected one that was saved before"
        )
    groups = copy.deepcopy(state_dict["param_groups"])
    counts = [len(group["params"]) for group in groups], [len(group["params"]) for group in param_groups]
    if counts[0] != counts[1]:
        raise ValueError(
            f"state_dict: expected groups of {counts[1]} parameters (as in the optimizer), got {counts[0]}"
        )
    owners: dict[Any, tuple[Tensor, dict[str, Any], CoordinatewiseLSTM]] = {}
    for new, old, network in zip(groups, param_groups, networks, strict=True):
        check_same_network(new["network"], network, "state_dict")
        take_in_renamed(new)
        for name in ("num_problems", "total_steps"):
            new.setdefault(name, old[name])  # written before there was this option
        owners.update((key, (param, new, network)) for key, param in zip(new["params"], old["params"], strict=True))
        new.update({"params": old["params"], "network": old["network"]})
        new["state_dtype"] = old.get("state_dtype", "float32")
        for name in ("lr", "weight_decay"):
            number(name, new[name])
        truth("maximize", new["maximize"])
        check_total_steps(new["total_steps"])
        check_group_problems(new, network, reduce)
        if "param_names" in old:
            new.setdefault("param_names", old["param_names"])
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, entry in state_dict["state"].items():
        if key not in owners:
            state[key] = entry
            if isinstance(entry, Mapping) and entry.get(STATE_KEY) is not None:
                warnings.warn(
                    f"state_dict: a {STATE_KEY!r} under {key!r}, which is none of the groups' parameters "
                    f"{list(owners)!r}: whose it was will begin anew",
                    stacklevel=5,
                )
            continue
        param, group, network = owners[key]
        entry = sharding.local_entry(modernized(entry), param)
        # The memory of a group is with its first parameter.
        keeps = network.has_memory and param is group["params"][0]
        held = sharding.local(param)
        state[param] = unpack_entry(entry, held, network.config, keeps, dtype_of(held, group))
        if keeps and (entries := joint.memory_entries(entry)):
            state[param].update(_own_memory(entries, group, network))
        if entry and STATE_KEY not in entry:
            warnings.warn(
                f"state_dict: no {STATE_KEY!r} in the state of parameter {key!r}, only {sorted(map(str, entry))}: it "
                "will begin anew",
                stacklevel=5,
            )
    for group, network in zip(groups, networks, strict=True):
        _check_memory_is_there(state, group, network)
    return state, groups


def _own_memory(entries: Mapping[str, Any], group: Mapping[str, Any], network: CoordinatewiseLSTM) -> dict[str, Any]:
    """Copies of the saved ``entries`` of a group's memory, on its device and in the dtype of its arithmetic; TypeError
    or ValueError if they do not fit."""
    params = group["params"]
    dtype = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
    numel = sum(param.numel() for param in params)
    memory = network.memory_for(numel, group["num_problems"], params[0].device, dtype, entries)
    assert memory is not None
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in memory.entries().items()}


def _check_memory_is_there(state: Mapping[Any, Any], group: Mapping[str, Any], network: CoordinatewiseLSTM) -> None:
    """Warn of a memory without states or states without a memory: every step makes both. No error, for the group may
    have been given another network before it was saved."""
    if not network.has_memory or not group["params"]:
        return
    entries = [state.get(param, {}) for param in group["params"]]
    missing = sum(STATE_KEY not in entry for entry in entries)
    if "memory_reads" in entries[0] and missing:
        warnings.warn(
            f"state_dict: a memory, but no {STATE_KEY!r} of {missing} of its {len(entries)} parameters: they will "
            "begin anew",
            stacklevel=6,
        )
    if "memory_reads" not in entries[0] and missing < len(entries):
        warnings.warn(
            f"state_dict: no memory (such as 'memory_reads') beside the {STATE_KEY!r} of the first of {len(entries)} "
            "parameters that share one: it will begin anew",
            stacklevel=6,
        )
