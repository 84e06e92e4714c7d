"""Trained optimizers in files: one network or several, with the record of their training.

A file of one network is what :meth:`l2l_fast.CoordinatewiseLSTM.save` writes, plus the record in its metadata. A file
of several (one per kind of parameter) has the tensors ``{kind}.{parameter}``. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from ..kernels import checks
from . import files
from . import lstm as network
from . import several as networks
from .record import attach, record_of

GROUPS_FORMAT = files.GROUPS_FORMAT


def save(net: networks.Networks, path: str | os.PathLike[str], record: dict[str, Any] | None = None) -> None:
    """Write one network, or an ``nn.ModuleDict`` of them, atomically; ``record`` is by default what ``net`` carries.

    Raises:
        TypeError: not networks, or a record that JSON cannot hold.
        ValueError: :func:`load` would not read the same networks, see :meth:`l2l_fast.CoordinatewiseLSTM.save`.
        OSError: the file cannot be written.
    """
    net = networks.as_networks(net)
    record = record_of(net) if record is None else record
    if isinstance(net, network.CoordinatewiseLSTM):
        files.save(net, path, record)
        return
    tensors = {}
    for kind, member in networks.members(net).items():
        try:
            tensors.update({f"{kind}.{name}": value for name, value in files.content(member).items()})
        except ValueError as error:
            raise ValueError(f"{kind}: {error}") from error
    config = networks.config_of(net)
    try:
        _check_one_dtype(tensors)
    except ValueError as error:
        raise ValueError(f"net: cannot be saved: {error}") from error
    metadata = {"format": GROUPS_FORMAT, "format_version": files.PLAIN_VERSION, "config": json.dumps(config)}
    files.write(path, tensors, metadata, record)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """Read a trained optimizer: a :class:`l2l_fast.CoordinatewiseLSTM`, or an ``nn.ModuleDict`` of them where there is
    one per kind of parameter. It carries the record of its training, if the file has one.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: there is no such device.
        ValueError: the file is damaged, or holds something else; the message says what is wrong.
    """
    device = checks.device("device", device, with_values=False)
    metadata, _ = files.read(path, tensors=False)
    if metadata.get("format") != GROUPS_FORMAT:
        return files.load(path, device)
    net = _load_groups(os.fsdecode(path), device)
    attach(net, files.record_in(path, metadata))
    return net


def read_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record in the file of a trained optimizer; None if it has none. Errors as in :func:`load`."""
    return files.record_in(path, files.read(path, tensors=False)[0])


def _check_one_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    dtypes = {value.dtype for value in tensors.values()}
    if len(dtypes) != 1:
        raise ValueError(f"expected tensors of one dtype, got {sorted(map(str, dtypes))}")
    return dtypes.pop()


def _load_groups(path: str, device: torch.device | str) -> networks.Networks:
    metadata, tensors = files.read(path)
    try:
        if metadata.get("format_version") != files.PLAIN_VERSION:
            raise ValueError(f"expected format_version {files.PLAIN_VERSION!r}, got {metadata.get('format_version')!r}")
        config = json.loads(metadata["config"])
        net = networks.build(config, device=device, dtype=_check_one_dtype(tensors))
        net.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path!r}: {error}") from error
    return net
