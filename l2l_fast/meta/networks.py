"""One network for all parameters, or one for each kind (Andrychowicz et al. 2016, section 3.3: "conv" and "fc").

Several networks are an ``nn.ModuleDict``; a task says with ``parameter_groups()`` which parameters belong to which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from .. import files
from ..network import CoordinatewiseLSTM
from ..problems import Problem, Task
from ..problems.theta import trainable

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


def names_by_network(task: Task, net: Networks) -> dict[str, list[str]]:
    """Which of the task's parameters, by name, each network moves; keys as in :func:`members`. Those that take part
    only, see :func:`l2l_fast.problems.theta.trainable`.

    Raises:
        ValueError: several networks, and the task's groups are not called like them; or no parameter takes part.
    """
    moving = trainable(task)
    if isinstance(net, CoordinatewiseLSTM):
        return {"": list(moving)}
    groups = task.parameter_groups()
    known = sorted(members(net))
    if sorted(groups) != known:
        raise ValueError(f"net: the task's parameter groups are {sorted(groups)}, the networks are for {known}")
    # A tied parameter may be listed under any of its names, and a frozen one may be listed or not.
    places = dict(task.named_parameters(remove_duplicate=False))
    own_name = {id(parameter): name for name, parameter in task.named_parameters()}
    unknown = sorted({name for names in groups.values() for name in names} - set(places))
    if unknown:
        raise ValueError(f"task: parameter_groups() names parameters that the task does not have: {unknown}")
    listed = {key: dict.fromkeys(own_name[id(places[name])] for name in names) for key, names in groups.items()}
    chosen = {key: [name for name in names if name in moving] for key, names in listed.items()}
    if sorted(name for names in chosen.values() for name in names) != sorted(moving):
        raise ValueError("task: parameter_groups() must name every parameter once")
    return chosen


def check_fits(net: Networks, problem: Problem, device: torch.device | str | None = None) -> Task:
    """The test task 0 of the problem; raises what any loop over its tasks with ``net`` would raise at its beginning,
    for those that compute something else for a long time first."""
    task = problem.sample(0, "test", device)
    optimizer_groups(task, as_networks(net))
    return task


def optimizer_groups(task: Task, net: Networks) -> list[dict[str, Any]]:
    """Parameter groups for :class:`l2l_fast.LearnedOptimizer`; where coordinates communicate, those of the task's
    independent problems do not."""
    parameters = dict(task.named_parameters())
    networks = members(net)
    return [
        {
            "params": [parameters[name] for name in names],
            "network": networks[key],
            "groups": task.num_problems if networks[key].communicates else 1,
        }
        for key, names in names_by_network(task, net).items()
        if names
    ]
