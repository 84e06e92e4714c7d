"""Which parameters of a task each network moves: the task says so with ``parameter_groups()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..networks.lstm import CoordinatewiseLSTM
from ..networks.several import Networks, as_networks, members
from ..optim.optimizer import LearnedOptimizer
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


def optimizer_for(task: Task, net: Networks, total_steps: int | None = None) -> LearnedOptimizer:
    """The optimizer of a task's parameters. Of problems side by side a network that orthogonalizes is given each one's
    own tensors: it would take the dimension of the problems for that of a matrix."""
    if not (task.has_problem_dimension and any(member.orthogonal for member in members(net).values())):
        return LearnedOptimizer(optimizer_groups(task, net, total_steps))
    networks, parameters = members(net), dict(task.named_parameters())
    groups, parts = [], []
    for key, names in names_by_network(task, net).items():
        for k in range(task.side_by_side):
            own = [nn.Parameter(parameters[name].detach()[k]) for name in names]  # in the memory of theta
            parts += [(part, parameters[name], k) for part, name in zip(own, names, strict=True)]
            if own:
                groups.append({"params": own, "network": networks[key], "total_steps": total_steps})
    optimizer = LearnedOptimizer(groups)

    def share_gradients(*_: Any) -> None:
        for part, parameter, k in parts:
            part.grad = None if parameter.grad is None else parameter.grad[k]

    optimizer.register_step_pre_hook(share_gradients)
    return optimizer
