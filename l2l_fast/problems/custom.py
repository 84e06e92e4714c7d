"""Any ``nn.Module`` with any loss as an optimizee, without rewriting it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .base import Problem, Task


class ModuleTask(Task):
    """A user's module (attribute ``module``) and the loss that evaluates it."""

    def __init__(
        self,
        generator: torch.Generator,
        module: nn.Module,
        loss: Callable[..., torch.Tensor],
        options: dict[str, str],
        device: torch.device,
    ) -> None:
        super().__init__(generator)
        self.module = module
        self._loss = loss
        self._options = options
        self._device = device

    def forward(self) -> torch.Tensor:
        """``loss(module, generator)``."""
        with _own_randomness(self.generator, self._device):
            value = self._loss(self.module, self.generator, **self._options)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"loss must return a scalar tensor, got {came}")
        return value.reshape(())


class ModuleProblem(Problem):
    """Wrap a way to make modules and a loss into a problem.

    Args:
        make: ``make(generator) -> nn.Module``, a fresh module at its initial parameters: one that was returned before,
            as training has left it, is refused.
        loss: ``loss(module, generator) -> scalar tensor``, differentiable; draws its minibatch itself.
        name: what logs and tables call it.

    Both may have a parameter called ``split`` and then also get ``split="train" | "validation" | "test"``, to choose
    data. ``generator`` is the task's own CPU generator. While they run, the global generator (which ``nn.Linear``'s
    initialisation and dropout use) holds a stream that the task's generator seeds, and is put back afterwards: a task
    stays a function of its seed, and the global state is untouched.

    Raises:
        TypeError: ``make`` or ``loss`` is not callable.
    """

    def __init__(
        self,
        make: Callable[..., nn.Module],
        loss: Callable[..., torch.Tensor],
        name: str = "custom",
    ) -> None:
        for argument, value in (("make", make), ("loss", loss)):
            if not callable(value):
                raise TypeError(f"{argument} must be callable, got {type(value).__name__}")
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        self.name = str(name)
        self._make = make
        self._loss = loss

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> ModuleTask:
        before = _marks()
        with _own_randomness(generator, torch.device("cpu")):
            module = self._make(generator, **_split_option(self._make, split))
        if not isinstance(module, nn.Module):
            raise TypeError(f"make must return an nn.Module, got {type(module).__name__}")
        _check_fresh(module, before)
        return ModuleTask(generator, module.to(device), self._loss, _split_option(self._loss, split), device)

    def config(self) -> dict[str, Any]:
        """The name; functions cannot be written to JSON."""
        return {"name": self.name}


# What a `make` gave, as long as somebody holds it: of modules with trainable parameters of their own, the versions that
# these had then. Of modules, as parameters to which there are weak references cannot be swapped.
_GIVEN: weakref.WeakKeyDictionary[nn.Module, dict[str, int]] = weakref.WeakKeyDictionary()

_Marks = dict[str, tuple[int, tuple[float, ...]]]


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    found = module.named_parameters(recurse=False)
    return {
        name: each
        for name, each in found
        if each.requires_grad and not (is_lazy(each) or each.is_inference() or each.is_meta)
    }


def _marks() -> dict[nn.Module, _Marks]:
    """Of what was given and has been written since: version, some elements and the sum of every such parameter."""
    found: dict[nn.Module, _Marks] = {}
    for module, given in list(_GIVEN.items()):
        written = {
            name: (each._version, _glance(each))
            for name, each in _own_parameters(module).items()
            if given.get(name, each._version) != each._version
        }
        if written:
            found[module] = written
    return found


def _glance(parameter: nn.Parameter) -> tuple[float, ...]:
    value = parameter.detach()
    if value.untyped_storage().nbytes() == 0:
        return ()
    return (*map(float, value.flatten()[:8]), float(value.sum(dtype=torch.float64)))


def _check_fresh(module: nn.Module, before: dict[nn.Module, _Marks]) -> None:
    """Raise ValueError if a part of the module was given before, and is as training has left it."""
    for part in module.modules():
        own = _own_parameters(part)
        for name, (version, glance) in before.get(part, {}).items():
            if name in own and own[name]._version == version and _glance(own[name]) == glance:
                raise ValueError(
                    f"make returned a module whose parameter {name!r} (of a {type(part).__name__}) it had returned "
                    "before, as the last task has left it; it must build a fresh module for every call"
                )
        if own:
            _GIVEN[part] = {name: each._version for name, each in own.items()}


def _split_option(function: Callable[..., object], split: str) -> dict[str, str]:
    try:
        wanted = "split" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        # Some callables written in C have no signature; they get the two documented arguments.
        wanted = False
    return {"split": split} if wanted else {}


@contextmanager
def _own_randomness(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Inside, the global CPU generator (and the one of a CUDA ``device``) is a stream that ``generator`` seeds."""
    seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
