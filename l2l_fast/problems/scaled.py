"""The same functions in other units: random scaling of the coordinates (Lv et al. 2017, section 4.1) and of the loss.

An optimizer that has seen gradients of one size only cannot know what to do with others, and on the plateaus of deeper
networks they are hundreds of times smaller. Rescaling the training tasks teaches it: the loss, which changes the
gradients and leaves the steps to be made as they are, and the tensors, which changes both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..kernels import checks
from ..kernels.checks import non_negative
from .base import FLOAT32, Problem, Task
from .theta import places_of, put, trainable


class ScaledTask(Task):
    """z -> a f(c * z) with one constant c per tensor; theta_0 of f is kept: z_0 = theta_0 / c. The parameters z are
    named as those of f. ``num_problems`` takes the a out again, from reported losses and from the meta-loss."""

    _task: Task

    def __init__(self, task: Task, log_scales: dict[str, float], log_loss_scale: float = 0.0) -> None:
        super().__init__(task.generator)
        self._loss_scale = math.exp(log_loss_scale)
        self.num_problems = task.num_problems * self._loss_scale  # type: ignore[assignment]
        self._theta = trainable(task)  # frozen parameters of f stay with f, as they are
        self._places = places_of(task, self._theta)
        self._names = {name.replace(".", "_"): name for name in self._theta}
        self._scales = {name: math.exp(log_scales[old]) for name, old in self._names.items()}
        for name, old in self._names.items():
            self.register_parameter(name, nn.Parameter(self._theta[old].detach() / self._scales[name]))
        listed = dict(task.named_parameters(remove_duplicate=False))
        own_name = {id(value): name for name, value in self._theta.items()}
        self._groups = {
            kind: list(
                dict.fromkeys(own_name[id(listed[n])].replace(".", "_") for n in names if id(listed[n]) in own_name)
            )
            for kind, names in task.parameter_groups().items()
        }
        # Hidden from parameters(): only z is optimised.
        object.__setattr__(self, "_task", task)

    def hidden_modules(self) -> list[nn.Module]:
        return [self._task, *self._task.hidden_modules()]

    def parameter_groups(self) -> dict[str, list[str]]:
        return self._groups

    def forward(self) -> torch.Tensor:
        """a f(c * z) on the next minibatch."""
        theta = {old: getattr(self, name) * self._scales[name] for name, old in self._names.items()}
        # They stay there afterwards: what f recomputes during the backward pass must see them too.
        put(self._places, theta)
        return self._loss_scale * self._task()

    def __getstate__(self) -> dict[str, Any]:
        put(self._places, self._theta)  # copies and pickles hold no tensors with a graph
        return self.__dict__.copy()


class Scaled(Problem):
    """A problem whose training tasks are rescaled at random; validation and test tasks are those of the problem itself.

    Args:
        problem: the problem.
        width: the logarithm of every tensor's scale is drawn from U[-width, width], per task.
        loss: bounds of the uniform distribution that the logarithm of the loss's scale is drawn from, per task.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(self, problem: Problem, width: float = 0.0, loss: tuple[float, float] = (0.0, 0.0)) -> None:
        if not isinstance(problem, Problem):
            raise TypeError(f"problem: expected a Problem, got {type(problem).__name__}")
        self.problem = problem
        self.width = non_negative("width", width)
        low, high = (checks.real("loss", bound) for bound in loss)
        if not -20.0 <= low <= high <= 20.0:
            raise ValueError(f"loss: expected two rising bounds within -20..20, got {loss!r}")
        self.loss = (low, high)
        self.name = problem.name

    @property
    def data(self) -> Any:
        """The data set of the problem."""
        return self.problem.data  # type: ignore[attr-defined]

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> Task:
        task = self.problem.make_task(generator, split, device)
        if split != "train":
            return task
        task.origin = f"problem {self.name!r}"
        names = [name for name, _ in task.named_parameters()]
        draws = (2 * torch.rand(len(names), generator=generator, **FLOAT32) - 1) * self.width
        low, high = self.loss
        place = torch.rand((), generator=generator, **FLOAT32).item() if low < high else 0.0
        log_loss_scale = low + (high - low) * place
        return ScaledTask(task, dict(zip(names, draws.tolist())), log_loss_scale)

    def config(self) -> dict[str, Any]:
        """The problem's, and ``training_scales``: the width and the two bounds; ``get`` builds the problem without the
        scaling from the rest."""
        return {**self.problem.config(), "training_scales": [self.width, *self.loss]}
