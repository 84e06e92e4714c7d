"""Matrix products that autocast does not reach, nor their derivatives of any order.

Switching autocast off around a product is half of it: autograd computes the derivatives later, in whatever mode it
finds then, and that is the caller's again if ``backward()`` or ``torch.autograd.grad`` stand within the region, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .surroundings import has_autocast, without_autocast


def product(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """``a b`` in the dtype of its factors, added to ``onto`` if that is given: matrices, batches of matrices, or a
    matrix and a vector."""
    if a.dtype is torch.float64 or not has_autocast(a.device):  # which leaves float64 alone
        return _product(onto, a, b)
    if torch.compiler.is_compiling():  # where the backward pass is traced without autocast, and there is no jvp
        with without_autocast(a.device):
            return _product(onto, a, b)
    return _Product.apply(onto, a, b)


def _product(onto: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    if b.dim() == 1:
        return torch.mv(a, b) if onto is None else torch.addmv(onto, a, b)
    if b.dim() == 2:
        return torch.mm(a, b) if onto is None else torch.addmm(onto, a, b)
    return torch.bmm(a, b) if onto is None else torch.baddbmm(onto, a, b)


class _Product(torch.autograd.Function):
    """Differentiated into products of its own kind, under torch.func's transforms and forward-mode AD too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(onto: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a.device):
            return _product(onto, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        onto, a, b = inputs
        ctx.adds = onto is not None
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        _, need_a, need_b = ctx.needs_input_grad
        grad_a = grad_b = None
        # Shielded whatever the mode is now: that of a derivative's derivative may be another one.
        if need_a:
            grad_a = grad.unsqueeze(1) * b if b.dim() == 1 else _Product.apply(None, grad, b.mT)
        if need_b:
            grad_b = _Product.apply(None, a.mT, grad)
        return grad if ctx.adds else None, grad_a, grad_b

    @staticmethod
    def jvp(ctx: Any, onto: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        saved_a, saved_b = ctx.saved_tensors
        tangent = onto
        for left, right in ((a, saved_b), (saved_a, b)):
            if left is not None and right is not None:
                part = _Product.apply(None, left, right)
                tangent = part if tangent is None else tangent + part
        return tangent
