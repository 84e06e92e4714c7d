"""Muon (Jordan et al. 2024), as it is used for whole networks: matrices orthogonalized, everything else by Adam.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon;
the scale of the updates: Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2, arXiv 2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from ...kernels import operators
from ...kernels.checks import as_float
from ...networks.orthogonal import RMS, matrix_shape

MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam, as torch has them
NS_STEPS = 5


class Muon(Optimizer):
    """Momentum, orthogonalized, for matrices; Adam for all else. No weight decay.

    A parameter of two or more dimensions is a matrix ``[shape[0], prod(rest)]``; with at least two rows and columns its
    update is ``b = 0.95 b + g``, ``theta -= lr * 0.2 * sqrt(max(rows, cols)) * NS(g + 0.95 b)``, where NS is five
    Newton-Schulz steps (in the parameter's precision, float32 at least; ``torch.optim.Muon`` has bfloat16). All others
    are updated as by ``torch.optim.Adam(lr=lr)``.

    Embeddings and the last layer are matrices as others are: parameters alone do not tell which they are.

    Args:
        params: as of every torch optimizer, real and dense.
        lr: of both parts; every group's may be changed between steps.

    Raises:
        ValueError: ``lr`` is negative or not finite. TypeError: it is no number, or (by ``step``) a gradient is sparse
            or complex.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        number = as_float(lr)
        if number is None:
            raise TypeError(f"lr must be a number, got {lr!r}")
        if not 0.0 <= number < math.inf:
            raise ValueError(f"lr must be at least 0 and finite, got {lr!r}")
        super().__init__(params, {"lr": number})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        there = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameter in (p for each in there for p in each):
            _check(parameter)
        for group, parameters in zip(self.param_groups, there):
            matrices = [p for p in parameters if matrix_shape(p.shape)]
            self._orthogonalized(matrices, float(group["lr"]))
            self._adam([p for p in parameters if not matrix_shape(p.shape)], float(group["lr"]))
        return loss

    def _orthogonalized(self, parameters: list[Tensor], lr: float) -> None:
        alike: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            key = matrix_shape(parameter.shape), parameter.dtype, parameter.device
            alike.setdefault(key, []).append(parameter)
        for each in alike.values():
            rows, cols = matrix_shape(each[0].shape) or (0, 0)
            grads = [_grad(p) for p in each]
            for parameter in each:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[p]["momentum_buffer"] for p in each]
            torch._foreach_mul_(buffers, MOMENTUM)
            torch._foreach_add_(buffers, grads)
            directions = torch._foreach_add(grads, buffers, alpha=MOMENTUM)
            stack = torch.stack([direction.reshape(rows, cols) for direction in directions])
            stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
            updates = operators.orthogonalized(stack, NS_STEPS).to(each[0].dtype)
            shaped = [update.reshape(p.shape) for p, update in zip(each, updates)]
            torch._foreach_add_(each, shaped, alpha=-lr * RMS * math.sqrt(max(rows, cols)))

    def _adam(self, parameters: list[Tensor], lr: float) -> None:
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        means, squares, steps = ([self.state[p][k] for p in parameters] for k in ("exp_avg", "exp_avg_sq", "step"))
        adam(
            parameters, [_grad(p) for p in parameters], means, squares, [], steps, fused=True, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=0.0, eps=EPS, maximize=False,
        )  # fmt: skip


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _check(parameter: Tensor) -> None:
    grad = _grad(parameter)
    if grad.layout is not torch.strided or grad.is_complex():
        what = f"{grad.dtype}, {grad.layout}, of shape {list(grad.shape)}"
        raise TypeError(f"Muon: expected dense real gradients, got one of {what}")
