"""theta as a function of phi: the functional step on all parameters of a task, for unrolling in autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels import operators
from ...kernels.reference import join, join_states, separate, separate_states
from ...kernels.state import State
from ...kernels.tensor_inputs import fan_ins_of
from ...networks.lstm import CoordinatewiseLSTM
from ...networks.memory import Memory
from ...networks.several import Networks, members
from ...optim.tensor_sums import sums_of
from ...problems import Task
from ..assignment import names_by_network

Theta = dict[str, Tensor]
Gradients = dict[str, Tensor | None]


class Rounded(torch.autograd.Function):
    """``x`` rounded to a narrower dtype and back, as if it had not been: what the fused step does to bfloat16 and
    float16 parameters, whose updates are computed in float32 and whose meta-gradient knows no rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Edited(torch.autograd.Function):
    """``theta`` with the values that somebody else gave it, by a shift that counts as a constant: what the fused
    backward, which knows the updates and nothing else, makes of edits between them."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, value: Tensor) -> Tensor:
        return value.to(theta.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_edits(theta: Theta, present: Mapping[str, Tensor]) -> Theta:
    """``theta``, but for parameters whose ``present`` values in the task are no longer those that were put there: a
    loss may edit its own parameters in place (``clamp_``, a projection), and the edit stays, as in any training loop.

    Compared by value, since edits through ``.data`` leave no other trace.
    """
    found = {}
    for name, value in theta.items():
        now = present[name].detach()
        same = now is value or torch.equal(now, value.detach().to(now.dtype))
        found[name] = value if same else Edited.apply(value, now)
    return found


def as_theta(parameter: Tensor) -> Tensor:
    """A copy of a parameter in the dtype that steps are computed in: float64 for float64, else float32."""
    return parameter.detach().to(_state_dtype(parameter), copy=True)


class Walker(Protocol):
    """One network with its state for the parameters ``names``."""

    def step(self, theta: Theta, grads: Gradients) -> Theta:
        """The parameters (see :func:`as_theta`) after one step, of those that have a gradient; differentiable."""

    def detach(self) -> None:
        """Cut the state off from the graph, at the start of a segment."""


def walkers(task: Task, net: Networks, theta: Theta, total_steps: int | None = None) -> list[Walker]:
    """One walker per network, at the zero state, for the parameters that the task assigns to it. ``total_steps``: what
    networks with inputs per tensor are told."""
    result: list[Walker] = []
    for key, names in names_by_network(task, net).items():
        if not names:
            continue
        network = members(net)[key]
        part = {name: theta[name] for name in names}
        if network.communicates:
            result.append(JointWalker(network, part, task.num_problems))
        else:
            result.append(SeparateWalker(network, part, total_steps))
    return result


class SeparateWalker:
    """Every tensor by itself."""

    def __init__(self, network: CoordinatewiseLSTM, theta: Theta, total_steps: int | None = None) -> None:
        self.network, self.total_steps = network, total_steps
        self.states = {name: _zero_state(network, value) for name, value in theta.items()}
        zeros = {name: torch.zeros((), dtype=torch.float64, device=each.device) for name, each in theta.items()}
        self.alignments = zeros

    def step(self, theta: Theta, grads: Gradients) -> Theta:
        own = {name: grads[name] for name in self.states}
        given = {name: grad.to(theta[name].dtype) for name, grad in own.items() if grad is not None}
        inputs = self._inputs(theta, given) if self.network.tensor_inputs and given else {}
        moved = {}
        for name, grad in given.items():
            if inputs:
                update, self.states[name] = self.network(grad, self.states[name], tensor_inputs=inputs[name])
            else:
                update, self.states[name], _ = self.network.step_with(grad, self.states[name])
            moved[name] = theta[name] + update
        return moved

    @torch.no_grad()
    def _inputs(self, theta: Theta, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the optimizer tells such a network of these tensors, by name."""
        config, states = self.network.config, [self.states[name] for name in grads]
        named = zip(grads.items(), states)
        parts = [(theta[name].detach(), grad.detach(), state.data.detach()) for (name, grad), state in named]
        ages = [state.age + 1 for state in states]
        sums = sums_of([param for param, _, _ in parts], parts, config, False, ages, None)
        before = [self.alignments[name] for name in grads]
        fan_ins = fan_ins_of(grad.shape for grad in grads.values())
        inputs, _, after = operators.tensor_inputs(sums, before, fan_ins, ages, self.total_steps)
        self.alignments.update(zip(grads, after))
        return dict(zip(grads, inputs))

    def detach(self) -> None:
        self.states = {name: state.detach() for name, state in self.states.items()}


class JointWalker:
    """All tensors as one, problem after problem: their coordinates communicate.

    Raises:
        ValueError: a tensor whose leading dimension cannot be the task's ``num_problems``; with a memory, which has one
            place per coordinate, also (in :meth:`step`) gradients of other tensors than in the first step.
    """

    def __init__(self, network: CoordinatewiseLSTM, theta: Theta, num_problems: int) -> None:
        for name, value in theta.items():
            if value.numel() % num_problems != 0:
                raise ValueError(
                    f"{name}: {value.numel()} coordinates cannot be those of {num_problems} problems side by side"
                )
        self.network = network
        self.num_problems = num_problems
        self.dtype = _state_dtype(*theta.values())
        self.states = {
            name: network.init_state(value.numel(), value.device, self.dtype) for name, value in theta.items()
        }
        self.moving: list[str] = []
        self.state: State | None = None
        self.memory: Memory | None = None

    def step(self, theta: Theta, grads: Gradients) -> Theta:
        moving = [name for name in self.states if grads[name] is not None]
        if not moving:
            return {}
        if moving != self.moving:
            self._rearrange(moving, theta)
        assert self.state is not None
        parts = [grads[name].reshape(-1).to(self.dtype) for name in moving]  # type: ignore[union-attr]
        grad = join(parts, self.num_problems)
        update, self.state, self.memory = self.network.step_with(grad, self.state, self.num_problems, self.memory)
        updates = separate(update, [part.numel() for part in parts], self.num_problems)
        return {name: theta[name] + u.view_as(theta[name]).to(theta[name].dtype) for name, u in zip(moving, updates)}

    def _rearrange(self, moving: list[str], theta: Theta) -> None:
        if self.memory is not None:
            raise ValueError(
                f"network: its memory is for the parameters {self.moving}, but now {moving} have gradients"
            )
        numel = sum(theta[name].numel() for name in moving)
        self.memory = self.network.memory_for(numel, self.num_problems, theta[moving[0]].device, self.dtype)
        if self.state is not None:
            numels = [theta[name].numel() for name in self.moving]
            apart = separate_states(self.state.to_logical(), numels, self.num_problems)
            self.states.update((name, State.from_logical(part)) for name, part in zip(self.moving, apart))
        together = join_states([self.states[name].to_logical() for name in moving], self.num_problems)
        self.state, self.moving = State.from_logical(together), moving

    def detach(self) -> None:
        self.states = {name: state.detach() for name, state in self.states.items()}
        self.state = None if self.state is None else self.state.detach()
        self.memory = None if self.memory is None else self.memory.detach()


def _zero_state(network: CoordinatewiseLSTM, parameter: Tensor) -> State:
    return network.init_state(parameter.numel(), device=parameter.device, dtype=_state_dtype(parameter))


def _state_dtype(*parameters: Tensor) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
