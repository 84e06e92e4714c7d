"""Optimizees that a training loop meets: what both kinds of episode must treat alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from l2l_fast.problems import ModuleProblem


class Checkpointed(nn.Module):
    """A hidden layer whose activations are recomputed; ``how`` is None for a plain one."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.how = how

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.hidden(x)) * torch.sigmoid(self.hidden(2 * x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.part(x) if self.how is None else checkpoint(self.part, x, use_reentrant=self.how)
        return self.last(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 1), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.out = kind(2, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(x.view(-1, 3, 2))[0][:, -1])


class WithBuffers(nn.Module):
    """Counts its calls in one buffer, in place, and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().to(self.mean.dtype).mean(0)
        return self.layer(x - self.mean.to(x.dtype)) * (1 + 0.1 * self.calls.to(x.dtype))


def perceptron(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), *middle, nn.Tanh(), nn.Linear(5, 1))


def frozen(*names: str) -> nn.Module:
    module = perceptron()
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def registered_late() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 5))
    module.add_module("late", nn.Linear(5, 1))
    module[0].register_parameter("bias", nn.Parameter(torch.ones(5)))
    return module


def weight_normed() -> nn.Module:
    module = perceptron()
    parametrizations.weight_norm(module[0])
    return module


def old_weight_normed() -> nn.Module:
    module = perceptron()
    torch.nn.utils.weight_norm(module[0])
    return module


def spectral() -> nn.Module:
    module = perceptron()
    parametrizations.spectral_norm(module[0])
    return module


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def parametrized() -> nn.Module:
    module = perceptron()
    torch.nn.utils.parametrize.register_parametrization(module[2], "weight", Doubled())
    return module


def frozen_parametrized() -> nn.Module:
    module = weight_normed()
    module[0].parametrizations.weight.original0.requires_grad_(False)
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": perceptron,
    "partly frozen": lambda: frozen("0.weight"),
    "frozen biases": lambda: frozen("0.bias", "2.bias"),
    "one bias moves": lambda: frozen("0.weight", "0.bias", "2.weight"),
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "tied": Tied,
    "unused layers": WithUnused,
    "buffers": WithBuffers,
    "batch norm": lambda: perceptron(nn.BatchNorm1d(5)),
    "batch norm, eval": lambda: perceptron(nn.BatchNorm1d(5)).eval(),
    "dropout": lambda: perceptron(nn.Dropout(0.4)),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "weight norm": weight_normed,
    "weight norm, by hook": old_weight_normed,
    "spectral norm": spectral,
    "parametrized": parametrized,
    "parametrized, partly frozen": frozen_parametrized,
    "registered late": registered_late,
    "compiled": lambda: torch.compile(perceptron(), backend="aot_eager"),
    "float64": lambda: perceptron().double(),
    "bfloat16": lambda: perceptron().bfloat16(),
    "mixed dtypes": lambda: nn.Sequential(nn.Linear(6, 5), To(torch.float64), nn.Linear(5, 1).double()),
}


class To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


def regression(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(16, 6, generator=generator)
    first = next(module.parameters()).dtype
    return (module(x.to(first)).squeeze(1) - x.sum(1)).float().square().mean()


def problem_of(make: Callable[[], nn.Module], loss: Callable[..., torch.Tensor] = regression) -> ModuleProblem:
    return ModuleProblem(lambda generator: make(), loss, "unusual")
