"""Trained optimizers in files: one network or several, with the record of their training.

A file of one network is what :meth:`l2l_fast.CoordinatewiseLSTM.save` writes, plus the record in its metadata. A file
of several (one per kind of parameter) has the tensors ``{kind}.{parameter}``. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import files, network
from .meta import networks
from .meta.record import attach, record_of

GROUPS_FORMAT = network.FILE_FORMAT + ".groups"
_RECORD = "training"


def save(net: networks.Networks, path: str | os.PathLike[str], record: dict[str, Any] | None = None) -> None:
    """Write one network, or an ``nn.ModuleDict`` of them, atomically; ``record`` is by default what ``net`` carries.

    Raises:
        TypeError: not networks.
    """
    net = networks.as_networks(net)
    record = record_of(net) if record is None else record
    path = Path(path)
    single = isinstance(net, network.CoordinatewiseLSTM)
    version = files.version_of(net) if single else network.FILE_VERSION
    metadata = {"format_version": version, "config": json.dumps(networks.config_of(net))}
    metadata["format"] = network.FILE_FORMAT if single else GROUPS_FORMAT
    if record is not None:
        metadata[_RECORD] = json.dumps(record)
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    network._write_atomically(path, safetensors.torch.save(tensors, metadata))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """Read a trained optimizer: a :class:`l2l_fast.CoordinatewiseLSTM`, or an ``nn.ModuleDict`` of them where there is
    one per kind of parameter. It carries the record of its training, if the file has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else; the message says what is wrong.
    """
    path = Path(path)
    metadata = _metadata(path)
    if metadata.get("format") == GROUPS_FORMAT:
        net: networks.Networks = _load_groups(path, metadata, device)
    else:
        net = network.load(path, device)
    attach(net, _record(path, metadata))
    return net


def read_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record in the file of a trained optimizer; None if it has none. Errors as in :func:`load`."""
    return _record(Path(path), _metadata(Path(path)))


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def _record(path: Path, metadata: dict[str, str]) -> dict[str, Any] | None:
    try:
        record = json.loads(metadata.get(_RECORD, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r}: damaged record of the training: {error}") from error
    if record is not None and not isinstance(record, dict):
        raise ValueError(f"{str(path)!r}: the record of the training must be an object, got {type(record).__name__}")
    return record


def _load_groups(path: Path, metadata: dict[str, str], device: torch.device | str) -> networks.Networks:
    try:
        if metadata.get("format_version") != network.FILE_VERSION:
            raise ValueError(
                f"expected format_version {network.FILE_VERSION!r}, got {metadata.get('format_version')!r}"
            )
        tensors: dict[str, Tensor] = safetensors.torch.load_file(str(path))
        dtypes = {value.dtype for value in tensors.values()}
        if len(dtypes) != 1:
            raise ValueError(f"expected tensors of one dtype, got {sorted(map(str, dtypes))}")
        net = networks.build(json.loads(metadata["config"]), device=device, dtype=dtypes.pop())
        net.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    return net
