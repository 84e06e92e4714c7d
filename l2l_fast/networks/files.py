"""Networks in files: safetensors with the configuration, and the record of the training, in the metadata.

What is written is checked first: a file that :func:`load` would refuse, or read as another network, is never made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..kernels import checks
from ..kernels.config import PLAIN_FIELDS
from . import effective, shipped
from .writing import write_atomically as write_atomically

if TYPE_CHECKING:
    from .lstm import CoordinatewiseLSTM

FILE_FORMAT = "l2l_fast.CoordinatewiseLSTM"
GROUPS_FORMAT = FILE_FORMAT + ".groups"
CHECKPOINT_FORMAT = "l2l_fast.MetaTrainer"
RECORD_ATTRIBUTE = "training_record"  # where a network carries the record of its training, see networks/record.py
_RECORD = "training"
PLAIN_VERSION = "1"  # of plain networks: the five fields of Config, and gac_cells, which is 0
VERSION = "2"  # of all others: every option of the constructor, and the type of network


def save(net: CoordinatewiseLSTM, path: str | os.PathLike[str], record: dict[str, Any] | None = None) -> None:
    """See :meth:`l2l_fast.CoordinatewiseLSTM.save`; ``record`` of the training, by default what ``net`` carries."""
    tensors, metadata = content(net), {"format": FILE_FORMAT, "format_version": version_of(net)}
    metadata["config"] = json.dumps(net.options())
    write(path, tensors, metadata, getattr(net, RECORD_ATTRIBUTE, None) if record is None else record)


def version_of(net: CoordinatewiseLSTM) -> str:
    """Of the file format: plain networks keep to the first, so that earlier releases can read them."""
    return PLAIN_VERSION if set(net.options()) == {*PLAIN_FIELDS, "gac_cells"} else VERSION


def content(net: CoordinatewiseLSTM) -> dict[str, Tensor]:
    """The tensors of a file of this network: the weights that it computes with, on the CPU.

    Raises:
        ValueError: a network built from :meth:`~l2l_fast.CoordinatewiseLSTM.options` and these tensors would not be
            this one.
    """
    try:
        changed = [name for name in ("forward", "phi") if getattr(type(net), name) is not getattr(_known(net), name)]
        if changed:
            raise ValueError(f"{type(net).__name__} has another {' and '.join(changed)} than {_known(net).__name__}")
        more = effective.strangers(net)
        if more:
            raise ValueError(f"it has {more}, which {_known(net).__name__} has not")
        tensors = effective.weights(net)
        _build(net.options(), tensors, "cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"net: cannot be saved, since loading would not make the same network: {error}") from error
    return tensors


def write(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str], record: dict[str, Any] | None
) -> None:
    """Write a file, with the record of the training in its metadata.

    Raises:
        TypeError: the record is not a dict of what JSON knows.
        OSError: see :func:`l2l_fast.networks.writing.write_atomically`.
    """
    if record is not None:
        if not isinstance(record, dict):
            raise TypeError(f"record: expected a dict, got {type(record).__name__}")
        try:
            metadata = {**metadata, _RECORD: json.dumps(record)}
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"record: expected what JSON can hold: {error}") from error
    write_tensors(path, tensors, metadata)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> CoordinatewiseLSTM:
    """Read a network written by :meth:`CoordinatewiseLSTM.save`, configuration, type and record included.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: there is no such device.
        ValueError: the file is damaged, or holds something else; the message says what is wrong.
    """
    device = checks.device("device", device, with_values=False)
    metadata, tensors = read(path)
    try:
        config = _checked_config(metadata)
        net = _build(config, tensors, device)
        if metadata["format_version"] != version_of(net):
            raise ValueError(
                f"expected format_version {version_of(net)!r} for this network, got {metadata['format_version']!r}"
            )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error
    record = record_in(path, metadata)
    if record is not None:
        object.__setattr__(net, RECORD_ATTRIBUTE, record)
    return net


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written atomically. OSError if it cannot be."""
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read(path: str | os.PathLike[str], tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Without ``tensors``: only the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file; the message says which, if it is of a kind that something here reads.
    """
    text = os.fsdecode(path)
    if not Path(text).is_file():
        raise FileNotFoundError(f"path: no such file: {text!r}{_no_file_hint(text)}")
    if not os.path.getsize(text):
        raise ValueError(f"{text!r} is not a readable safetensors file: it is empty")
    try:
        with safetensors.safe_open(text, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()} if tensors else {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{text!r} is not a readable safetensors file: {error}{_foreign_hint(text)}") from error


def record_in(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, Any] | None:
    """The record of the training in the metadata of a file; None without. ValueError if it is damaged."""
    text = os.fsdecode(path)
    try:
        record = json.loads(metadata.get(_RECORD, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text!r}: damaged record of the training: {error}") from error
    if record is not None and not isinstance(record, dict):
        raise ValueError(f"{text!r}: the record of the training must be an object, got {type(record).__name__}")
    return record


def wrong_format(expected: str, metadata: dict[str, str]) -> ValueError:
    """That a safetensors file is of another kind, with the name of what reads that one, if something does."""
    found = metadata.get("format")
    hint = {
        FILE_FORMAT: "; a network, which l2l_fast.load reads",
        GROUPS_FORMAT: "; several networks, which l2l_fast.load reads",
        CHECKPOINT_FORMAT: "; a checkpoint, whose best network l2l_fast.meta.load_best reads",
    }.get(str(found), "")
    return ValueError(f"expected format {expected!r} in the metadata, got {found!r}{hint}")


_KINDS: dict[str, type[CoordinatewiseLSTM]] = {}


def known(kind: type[CoordinatewiseLSTM]) -> type[CoordinatewiseLSTM]:
    """A class of networks that files may hold, by its name: what a class decorator is for."""
    _KINDS[kind.__name__] = kind
    return kind


def _no_file_hint(text: str) -> str:
    if text.startswith("~"):
        return " (~ is not expanded: use os.path.expanduser)"
    return f" (l2l_fast.load_pretrained({text!r}) is an optimizer in the package)" if text in shipped.names() else ""


def _foreign_hint(text: str) -> str:
    with open(text, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        return "; it looks like a file of torch.save: see l2l_fast.interchange.load_torch"
    if start[:1] == b"\x80" or text.endswith(".l2l"):
        return "; it looks like a pickle: see l2l_fast.interchange"
    return ""


def _known(net: CoordinatewiseLSTM) -> type[CoordinatewiseLSTM]:
    """The class of this package that a network is of."""
    return next(kind for kind in type(net).__mro__ if kind in _KINDS.values())


def make(
    options: dict[str, Any], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CoordinatewiseLSTM:
    """An uninitialised network from its :meth:`~l2l_fast.CoordinatewiseLSTM.options`.

    Raises:
        ValueError, TypeError: options that are missing, unknown or out of range.
    """
    options = dict(options)
    kind = options.pop("type", "CoordinatewiseLSTM")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"type: expected one of {sorted(_KINDS)}, got {kind!r}")
    net = nn.utils.skip_init(_KINDS[kind], **options, device=device, dtype=dtype)
    difference = set(net.options()) ^ {*options, *(() if kind == "CoordinatewiseLSTM" else ("type",))}
    if difference:  # an option left out took its default, and a default may change one day
        raise ValueError(f"expected the configuration fields {sorted(net.options())}, got {sorted(options)}")
    return net


def _checked_config(metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FILE_FORMAT:
        raise wrong_format(FILE_FORMAT, metadata)
    version = metadata.get("format_version")
    if version not in (PLAIN_VERSION, VERSION):
        raise ValueError(f"expected format_version {PLAIN_VERSION!r} or {VERSION!r}, got {version!r}")
    config = json.loads(metadata.get("config", "null"))
    if not isinstance(config, dict):
        raise ValueError(f"expected the configuration fields {[*PLAIN_FIELDS, 'gac_cells']}, got {config!r}")
    if version == PLAIN_VERSION:
        if set(config) != {*PLAIN_FIELDS, "gac_cells"}:
            raise ValueError(f"expected the configuration fields {[*PLAIN_FIELDS, 'gac_cells']}, got {config!r}")
        if config["gac_cells"] != 0:
            raise ValueError(f"gac_cells: expected 0 in a file of version 1, got {config['gac_cells']!r}")
    return config


def _build(config: dict[str, Any], tensors: dict[str, Tensor], device: torch.device | str) -> CoordinatewiseLSTM:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"expected tensors of one floating-point dtype, got {sorted(map(str, dtypes))}")
    net = make(config, device, dtypes.pop())
    parameters = dict(net.named_parameters())
    missing, unknown = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or unknown:
        raise ValueError(f"tensors missing: {missing}, unknown: {unknown}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"tensor {name}: expected shape {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
                )
            parameter.copy_(tensors[name])
    return net
