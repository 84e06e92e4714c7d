"""The state of LearnedOptimizer in checkpoints: what is stored, and what is checked when it is loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import joint
from .config import AnyConfig
from .joint import MEMORY_KEY
from .memory import Memory
from .state import State

STATE_KEY = "lstm_state"


def check_structure(state_dict: Any) -> None:
    """Raise TypeError or ValueError unless this looks like the state dict of an optimizer."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        got = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"state_dict: expected a dict with 'state' and 'param_groups', got {got}")
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise TypeError("state_dict: expected a dict of dicts as 'state'")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise TypeError("state_dict: expected a list of dicts as 'param_groups'")
    for group in groups:
        missing = {"params", "lr", "weight_decay", "maximize"} - set(group)
        if missing:
            raise ValueError(f"state_dict: a group lacks {sorted(missing)}")
        if not isinstance(group["params"], list) or not all(isinstance(k, (int, str)) for k in group["params"]):
            raise TypeError(f"state_dict: expected a list of indices as 'params' of a group, got {group['params']!r}")
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) != len(keys):
        raise ValueError(f"state_dict: expected every parameter once, got {keys}")


def pack_entry(entry: Any) -> Any:
    """A parameter's state for a checkpoint: the LSTM's in the logical layout, the memory as tensors."""
    if isinstance(entry, dict) and isinstance(entry.get(MEMORY_KEY), Memory):
        tensors = {name: value.clone() for name, value in entry[MEMORY_KEY].tensors().items()}
        entry = {**entry, MEMORY_KEY: tensors}
    if not isinstance(entry, dict) or not isinstance(entry.get(STATE_KEY), State):
        return entry
    layers = [torch.stack(pair, dim=1) for pair in entry[STATE_KEY].to_logical()]
    return {**entry, STATE_KEY: torch.stack(layers, dim=1)}


def unpack_entry(entry: Mapping[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`pack_entry` for a parameter of ``group``; TypeError or ValueError if it does not fit."""
    unpacked = {key: copy.deepcopy(value) for key, value in entry.items() if key not in (STATE_KEY, MEMORY_KEY)}
    network = group["network"]
    if MEMORY_KEY in entry:
        unpacked[MEMORY_KEY] = joint.unpack_memory(entry[MEMORY_KEY], group["params"], network, group["groups"])
    if STATE_KEY in entry:
        saved = entry[STATE_KEY]
        expected = (param.numel(), network.num_layers, 2, network.hidden_size)
        if not isinstance(saved, Tensor) or tuple(saved.shape) != expected:
            got = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
            raise ValueError(f"state_dict: expected {STATE_KEY!r} of shape {expected}, got {got}")
        if saved.layout != torch.strided or not saved.is_floating_point():
            raise TypeError(f"state_dict: expected a dense real {STATE_KEY!r}, got {saved.dtype}, {saved.layout}")
        saved = saved.to(param.device, torch.float64 if param.dtype == torch.float64 else torch.float32)
        layers = [(saved[:, k, 0], saved[:, k, 1]) for k in range(network.num_layers)]
        unpacked[STATE_KEY] = State.from_logical(layers)
    return unpacked


def check_same_network(saved: Mapping[str, Any] | None, current: AnyConfig) -> None:
    """Raise ValueError for a network of other sizes than the saved one, warn of other differences."""
    if saved is None:
        return
    if not isinstance(saved, Mapping):
        raise TypeError(f"state_dict: expected a network's configuration, got {type(saved).__name__}")
    for name, value in current._asdict().items():
        if isinstance(saved.get(name), (int, float, str)) and saved[name] == value:
            continue
        difference = f"state_dict: saved with a network of {name}={saved.get(name)!r}, now {name}={value!r}"
        if name in ("hidden_size", "num_layers"):
            raise ValueError(difference)
        warnings.warn(f"{difference}: the optimizer will not continue as before", stacklevel=3)
