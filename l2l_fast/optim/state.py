"""The state of LearnedOptimizer: plain tensors, live and in checkpoints.

``optimizer.state[param]["lstm_state"]`` has two forms under one name, as torch's tools look in a checkpoint for what
they see in the live state. Live it is in the layout of the kernels (:mod:`l2l_fast.kernels.state`, or a type of
:mod:`l2l_fast.kernels.state_types`), with ``"numel"`` beside it. In a checkpoint it is of the parameter's shape and one
more dimension with the numbers of a coordinate: h and c of the first layer, h and c of the second, ..., then the moving
averages, if the network has some; independent of tiles, device and threads, and sharded as the parameter is. With
averages, and where rounding is stochastic, the steps of the state are beside it, as ``"lstm_age"``; with inputs per
tensor, ``"lstm_alignment"``.

Wrappers of optimizers (ZeRO among them) put what was saved into the live state as it is, so the saved form is
understood there, too. With a memory, what it holds is beside the state of the group's first parameter, under the names
of ``Memory.KEYS``. Everything else in an entry belongs to others (wrappers keep counters and copies there) and is
neither read nor lost.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import state_types
from ..kernels.checks import as_float, as_int, chosen
from ..kernels.config import Config
from ..kernels.state import TILE, State, num_tiles
from ..networks.memory import Memory, as_digits, from_digits

STATE_KEY = "lstm_state"
# Marks the live form, whose tiles cannot tell how many of their last 64 coordinates there are.
NUMEL_KEY = "numel"
# Live an int; saved in the digits of a memory's count, which survive a conversion to the parameter's dtype.
AGE_KEY = "lstm_age"
# Of networks with inputs per tensor, a scalar on the parameter's device: see kernels.tensor_inputs.aligned.
ALIGNMENT_KEY = "lstm_alignment"


_TOO_OLD = 1 << 62  # steps that 64 bits still count, and digits of a checkpoint

# The seeds of their rounding are of a step, so that steps are counted whatever the network is.
COUNTED = (torch.bfloat16, torch.int8)


def state_dtype_of(group: Mapping[str, Any]) -> torch.dtype:
    """What a group's option ``state_dtype`` names, float32 where a group has none; ValueError if it names nothing."""
    name = group.get("state_dtype", "float32")
    if name != "float32" and not chosen(name, state_types.STATE_DTYPES):
        names = ", ".join(map(repr, state_types.STATE_DTYPES))
        raise ValueError(f"state_dtype: expected one of {names}, got {name!r}")
    return state_types.STATE_DTYPES[name]


def dtype_of(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of a parameter's live state in its group; ValueError as :func:`state_dtype_of`."""
    return torch.float64 if param.dtype == torch.float64 else state_dtype_of(group)


def as_state(tiles: Tensor, numel: int, config: Config, age: int = 0) -> State:
    """The tiles of a parameter as a :class:`State`, which shares their memory where they are float32 or float64."""
    tiles = state_types.decode(tiles, config) if tiles.dtype in COUNTED else tiles
    return State(tiles, numel, config.hidden_size, config.num_layers, config.averages, age)


def age_of(entry: Mapping[str, Any], config: Config) -> int:
    """The steps that the averages in an entry are of, in whatever form it is; 0 without a state or without averages.

    Raises:
        ValueError: there are averages, but no such number.
    """
    return steps_of(entry) if config.averages else 0


def steps_of(entry: Mapping[str, Any], default: int | None = None) -> int:
    """The steps of the state in an entry, 0 without one. default: where they were not counted; None: that is an error.

    Raises:
        ValueError: there is a state, but no such number.
    """
    if entry.get(STATE_KEY) is None:
        return 0
    value = entry.get(AGE_KEY)
    if type(value) is int and 0 <= value < _TOO_OLD:
        return value
    if value is None and default is not None:
        return default
    age = from_digits(value) if isinstance(value, Tensor) and value.dim() == 1 else as_int(value)
    if age is None or not 0 <= age < _TOO_OLD:
        raise ValueError(
            f"state: expected a number of steps >= 0 as {AGE_KEY!r} beside {STATE_KEY!r}, got {value!r}"
            + (", which is beyond 2^62" if age is not None and age > 0 else "")
        )
    return age


def alignment_of(entry: Mapping[str, Any], param: Tensor) -> Tensor:
    """The alignment in an entry, float64, on the device of ``param``; 0 where there is none.

    Raises:
        ValueError: it is something else than a number.
    """
    value = entry.get(ALIGNMENT_KEY)
    if type(value) is Tensor and value.dtype is torch.float64 and value.dim() == 0 and value.device == param.device:
        return value
    number = 0.0 if value is None else value
    if isinstance(number, Tensor) and number.numel() == 1 and number.is_floating_point():
        return number.detach().reshape(()).to(param.device, torch.float64)
    if as_float(number) is None or isinstance(number, Tensor):
        raise ValueError(f"state: expected a number as {ALIGNMENT_KEY!r} beside {STATE_KEY!r}, got {value!r}")
    return torch.tensor(float(number), dtype=torch.float64, device=param.device)


def tiles_of(entry: Mapping[str, Any], param: Tensor, config: Config, dtype: torch.dtype) -> Tensor | None:
    """The state of ``param`` as the kernels take it, from its entry in ``optimizer.state`` in whatever form it is;
    None if there is none. The tensor itself where it has the right form. From one type to another numbers are rounded
    to the nearest; what a type has held before, it holds again.

    Raises:
        TypeError, ValueError: it does not fit the parameter or the network.
    """
    value = entry.get(STATE_KEY)
    if value is None:
        return None
    if not is_live(entry):
        return from_saved(value, param, config, dtype)
    stored = value.dtype is torch.int8 or value.is_floating_point()
    fits = stored and value.shape == (num_tiles(param.numel()), *state_types.tile_shape(config, value.dtype))
    if not fits or entry[NUMEL_KEY] != param.numel():
        raise ValueError(
            f"the state of a parameter of shape {tuple(param.shape)} does not fit the parameter or the group's network "
            f"(hidden_size={config.hidden_size}, num_layers={config.num_layers}): {STATE_KEY!r} of {value.dtype}, "
            f"{tuple(value.shape)}, for {entry[NUMEL_KEY]} coordinates"
        )
    if value.dtype is dtype and value.is_contiguous():
        return value
    return _converted(value.detach(), param.numel(), config, dtype)


def _converted(value: Tensor, numel: int, config: Config, dtype: torch.dtype) -> Tensor:
    """The tiles of a state as tiles of another type."""
    if value.is_floating_point() and dtype in (torch.float32, torch.float64):
        return value.to(dtype).contiguous()
    converted = state_types.zeros(numel, config, dtype, value.device)
    for begin in range(0, value.shape[0], state_types.CHUNK):  # all at once in float32 may be too much
        part = slice(begin, begin + state_types.CHUNK)
        rows = state_types.decode(value[part], config)
        converted[part] = state_types.encode(rows, config, dtype, numel - begin * TILE)
    return converted


def is_live(entry: Mapping[str, Any]) -> bool:
    """Whether an entry's state is in the layout of the kernels: its number of coordinates is beside it and agrees."""
    value, numel = entry.get(STATE_KEY), entry.get(NUMEL_KEY)
    if not isinstance(value, Tensor) or isinstance(numel, bool) or not isinstance(numel, (int, float)):
        return False
    if value.dim() < 2 or value.shape[0] != num_tiles(int(numel)):
        return False
    # In the saved form what is before the last dimension are the coordinates; it is never int8.
    return value.dim() == 2 if value.dtype is torch.int8 else value.dim() == 3 and value.shape[2] == TILE


def from_saved(saved: Any, param: Tensor, config: Config, dtype: torch.dtype) -> Tensor:
    """The tiles of a parameter's state of this dtype from its saved form, on its device.

    Raises:
        TypeError, ValueError: not a tensor of that form.
    """
    numel, rows = param.numel(), config.rows
    shapes = ((*param.shape, rows), (numel, config.num_layers, 2, config.hidden_size))  # now, and before 0.2
    if not isinstance(saved, Tensor) or tuple(saved.shape) not in shapes:
        got = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        raise ValueError(f"state_dict: expected {STATE_KEY!r} of shape {shapes[0]}, got {got}")
    if saved.layout != torch.strided or not saved.is_floating_point():
        raise TypeError(f"state_dict: expected a dense real {STATE_KEY!r}, got {saved.dtype}, {saved.layout}")
    if saved.is_meta and not param.is_meta:
        raise ValueError(f"state_dict: expected {STATE_KEY!r} with values, got a tensor of the device meta")
    numbers = saved.detach().reshape(numel, rows)
    tiles = state_types.zeros(numel, config, dtype, param.device)
    for begin in range(0, tiles.shape[0], state_types.CHUNK):
        part = numbers[begin * TILE : (begin + state_types.CHUNK) * TILE]
        part = part.to(param.device, torch.float64 if dtype is torch.float64 else torch.float32)
        part = torch.nn.functional.pad(part, (0, 0, 0, -part.shape[0] % TILE))
        chunk = part.view(-1, TILE, rows).transpose(1, 2)
        place = slice(begin, begin + state_types.CHUNK)
        tiles[place] = state_types.encode(chunk, config, dtype, numel - begin * TILE)
    return tiles


def to_saved(tiles: Tensor, param: Tensor, config: Config) -> Tensor:
    """The inverse of :func:`from_saved`, a copy without the padding; of an int8 state in bfloat16, which holds its
    numbers exactly but for h, of which :func:`from_saved` finds the code again."""
    tiles, numel = tiles.detach(), param.numel()
    dtype, rows = tiles.dtype, tiles.shape[1]  # its own, whatever network the group has by now
    if dtype is torch.int8:
        dtype, rows = torch.bfloat16, config.rows
        if tiles.shape[1:] != state_types.tile_shape(config, torch.int8):
            raise ValueError(
                f"state_dict: the int8 state of a parameter of shape {tuple(param.shape)} does not fit the network "
                f"of its group (hidden_size={config.hidden_size}, num_layers={config.num_layers})"
            )
    saved = torch.empty((numel, rows), dtype=dtype, device=tiles.device)
    for begin in range(0, tiles.shape[0], state_types.CHUNK):
        part = tiles[begin : begin + state_types.CHUNK]
        part = state_types.decode(part, config) if part.dtype is torch.int8 else part
        coordinates = saved[begin * TILE : (begin + state_types.CHUNK) * TILE]
        coordinates.copy_(part.transpose(1, 2).reshape(-1, rows)[: coordinates.shape[0]])
    return saved.view(*param.shape, rows)


def pack_entry(entry: Any, param: Tensor, config: Config) -> Any:
    """A parameter's state for a checkpoint: copies of all that is the optimizer's own, the rest as it is."""
    if not isinstance(entry, dict):
        return entry
    packed, live = {}, is_live(entry)
    if live and entry[NUMEL_KEY] != param.numel():
        raise ValueError(
            f"state: expected that of the {param.numel()} coordinates of a parameter of shape {tuple(param.shape)}, "
            f"got one of {entry[NUMEL_KEY]}: the parameter was changed since its last step; del optimizer.state[param] "
            "begins its state anew"
        )
    for key, value in entry.items():
        if key == STATE_KEY and live:
            packed[key] = to_saved(value, param, config)
        elif key == ALIGNMENT_KEY and isinstance(value, Tensor):
            packed[key] = value.detach().clone().as_subclass(Tensor)
        elif key == AGE_KEY and as_int(value) is not None:
            packed[key] = as_digits(value)
        elif key in Memory.KEYS and isinstance(value, Tensor):
            packed[key] = value.detach().clone()
        elif key != NUMEL_KEY or not live:
            packed[key] = value
    return packed


def unpack_entry(
    entry: Mapping[str, Any], param: Tensor, config: Config, has_memory: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """The inverse of :func:`pack_entry`, with a state of this dtype (:func:`dtype_of`); TypeError or ValueError if it
    does not fit. ``has_memory``: the names of a memory are the optimizer's own here, and left out. Elsewhere they are
    another's, or left over from a network that the group had before."""
    own = {STATE_KEY, *(Memory.KEYS if has_memory else ()), *((NUMEL_KEY,) if is_live(entry) else ())}
    counted = config.averages > 0 or dtype in COUNTED
    own |= {AGE_KEY} if counted else set()
    own |= {ALIGNMENT_KEY} if config.tensor_inputs else set()
    unpacked = {key: copy.deepcopy(value) for key, value in entry.items() if key not in own}
    tiles = tiles_of(entry, param, config, dtype)
    if tiles is not None:
        unpacked[STATE_KEY] = tiles.to(param.device, copy=tiles is entry.get(STATE_KEY))
        unpacked[NUMEL_KEY] = param.numel()
        if counted:
            unpacked[AGE_KEY] = steps_of(entry, None if config.averages else 0)
        if config.tensor_inputs:
            unpacked[ALIGNMENT_KEY] = alignment_of(entry, param).clone()
    return unpacked


def check_structure(state_dict: Any) -> None:
    """Raise TypeError or ValueError unless this looks like the state dict of a LearnedOptimizer."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        got = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"state_dict: expected a dict with 'state' and 'param_groups', got {got}")
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, dict):
        raise TypeError(f"state_dict: expected a dict as 'state', got {type(state).__name__}")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise TypeError("state_dict: expected a list of dicts as 'param_groups'")
    for group in groups:
        network = group.get("network")
        if not isinstance(network, Mapping) or not {"hidden_size", "num_layers"} <= set(network):
            options = sorted(str(key) for key in set(group) - {"params", "param_names"})
            raise ValueError(
                "state_dict: expected the checkpoint of a LearnedOptimizer, whose groups describe their network; got "
                f"one whose groups have the options {options} (of another optimizer?)"
            )
        missing = {"params", "lr", "weight_decay", "maximize"} - set(group)
        if missing:
            raise ValueError(f"state_dict: a group lacks {sorted(missing)}")
        if not isinstance(group["params"], list) or not all(isinstance(k, (int, str)) for k in group["params"]):
            raise TypeError(f"state_dict: expected a list of indices as 'params' of a group, got {group['params']!r}")
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) != len(keys):
        raise ValueError(f"state_dict: expected every parameter once, got {keys}")
    for key in keys:
        if not isinstance(state.get(key, {}), dict):
            raise TypeError(f"state_dict: expected a dict as the state of {key!r}, got {type(state[key]).__name__}")


def modernized(entry: Any) -> Any:
    """A parameter's state in the present form: itself, or a new dict if an earlier release wrote it. Those kept objects
    in live states, a memory as one dict, and the count of a memory's rows as ``"step"``."""
    if not isinstance(entry, dict):
        return entry
    state, memory = entry.get(STATE_KEY), entry.get("memory")
    if isinstance(state, State):
        entry = {**entry, STATE_KEY: state.data, NUMEL_KEY: state.numel}
    entries: dict[str, Any] | None = None
    if isinstance(memory, Memory):
        entries = memory.entries()
    elif isinstance(memory, Mapping) and "reads" in memory and not {"matrix", "left"}.isdisjoint(memory):
        entries = {f"memory_{key}": value for key, value in memory.items()}
    if entries is not None:
        entry = {**{key: value for key, value in entry.items() if key != "memory"}, **entries}
    if "step" in entry and "memory_left" in entry and "memory_written" not in entry:
        entry = {"memory_written" if key == "step" else key: value for key, value in entry.items()}
    if "memory_written" in entry and (count := as_int(entry["memory_written"])) is not None and count >= 0:
        entry = {**entry, "memory_written": as_digits(count)}
    return entry
