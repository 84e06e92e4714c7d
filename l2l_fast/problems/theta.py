"""theta: which of a task's parameters an optimizer moves, where they live, and how f and its gradient are taken there.

The one definition for every loop of this package: fused and autograd episodes, evaluation, baselines, decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .base import Task


def trainable(task: Task) -> dict[str, nn.Parameter]:
    """The parameters that take part, by name: those that require grad; tied ones once, under their first name.

    Raises:
        ValueError: there are none, or one has no values yet (lazy modules) or cannot be differentiated (made under
            ``torch.inference_mode()``).
    """
    named = dict(task.named_parameters())
    for name, parameter in named.items():
        if is_lazy(parameter):
            raise ValueError(
                f"{_origin(task)}: parameter {name!r} of a lazy module has no shape yet; run the module once where it "
                "is made"
            )
        if parameter.is_inference():
            raise ValueError(
                f"{_origin(task)}: parameter {name!r} was made under torch.inference_mode() and can never have a "
                "gradient; make the module outside"
            )
    found = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not found:
        frozen = f"all its parameters are frozen (requires_grad=False): {list(named)}"
        raise ValueError(
            f"{_origin(task)}: there is nothing to optimise, {frozen if named else 'it has no parameters'}"
        )
    return found


class Theta:
    """The parameters of a task that take part, in their places.

    Attributes:
        parameters: by name, see :func:`trainable`.

    Raises:
        ValueError: see :func:`trainable`.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.parameters = trainable(task)
        self._evaluated = False

    def evaluate(self) -> Tensor:
        """f at the present theta, detached; its gradient is in the parameters' ``.grad`` (None: f does not depend on
        that one).

        Taken by ``backward()`` with theta in place, as in anybody's training loop: what a task recomputes during the
        backward pass (gradient checkpointing) sees the very same theta.

        Raises:
            ValueError: f does not depend on any parameter; or f made or unfroze one that does not take part.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = self._forward(self.parameters.values())
        loss.backward()
        if not self._evaluated:
            if all(parameter.grad is None for parameter in self.parameters.values()):
                raise ValueError(f"{_origin(self.task)}: its loss does not depend on {list(self.parameters)}")
            self._evaluated = True
        return loss.detach()

    def evaluate_differentiably(self, values: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """f at ``values``, detached, and its gradient with a graph: second derivatives.

        Raises:
            ValueError: as :meth:`evaluate`.
            NotImplementedError: the task cannot be differentiated this way (reentrant gradient checkpointing).
        """
        with self._swapped(values):
            loss = self._forward(values.values())
            try:
                grads = torch.autograd.grad(loss, list(values.values()), create_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "checkpoint" not in str(error).lower():
                    raise
                raise NotImplementedError(self._no_checkpointing()) from error
        return loss.detach(), list(grads)

    def value(self) -> Tensor:
        """f at the present theta, detached; the task may take gradients of its own (penalties, inner loops)."""
        with torch.enable_grad():
            torch.clear_autocast_cache()
            return self.task().detach()

    def grads(self) -> dict[str, Tensor | None]:
        """What :meth:`evaluate` left in the parameters, by name."""
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Move some parameters to these values, which are rounded to the parameters' dtype."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    @contextmanager
    def out_of_reach(self) -> Iterator[None]:
        """Inside, nobody can read theta from the task: a backward pass through graphs of several thetas, in which a
        recomputation would take the present theta for that of its step.

        Raises:
            NotImplementedError: somebody did.
        """
        gone = _Gone()
        hidden = [
            (module, attribute, value)
            for root in self.task.hidden_modules()
            for module in root.modules()
            for attribute, value in module._parameters.items()
            if value is not None and value.grad_fn is not None
        ]
        try:
            with self._swapped(dict.fromkeys(self.parameters, gone)):
                for module, attribute, _ in hidden:
                    module._parameters[attribute] = gone  # type: ignore[assignment]
                yield
        except _Recomputed as error:
            raise NotImplementedError(self._no_checkpointing()) from error
        finally:
            for module, attribute, value in hidden:
                module._parameters[attribute] = value

    def _forward(self, present: Iterable[Tensor]) -> Tensor:
        # A task that enters autocast within somebody's region would find the casts of an earlier theta.
        torch.clear_autocast_cache()
        loss = self.task()
        known = {id(value) for value in present}
        late = [name for name, p in self.task.named_parameters() if p.requires_grad and id(p) not in known]
        if late:
            raise ValueError(
                f"{_origin(self.task)}: evaluating it made or unfroze parameters that would not be optimised: {late}; "
                "they must be there and require grad when the task is made"
            )
        if not loss.requires_grad:
            raise ValueError(f"{_origin(self.task)}: its loss does not depend on {list(self.parameters)}")
        return loss

    @contextmanager
    def _swapped(self, values: Mapping[str, Any]) -> Iterator[None]:
        places = places_of(self.task, self.parameters)
        try:
            put(places, values)
            yield
        finally:
            put(places, self.parameters)

    def _no_checkpointing(self) -> str:
        return (
            f"{_origin(self.task)}: it recomputes activations during the backward pass (gradient checkpointing), when "
            "theta_t is no longer in place; second_derivatives, and a meta_loss that evaluates the task itself, need "
            "it without checkpointing"
        )


Places = dict[str, list[tuple[nn.Module, str]]]


def places_of(task: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Places:
    """Every (module, attribute) at which each of the parameters is registered: several where weights are tied."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    places: Places = {name: [] for name in parameters}
    for module in task.modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in names:
                places[names[id(parameter)]].append((module, attribute))
    return places


def put(places: Places, values: Mapping[str, Any]) -> None:
    """Register ``values`` at their places; any tensor will do, as under ``torch.func.functional_call``."""
    for name, value in values.items():
        for module, attribute in places[name]:
            module._parameters[attribute] = value


class _Recomputed(Exception):
    pass


class _Gone(torch.Tensor):
    """Stands where a parameter stood; whoever computes with it gets an exception."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Recomputed


def _origin(task: Task) -> str:
    return task.origin or type(task).__name__
