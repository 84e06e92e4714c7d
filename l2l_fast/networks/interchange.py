"""Networks from elsewhere: the authors' ``.l2l`` files and the state dicts of PyTorch re-implementations.

The authors' code (google-deepmind/learning-to-learn, ``networks.py``) pickles a dict of dicts of arrays:
``{"lstm_1": {"w_gates", "b_gates"}, ..., "linear": {"w", "b"}}``. Weights multiply from the right, on the input
followed by the previous output; the gates are stored in the order i, j, f, o (j is the new input, our g); a forget
bias of 1 is added at run time, here once to the trainable bias. Preprocessing and scales are not in the file and have
to be given: that code trains its MNIST and CIFAR optimizers with log_sign, p = 5 and output_scale = 0.01, the
quadratics without.
"""

from __future__ import annotations

import os
import pickle
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .lstm import CoordinatewiseLSTM
from .pickles import PickledArray, name_of, unpickle

FORGET_BIAS = 1.0
_MAX_BYTES = 64 << 20
_GATES_IJFO_TO_IFGO = (0, 2, 1, 3)


def load_deepmind(
    path: str | os.PathLike[str], preprocess: str = "log_sign", p: float = 5.0, output_scale: float = 0.01
) -> CoordinatewiseLSTM:
    """Read a ``.l2l`` file. Pickles can run programs; this reader knows dicts and arrays of floats and nothing else.

    Args:
        preprocess, p, output_scale: as the network was trained (the defaults are that code's for MNIST and CIFAR).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file: another pickle, one that asks for anything beyond dicts and arrays, a damaged one,
            or sizes that do not chain up.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    if not path.stat().st_size:
        raise ValueError(f"{str(path)!r}: the file is empty")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{str(path)!r}: {path.stat().st_size} bytes, expected a network of at most {_MAX_BYTES}")
    try:
        modules = _modules(unpickle(path.read_bytes()))
        return _from_gates(modules, preprocess, p, output_scale)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def from_state_dict(
    state: Mapping[str, Tensor], preprocess: str = "log_sign", p: float = 10.0, output_scale: float = 0.1
) -> CoordinatewiseLSTM:
    """A network from the state dict of a module made of ``nn.LSTMCell`` (or one ``nn.LSTM``) and an ``nn.Linear``.

    Layers are the entries ``weight_ih``, ``weight_hh`` (and ``bias_ih``, ``bias_hh``) below one prefix, in the order of
    the dict, or ``weight_ih_l0``, ``weight_ih_l1``, ... of an ``nn.LSTM``. The read-out is the one remaining ``weight``
    of shape [1, H] with its ``bias``. Gate rows are PyTorch's i, f, g, o; the two biases of a layer are added.

    Raises:
        TypeError: not a mapping to tensors.
        ValueError: other entries, or sizes that do not chain up.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping from names to tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"state: expected a mapping from names to tensors, got {name!r}: {type(value).__name__}")
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    linear: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*?)(weight|bias)_(ih|hh)(_l\d+)?", name)
        if found:
            layers[found[1] + (found[4] or "")][f"{found[2]}_{found[3]}"] = value
        elif name.rpartition(".")[2] in ("weight", "bias") and name.rpartition(".")[2] not in linear:
            linear[name.rpartition(".")[2]] = value
        else:
            raise ValueError(f"state: {name!r} belongs neither to an LSTM layer nor to the one linear read-out")
    if not layers or "weight" not in linear:
        raise ValueError(f"state: expected LSTM layers and a linear read-out, got the entries {sorted(state)}")
    cells = [_cell(name, entries) for name, entries in layers.items()]
    _expect("the read-out's weight", linear["weight"].shape, (1, cells[-1].hidden_size))
    readout = nn.utils.skip_init(nn.Linear, cells[-1].hidden_size, 1, dtype=linear["weight"].dtype)
    with torch.no_grad():
        readout.weight.copy_(linear["weight"])
        readout.bias.zero_()
        if "bias" in linear:
            _expect("the read-out's bias", linear["bias"].shape, (1,))
            readout.bias.copy_(linear["bias"])
    return CoordinatewiseLSTM.from_lstm_cells(cells, readout, preprocess, p, output_scale)


def load_torch(
    path: str | os.PathLike[str],
    preprocess: str = "log_sign",
    p: float = 10.0,
    output_scale: float = 0.1,
    *,
    key: str | None = None,
) -> CoordinatewiseLSTM:
    """:func:`from_state_dict` of a file that ``torch.save`` wrote; read with ``weights_only=True``.

    Args:
        key: where a larger file, such as a checkpoint, holds the state dict: ``"model"``, ``"model.net"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else than a state dict of that kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no such file: {os.fspath(path)!r}")
    if not os.path.getsize(path):
        raise ValueError(f"{os.fspath(path)!r}: the file is empty")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return from_state_dict(_entry(state, key), preprocess, p, output_scale)
    except (pickle.UnpicklingError, RuntimeError, TypeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r}: {error or 'the file ends too soon'}") from error


def _entry(state: Any, key: str | None) -> Any:
    """What a file holds under ``key``. Raises ValueError that lists where in it state dicts are."""
    found = dict(_state_dicts(state))
    where = f"; key: expected one of {sorted(filter(None, found))}" if any(found) else "; it holds no state dict"
    if key is not None:
        if key not in found:
            raise ValueError(f"the file holds no state dict under {key!r}{where}")
        return found[key]
    if "" not in found:
        entries = f" with the entries {sorted(map(str, state))}" if isinstance(state, Mapping) else ""
        raise ValueError(f"expected a state dict, got {type(state).__name__}{entries}{where}")
    return state


def _state_dicts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or path.count(".") > 4:
        return
    if value and all(isinstance(name, str) and isinstance(entry, Tensor) for name, entry in value.items()):
        yield path, value
    for name, entry in value.items():
        yield from _state_dicts(entry, f"{path}.{name}" if path else str(name))


def _cell(name: str, entries: dict[str, Tensor]) -> nn.LSTMCell:
    missing = {"weight_ih", "weight_hh"} - set(entries)
    if missing:
        raise ValueError(f"state: the layer {name!r} has no {sorted(missing)}")
    hidden = entries["weight_hh"].shape[-1]
    inputs = entries["weight_ih"].shape[-1]
    cell = nn.utils.skip_init(nn.LSTMCell, inputs, hidden, dtype=entries["weight_ih"].dtype)
    with torch.no_grad():
        for key, parameter in cell.named_parameters():
            if key in entries:
                _expect(f"{name}.{key}", entries[key].shape, parameter.shape)
                parameter.copy_(entries[key])
            else:
                parameter.zero_()
    return cell


# ---- the authors' files ----


def _from_gates(
    modules: dict[str, dict[str, np.ndarray]], preprocess: str, p: float, output_scale: float
) -> CoordinatewiseLSTM:
    layers = sorted((name for name in modules if re.fullmatch(r"lstm_\d+", name)), key=lambda name: int(name[5:]))
    if set(modules) != {*layers, "linear"} or not layers:
        raise ValueError(f'expected the modules "lstm_1", ..., "linear", got {sorted(modules)}')
    for name, names in [(layer, {"w_gates", "b_gates"}) for layer in layers] + [("linear", {"w", "b"})]:
        if set(modules[name]) != names:
            raise ValueError(f"module {name}: expected the variables {sorted(names)}, got {sorted(modules[name])}")
    cells = []
    for layer in layers:
        weight, bias = modules[layer]["w_gates"], modules[layer]["b_gates"]
        if weight.ndim != 2 or weight.shape[1] % 4 or bias.shape != weight.shape[1:]:
            raise ValueError(f"module {layer}: expected [in + H, 4H] and [4H], got {weight.shape} and {bias.shape}")
        hidden = weight.shape[1] // 4
        inputs = weight.shape[0] - hidden
        if inputs < 1:
            raise ValueError(f"module {layer}: {weight.shape[0]} rows do not hold an input and {hidden} units")
        cell = nn.utils.skip_init(nn.LSTMCell, inputs, hidden)
        rows, shift = torch.from_numpy(weight.T.copy()), torch.from_numpy(bias.copy())
        rows = torch.cat([rows.chunk(4)[k] for k in _GATES_IJFO_TO_IFGO])
        shift = torch.cat([shift.chunk(4)[k] for k in _GATES_IJFO_TO_IFGO])
        shift[hidden : 2 * hidden] += FORGET_BIAS
        with torch.no_grad():
            cell.weight_ih.copy_(rows[:, :inputs])
            cell.weight_hh.copy_(rows[:, inputs:])
            cell.bias_ih.copy_(shift)
            cell.bias_hh.zero_()
        cells.append(cell)
    weight, bias = modules["linear"]["w"], modules["linear"]["b"]
    if weight.shape != (cells[-1].hidden_size, 1) or bias.shape != (1,):
        raise ValueError(
            f"module linear: expected [{cells[-1].hidden_size}, 1] and [1], got {weight.shape}, {bias.shape}"
        )
    linear = nn.utils.skip_init(nn.Linear, cells[-1].hidden_size, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight.T.copy()))
        linear.bias.copy_(torch.from_numpy(bias.copy()))
    return CoordinatewiseLSTM.from_lstm_cells(cells, linear, preprocess, p, output_scale)


def _modules(content: Any) -> dict[str, dict[str, np.ndarray]]:
    if not isinstance(content, dict):
        raise ValueError(f"expected a dict of modules, got {type(content).__name__}")
    modules: dict[str, dict[str, np.ndarray]] = {}
    for module, variables in content.items():
        if not isinstance(variables, dict):
            raise ValueError(f"module {module!r}: expected a dict of variables, got {type(variables).__name__}")
        name = name_of(module)
        modules[name] = {}
        for variable, value in variables.items():
            if not isinstance(value, PickledArray):
                raise ValueError(f"{name}/{variable!r}: expected an array, got {type(value).__name__}")
            modules[name][name_of(variable)] = value.array()
    return modules


def _expect(what: str, found: Any, expected: Any) -> None:
    if tuple(found) != tuple(expected):
        raise ValueError(f"{what}: expected shape {tuple(expected)}, got {tuple(found)}")
