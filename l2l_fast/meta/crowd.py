"""Copies of one optimizee side by side, each optimised with weights of its own: what evolution strategies compare."""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor

from ..kernels import operators
from ..kernels.config import Config
from ..kernels.state import TILE, num_tiles
from ..kernels.tensor_inputs import fan_ins_of
from ..networks.orthogonal import gains_of, matrix_shape, scales_of
from ..problems.zoo.task import ZooTask


class Crowd:
    """``members`` copies of a zoo task of one problem, alike in theta_0, minibatches and units.

    One forward and backward pass serves all of them, and all parameters of a member lie in one row of a buffer, so that
    what is the same for all tensors is computed at once. The steps are those of
    :class:`l2l_fast.LearnedOptimizer` with one parameter group per member.

    Args:
        config: of the members' networks: normalized, with the default inputs per tensor.

    Raises:
        ValueError: the task holds several problems.
    """

    def __init__(self, task: ZooTask, members: int, config: Config, total_steps: int) -> None:
        if task.num_problems != 1:
            raise ValueError(f"task: expected one problem, whose copies the members are, got {task.num_problems}")
        self.task, self.members, self.config, self.total_steps = task, members, config, total_steps
        parameters = dict(task.named_parameters())
        self._shapes = {name: parameter.shape[1:] for name, parameter in parameters.items()}
        self._numels = [math.prod(shape) for shape in self._shapes.values()]
        row = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        self.theta = row.expand(members, -1).clone().requires_grad_()
        matrices = [matrix_shape(shape) for shape in self._shapes.values()]
        self._matrices = {j: matrix for j, matrix in enumerate(matrices) if matrix is not None}
        self._fan_ins = fan_ins_of(self._shapes.values()) * members
        tiles = [num_tiles(numel) for numel in self._numels]
        state = torch.zeros(members, sum(tiles), config.rows, TILE, dtype=torch.float32, device=row.device)
        self._states = [list(each.split(tiles)) for each in state]
        self._thetas = [list(each.split(self._numels)) for each in self.theta.detach()]
        zero = torch.zeros((), dtype=torch.float64, device=row.device)
        self._alignments = [zero] * (members * len(tiles))
        self.age = 0

    def losses(self) -> Tensor:
        """The members' losses ``[members]`` on the next minibatch, which is the same for all, in f's own units."""
        batch = tuple(part.expand(self.members, *part.shape[1:]) for part in self.task.minibatch())
        parts = self.theta.split(self._numels, dim=1)
        named = zip(self._shapes.items(), parts, strict=True)
        return self.task.losses_of({name: part.view(-1, *shape) for (name, shape), part in named}, batch)

    def step(self, grad: Tensor, phis: Tensor, nominals: Tensor, orthogonals: Tensor | None = None) -> None:
        """One step of every member.

        Args:
            grad: of theta, ``[members, coordinates]``.
            phis: the members' weights, float32 ``[members, P]``; nominals: their ``weight_nominal``,
                ``[members, 4, inputs]``.
            orthogonals: ``weight_orthogonal`` of members that have it, ``[members, inputs]``.
        """
        self.age += 1
        grads = [list(row.split(self._numels)) for row in grad]
        ages = [self.age] * len(self._numels)
        thetas, flat, states = (list(chain.from_iterable(part)) for part in (self._thetas, grads, self._states))
        sums = operators.tensor_sums(thetas, flat, states, self.config, False, ages * self.members)
        inputs, nominal, self._alignments = operators.tensor_inputs(
            *(sums, self._alignments, self._fan_ins, ages * self.members, self.total_steps, nominals, self.members)
        )
        inputs, nominal = (each.view(self.members, len(ages), -1) for each in (inputs, nominal))
        targets, updates = self._thetas, None
        if orthogonals is not None:  # what the kernel adds to zero are the updates
            updates = torch.zeros_like(self.theta.detach())
            targets = [list(row.split(self._numels)) for row in updates]
        for k in range(self.members):
            operators.step_(
                *(targets[k], grads[k], self._states[k], phis[k], self.config, 1.0, 0.0, False),
                ages=ages,
                tensor_inputs=inputs[k],
                nominal=nominal[k],
            )
        if updates is not None and orthogonals is not None:
            self._orthogonalize(updates, gains_of(orthogonals.unsqueeze(1), inputs))
            self.theta.detach().add_(updates)

    def _orthogonalize(self, updates: Tensor, gains: Tensor) -> None:
        """Add the orthogonal terms to the updates ``[members, coordinates]``."""
        if not self._matrices:
            return
        scales = scales_of(self.config.output_scale, gains[:, list(self._matrices)], list(self._matrices.values()))
        parts = updates.split(self._numels, dim=1)
        for (j, shape), scale in zip(self._matrices.items(), scales.float().unbind(1), strict=True):
            direction = operators.orthogonalized(parts[j].reshape(-1, *shape))
            parts[j].addcmul_(direction.flatten(1), scale.unsqueeze(1))
