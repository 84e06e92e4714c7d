"""Networks in files: safetensors with the configuration in the metadata, written atomically."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import Config

if TYPE_CHECKING:
    from .network import CoordinatewiseLSTM

FILE_FORMAT = "l2l_fast.CoordinatewiseLSTM"
PLAIN_VERSION = "1"  # of plain networks: the five fields of Config, and gac_cells, which is 0
VERSION = "2"  # of all others: every option of the constructor, and the type of network


def save(net: CoordinatewiseLSTM, path: str | os.PathLike[str]) -> None:
    """See :meth:`l2l_fast.CoordinatewiseLSTM.save`."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in net.named_parameters()}
    metadata = {"format": FILE_FORMAT, "format_version": version_of(net), "config": json.dumps(net.options())}
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def version_of(net: CoordinatewiseLSTM) -> str:
    """Of the file format: plain networks keep to the first, so that earlier releases can read them."""
    return PLAIN_VERSION if set(net.options()) == {*Config._fields, "gac_cells"} else VERSION


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> CoordinatewiseLSTM:
    """Read a network written by :meth:`CoordinatewiseLSTM.save`, configuration and type included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else; the message says what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    try:
        return _build(metadata, tensors, device)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def make(
    options: dict[str, Any], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CoordinatewiseLSTM:
    """An uninitialised network from its :meth:`~l2l_fast.CoordinatewiseLSTM.options`.

    Raises:
        ValueError, TypeError: options that are missing, unknown or out of range.
    """
    from .memory import NTMBFGS
    from .network import CoordinatewiseLSTM

    options = dict(options)
    kind = options.pop("type", "CoordinatewiseLSTM")
    types: dict[str, type[CoordinatewiseLSTM]] = {
        "CoordinatewiseLSTM": CoordinatewiseLSTM,
        "NTMBFGS": NTMBFGS,
    }
    if not isinstance(kind, str) or kind not in types:
        raise ValueError(f"type: expected one of {sorted(types)}, got {kind!r}")
    net = nn.utils.skip_init(types[kind], **options, device=device, dtype=dtype)
    difference = set(net.options()) ^ {*options, *(() if kind == "CoordinatewiseLSTM" else ("type",))}
    if difference:  # an option left out took its default, and a default may change one day
        raise ValueError(f"expected the configuration fields {sorted(net.options())}, got {sorted(options)}")
    return net


def _build(metadata: dict[str, str], tensors: dict[str, Tensor], device: torch.device | str) -> CoordinatewiseLSTM:
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError(f"expected format {FILE_FORMAT!r} in the metadata, got {metadata.get('format')!r}")
    version = metadata.get("format_version")
    if version not in (PLAIN_VERSION, VERSION):
        raise ValueError(f"expected format_version {PLAIN_VERSION!r} or {VERSION!r}, got {version!r}")
    config = json.loads(metadata.get("config", "null"))
    if not isinstance(config, dict):
        raise ValueError(f"expected the configuration fields {[*Config._fields, 'gac_cells']}, got {config!r}")
    if version == PLAIN_VERSION:
        if set(config) != {*Config._fields, "gac_cells"}:
            raise ValueError(f"expected the configuration fields {[*Config._fields, 'gac_cells']}, got {config!r}")
        if config["gac_cells"] != 0:
            raise ValueError(f"gac_cells: expected 0 in a file of version 1, got {config['gac_cells']!r}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"expected tensors of one floating-point dtype, got {sorted(map(str, dtypes))}")
    net = make(config, device, dtypes.pop())
    if version != version_of(net):
        raise ValueError(f"expected format_version {version_of(net)!r} for this network, got {version!r}")
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file such that a crash at any moment leaves either the old content or the new one."""
    # The temporary file must be in the same folder: os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
