"""One network for all parameters, or one for each kind (Andrychowicz et al. 2016, section 3.3: "conv" and "fc").

Several networks are an ``nn.ModuleDict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from . import files
from .lstm import CoordinatewiseLSTM

Networks: TypeAlias = "CoordinatewiseLSTM | nn.ModuleDict"

_CONFIG = "groups"


def as_networks(net: Any) -> Networks:
    """``net`` as one network or as an ``nn.ModuleDict`` of networks (from a mapping of them).

    Raises:
        TypeError: it is neither.
        ValueError: a mapping without networks, or networks on different devices.
    """
    if isinstance(net, CoordinatewiseLSTM):
        return net
    if not isinstance(net, (Mapping, nn.ModuleDict)):
        raise TypeError(f"net: expected a CoordinatewiseLSTM or a mapping of them, got {type(net).__name__}")
    members = dict(net.items())
    if not members:
        raise ValueError("net: expected at least one network, got an empty mapping")
    for name, member in members.items():
        if not isinstance(member, CoordinatewiseLSTM):
            raise TypeError(f"net[{name!r}]: expected a CoordinatewiseLSTM, got {type(member).__name__}")
    # Not of weight_out: a parametrized weight is computed when it is looked at.
    if len({parameter.device for member in members.values() for parameter in member.parameters()}) > 1:
        raise ValueError("net: the networks must be on one device")
    return net if isinstance(net, nn.ModuleDict) else nn.ModuleDict(members)


def members(net: Networks) -> dict[str, CoordinatewiseLSTM]:
    """The networks by name; a single one is called ""."""
    return {"": net} if isinstance(net, CoordinatewiseLSTM) else dict(net.items())  # type: ignore[arg-type]


def device_of(net: Networks) -> torch.device:
    return next(net.parameters()).device


def config_of(net: Networks) -> dict[str, Any]:
    """JSON-able; :func:`build` makes a network of the same shape from it."""
    if isinstance(net, CoordinatewiseLSTM):
        return net.options()
    return {_CONFIG: {name: config_of(member) for name, member in members(net).items()}}


def build(config: Mapping[str, Any], **place: Any) -> Networks:
    """Networks of this configuration with uninitialised parameters.

    Raises:
        TypeError, ValueError: not such a configuration.
    """
    if set(config) == {_CONFIG}:
        return nn.ModuleDict({name: build(each, **place) for name, each in config[_CONFIG].items()})
    return files.make(dict(config), **place)
