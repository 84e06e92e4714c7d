"""Which parameters of a task each network moves: the task says so with ``parameter_groups()``."""

from __future__ import annotations

from typing import Any

import torch

from ..networks.lstm import CoordinatewiseLSTM
from ..networks.several import Networks, as_networks, members
from ..problems import Problem, Task
from ..problems.theta import trainable


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


def optimizer_groups(task: Task, net: Networks, total_steps: int | None = None) -> list[dict[str, Any]]:
    """Parameter groups for :class:`l2l_fast.LearnedOptimizer`; where coordinates communicate, those of the task's
    independent problems do not. Networks with inputs per tensor are told of ``total_steps``."""
    parameters = dict(task.named_parameters())
    networks = members(net)
    return [
        {
            "params": [parameters[name] for name in names],
            "network": networks[key],
            "num_problems": task.num_problems if networks[key].communicates else 1,
            "total_steps": total_steps,
        }
        for key, names in names_by_network(task, net).items()
        if names
    ]
