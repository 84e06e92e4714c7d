"""Random quadratics, the paper's first test problem (Andrychowicz et al. 2016, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..kernels.checks import non_negative, one_of, positive_int
from .base import FLOAT32, Problem, Task

_FAMILIES: dict[str, Callable[..., torch.Tensor]] = {"uniform": torch.rand, "gaussian": torch.randn}
ILL_CONDITIONED = "ill_conditioned"


def ill_conditioned_matrix(batch: int, dim: int, condition: float, generator: torch.Generator) -> torch.Tensor:
    """W ``[batch, dim, dim]`` such that the eigenvalues of W^T W, half the Hessian of f, are spaced geometrically from
    1 down to ``1 / condition``, in random directions: W = U S V^T with U and V uniform over the orthogonal group."""
    exponents = torch.linspace(0.0, -0.5 * math.log10(condition), dim, dtype=torch.float64, device="cpu")
    u, v = (_orthogonal(batch, dim, generator) for _ in range(2))
    return ((u * 10**exponents) @ v.mT).float()


def _orthogonal(batch: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64, device="cpu"))
    return q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)  # without it Q is not uniform


class QuadraticTask(Task):
    """``batch`` independent functions f(theta) = ||W theta - y||^2; parameter ``theta`` float32 ``[batch, dim]``."""

    W: torch.Tensor
    y: torch.Tensor

    def __init__(
        self,
        generator: torch.Generator,
        family: str,
        condition: float,
        batch: int,
        dim: int,
        init_std: float,
        device: torch.device,
    ) -> None:
        super().__init__(generator)
        self.num_problems = batch
        if family == ILL_CONDITIONED:
            draw, matrix = torch.randn, ill_conditioned_matrix(batch, dim, condition, generator)
        else:
            draw = _FAMILIES[family]
            matrix = draw(batch, dim, dim, generator=generator, **FLOAT32)
        self.register_buffer("W", matrix.to(device))
        self.register_buffer("y", draw(batch, dim, 1, generator=generator, **FLOAT32).to(device))
        self.theta = nn.Parameter((torch.randn(batch, dim, generator=generator, **FLOAT32) * init_std).to(device))

    def forward(self) -> torch.Tensor:
        """The sum of the ``batch`` losses."""
        return self._residual().square().sum()

    @torch.no_grad()
    def losses_by_problem(self) -> torch.Tensor:
        """The ``batch`` losses."""
        return self._residual().square().sum((1, 2))

    def _residual(self) -> torch.Tensor:
        return torch.baddbmm(self.y, self.W, self.theta.unsqueeze(-1), beta=-1)


class Quadratic(Problem):
    """f(theta) = ||W theta - y||^2 with fresh W ``[dim, dim]`` and y ``[dim]`` for each of ``batch`` problems per task.

    Args:
        dim: number of coordinates of one problem.
        batch: independent problems in one task. Their losses are summed, not averaged: the official code's mean over
            128 problems divides by 128 the gradient that each coordinate sees.
        family: distribution of the entries of W and y. "uniform" is U[0, 1), which the paper's published curves were
            made with (f starts at dim / 3); "gaussian" is N(0, 1), which its text says (f starts at dim);
            "ill_conditioned" has W^T W of exactly the given condition number, largest eigenvalue 1, and y from N(0, 1).
        init_std: theta_0 ~ N(0, init_std^2); the official code's 0.01 by default.
        condition: of the Hessian, at least 1; for "ill_conditioned" only.

    Raises:
        ValueError, TypeError: an option is out of its range.
    """

    name = "quadratic"

    def __init__(
        self,
        dim: int = 10,
        batch: int = 128,
        family: str = "uniform",
        init_std: float = 0.01,
        condition: float = 1e3,
    ) -> None:
        self.dim = positive_int("dim", dim)
        self.batch = positive_int("batch", batch)
        self.family = one_of("family", family, (*_FAMILIES, ILL_CONDITIONED))
        self.init_std = non_negative("init_std", init_std)
        self.condition = non_negative("condition", condition)
        if self.condition < 1.0:
            raise ValueError(f"condition must be at least 1, got {condition!r}")

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> QuadraticTask:
        return QuadraticTask(generator, self.family, self.condition, self.batch, self.dim, self.init_std, device)

    def config(self) -> dict[str, Any]:
        extra = {"condition": self.condition} if self.family == ILL_CONDITIONED else {}
        return {
            "name": self.name,
            "dim": self.dim,
            "batch": self.batch,
            "family": self.family,
            "init_std": self.init_std,
            **extra,
        }
