"""Truncated back-propagation through time in autograd: the episode unrolled, theta as a function of phi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.spectral_norm import SpectralNorm

from ...networks.lstm import CoordinatewiseLSTM
from ...networks.several import Networks
from ...problems import Task
from ...problems.theta import Theta
from ..protocol import Protocol
from ..rollout import finite_prefix
from .base import Estimator, MetaLoss, MetaStep, SegmentTrace, weighted_sum
from .walkers import Rounded, as_theta, walkers, with_edits


class AutogradBPTT(Estimator):
    """theta is a function of phi, updated by the functional step.

    Serves what the fused backward cannot: second derivatives of f (``protocol.second_derivatives``) and any
    ``meta_loss``. Without them it gives the gradients of :class:`FusedBPTT`: theta's values live in the task, where
    f and its gradient are taken in the very same way, and f(theta_t) enters the meta-loss through that gradient. What f
    does to its own parameters stays there, as a constant shift, see
    :func:`l2l_fast.meta.estimators.walkers.with_edits`.

    Args:
        meta_loss: in the place of the weighted sum.
    """

    autograd = True

    def __init__(self, meta_loss: MetaLoss | None = None) -> None:
        self.meta_loss = meta_loss

    def episode(
        self,
        task: Task,
        net: Networks,
        protocol: Protocol,
        meta_step: MetaStep,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """See :meth:`Estimator.episode`.

        Raises:
            NotImplementedError: second derivatives of, or a ``meta_loss`` that evaluates, a task that recomputes its
                activations in the backward pass (gradient checkpointing).
        """
        place = Theta(task)
        dtypes = {name: parameter.dtype for name, parameter in place.parameters.items()}
        theta = {name: as_theta(parameter) for name, parameter in place.parameters.items()}
        steppers = walkers(task, net, theta, protocol.horizon)
        loss = place.evaluate()
        theta = with_edits(theta, place.parameters)
        grads = place.grads()
        history = [loss]
        for start, end in protocol.segments():
            theta = {name: value.detach() for name, value in theta.items()}
            grads = {name: None if grad is None else grad.detach() for name, grad in grads.items()}
            for walker in steppers:
                walker.detach()
            losses = [loss]
            for t in range(start, end):
                moved = {name: value for w in steppers for name, value in w.step(theta, grads).items()}
                moved = {name: _rounded(value, dtypes[name]) for name, value in moved.items()}
                theta = {**theta, **moved}
                place.write(moved)
                # Beyond the boundary nothing depends on the segment's phi, so its last gradient is a mere value.
                if protocol.second_derivatives and t + 1 < end:
                    values = {name: value.to(dtypes[name]) for name, value in _differentiable(theta).items()}
                    loss, found = place.evaluate_differentiably(values)
                    grads = dict(zip(values, found))
                    theta = with_edits(theta, values)
                else:
                    loss, grads = place.evaluate(), place.grads()
                    theta = with_edits(theta, place.parameters)
                losses.append(_Loss.apply(loss, *theta.values(), *(grads[name] for name in theta)))
                history.append(loss)
            if not any(protocol.weights[start:end]):
                continue
            weights = torch.tensor(protocol.weights[start:end], dtype=loss.dtype, device=loss.device)
            present = {name: value.to(dtypes[name]) for name, value in theta.items()}
            trace = SegmentTrace(torch.stack(losses) / task.num_problems, weights, start, end, present, task)
            objective = weighted_sum(trace) if self.meta_loss is None else _checked(self.meta_loss(trace))
            with place.out_of_reach():
                objective.backward(inputs=[parameter for parameter in net.parameters() if parameter.requires_grad])
            meta_step()
        return finite_prefix(history, task.num_problems)

    def follows(self, member: CoordinatewiseLSTM) -> bool:
        """Every step may look at other weights, but not at those of a spectral norm that is still being estimated."""
        hooks = member._forward_pre_hooks.values()
        return not (member.training and any(isinstance(hook, SpectralNorm) for hook in hooks))


class _Loss(torch.autograd.Function):
    """f(theta) as a function of theta, whose gradient is known already: once is enough to evaluate f."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *theta_and_grads: Tensor | None) -> Tensor:
        half = len(theta_and_grads) // 2
        ctx.dtypes = [value.dtype for value in theta_and_grads[:half]]  # type: ignore[union-attr]
        ctx.save_for_backward(*theta_and_grads[half:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        products = [
            None if known is None else grad.to(dtype) * known.to(dtype)
            for known, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (None, *products, *[None] * len(products))


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else Rounded.apply(value, dtype)


def _differentiable(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    # A parameter that has not moved yet is a constant, of which autograd would give no gradient.
    return {name: value if value.requires_grad else value.requires_grad_() for name, value in theta.items()}


def _checked(objective: Tensor) -> Tensor:
    if not isinstance(objective, Tensor) or objective.numel() != 1:
        got = f"a tensor of shape {tuple(objective.shape)}" if isinstance(objective, Tensor) else repr(objective)
        raise ValueError(f"meta_loss: must return a scalar tensor, got {got}")
    if not objective.requires_grad:
        raise ValueError("meta_loss: the returned value does not depend on the network's parameters")
    return objective.reshape(())
