"""Problems whose final loss is a known function of what a search tries: rate, momentum, schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from l2l_fast.problems import ModuleProblem


class Bowl(nn.Module):
    """One number in double precision."""

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([start], dtype=torch.float64))


def parabola(curvature: float) -> ModuleProblem:
    """f(x) = curvature x^2 from x = 1: one step of SGD with lr = 1 / (2 curvature) is exact."""
    return ModuleProblem(
        lambda generator: Bowl(1.0), lambda module, generator: curvature * module.x.square().sum(), name="parabola"
    )


class Line(nn.Module):
    """A point that every step moves by what the optimizer makes of given gradients; it remembers where it was."""

    def __init__(self, draw: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.seen: list[float] = []
        self.draw = draw


def landscape(gradients: tuple[float, ...], final: Callable[[Line], float], name: str = "landscape") -> ModuleProblem:
    """f(theta_0) = 1; the gradients of the steps are given; the loss after them is ``final`` of the points seen (the
    first is 0) and of the task's own number in [0, 1), ``draw``."""

    def make(generator: torch.Generator) -> nn.Module:
        return Line(float(torch.rand((), generator=generator, dtype=torch.float64)))

    def loss(module: Line, generator: torch.Generator) -> torch.Tensor:
        module.seen.append(module.x.item())
        step = len(module.seen) - 1
        if step < len(gradients):
            return (1.0 + gradients[step] * (module.x - module.x.detach())).sum()
        return (module.x * 0.0).sum() + final(module)

    return ModuleProblem(make, loss, name=name)


def of_rate(function: Callable[[float], float], name: str = "landscape") -> ModuleProblem:
    """One step of SGD ends at ``function(log10(lr))``."""
    return landscape((-1.0,), lambda line: function(math.log10(line.seen[-1])), name)


def of_momentum(function: Callable[[float, float], float], steps: int = 2) -> ModuleProblem:
    """``steps`` steps of heavy ball at a constant rate end at ``function(log10(lr), momentum)``."""

    def final(line: Line) -> float:
        _, first, second, *_ = line.seen
        return function(math.log10(first), second / first - 1)

    return landscape((-1.0,) + (0.0,) * (steps - 1), final)


def of_schedule(function: Callable[[float, float], float]) -> ModuleProblem:
    """Four steps of SGD end at ``function(log10(lr), factor of the last step)``: constant 1, cosine 0.146, linear
    0.25, hold 0.5."""

    def final(line: Line) -> float:
        return function(math.log10(line.seen[1]), (line.seen[4] - line.seen[3]) / line.seen[1])

    return landscape((-1.0,) * 4, final)


def hill(x: float, centre: float, width: float = 1.0) -> float:
    """exp(-((x - centre) / width)^2)."""
    return math.exp(-(((x - centre) / width) ** 2))
