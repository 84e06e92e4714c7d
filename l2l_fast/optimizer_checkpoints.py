"""The state dict of LearnedOptimizer: made of the live state and groups, and taken apart again."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from . import joint
from .joint import Reduce
from .memory import NTMBFGS, Memory
from .network import CoordinatewiseLSTM
from .optimizer_checks import check_problems, number, plain, truth
from .optimizer_networks import check_same_network, digest
from .optimizer_state import check_structure, pack_entry, unpack_entry


def pack(
    state: Mapping[Any, Any], param_groups: Sequence[Mapping[str, Any]], networks: Sequence[CoordinatewiseLSTM]
) -> dict[str, Any]:
    """See :meth:`l2l_fast.LearnedOptimizer.state_dict`; ``networks`` are those of the groups."""
    index: dict[int, int] = {}
    for k, param in enumerate(chain.from_iterable(group["params"] for group in param_groups)):
        index.setdefault(id(param), k)
    groups = []
    for group, network in zip(param_groups, networks, strict=True):
        packed = {key: plain(value) for key, value in group.items() if key != "params"}
        packed["network"] = {**group["network"], "digest": digest(network)}
        packed["params"] = [index[id(param)] for param in group["params"]]
        groups.append(packed)
    packed_state = {
        index[id(key)] if isinstance(key, Tensor) else key: pack_entry(value, key) for key, value in state.items()
    }
    return {"state": packed_state, "param_groups": groups}


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
    groups = copy.deepcopy(state_dict["param_groups"])
    counts = [len(group["params"]) for group in groups], [len(group["params"]) for group in param_groups]
    if counts[0] != counts[1]:
        raise ValueError(
            f"state_dict: expected groups of {counts[1]} parameters (as in the optimizer), got {counts[0]}"
        )
    owners: dict[Any, tuple[Tensor, dict[str, Any], CoordinatewiseLSTM]] = {}
    for new, old, network in zip(groups, param_groups, networks, strict=True):
        check_same_network(new["network"], network, "state_dict")
        new.setdefault("groups", old["groups"])  # written before there was this option
        owners.update((key, (param, new, network)) for key, param in zip(new["params"], old["params"], strict=True))
        new.update({"params": old["params"], "network": old["network"]})
        for name in ("lr", "weight_decay"):
            number(name, new[name])
        truth("maximize", new["maximize"])
        check_problems(new, network, reduce)
        if "param_names" in old:
            new.setdefault("param_names", old["param_names"])
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, entry in state_dict["state"].items():
        if key not in owners:
            state[key] = entry
            continue
        param, group, network = owners[key]
        state[param] = unpack_entry(entry, param, network.config)
        if "memory" in entry or any(name in entry for name in Memory.KEYS if name != "step"):
            if not isinstance(network, NTMBFGS):
                raise ValueError("state_dict: a memory was saved, but the group's network has none")
            memory = joint.memory_of(entry, group, network)
            state[param].update({name: value.clone() for name, value in memory.entries().items()})
    return state, groups
