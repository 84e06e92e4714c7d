"""One module of a decoupled network, with the predictor behind it: it needs nothing of the modules above."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.checks import real


class Local(NamedTuple):
    """What one pass through one stage gave.

    Attributes:
        output: the module's output, detached: what the next stage gets.
        input_gradient: dL / d input as this stage knows it, detached, in the input's shape: what the predictor below is
            trained towards. None of the first stage.
        prediction: the predictor's own output, with its graph: hand it to :meth:`Stage.fit`. None in the last stage.
        loss: the loss, detached. None but in the last stage.
    """

    output: Tensor
    input_gradient: Tensor | None
    prediction: Tensor | None
    loss: Tensor | None


class Stage(nn.Module):
    """A module and the predictor of the gradient with respect to its output.

    A stage exchanges two things with its neighbours: it gets an activity from below and hands down, as soon as it has
    them, gradients for the predictor there. Stages can so be run in threads or processes of their own, each at its own
    pace; :class:`Decoupled` runs them one after the other.

    Args:
        module: from one tensor to one floating-point tensor.
        predictor: ``predictor(activity, labels)`` if ``conditioned``, else ``predictor(activity)``, gives a tensor of
            the activity's shape; None for the last stage, which has the true gradient.
        conditioned: whether the predictor gets labels.
        gradient_scale: the predictor's output is ``gradient_scale`` times the gradient. "batch": the number of samples,
            so that what is predicted for a sample, of a loss that is a mean over the batch, does not shrink with the
            batch. 1.0 for losses that are sums.
    """

    def __init__(
        self,
        module: nn.Module,
        predictor: nn.Module | None,
        conditioned: bool = False,
        gradient_scale: float | str = 1.0,
    ) -> None:
        super().__init__()
        self.module = module
        self.predictor = predictor
        self.conditioned = conditioned
        self.gradient_scale = checked_scale(gradient_scale)

    def forward(self, activity: Tensor) -> Tensor:
        """The module's output, as if nothing were decoupled."""
        return self.module(activity)

    def advance(self, activity: Any, labels: Tensor | None = None, *, first: bool = False) -> Local:
        """Run the module and add the predicted gradient to its parameters' ``.grad``: M(h) dh / d theta.

        Args:
            activity: the input, ``Local.output`` of the stage below.
            labels: int64 ``[batch]``, for a predictor that is conditioned.
            first: nothing is below: the module gets the input as it is, of any type, and back-propagation goes on into
                the graph that it may have.

        Raises:
            TypeError, ValueError: what the module or the predictor gave is not as they promise.
            RuntimeError: gradients are switched off, or this is the last stage.
        """
        if self.predictor is None:
            raise RuntimeError("advance: the last stage has no predictor; its gradient comes from finish()")
        leaf, output = self._run(activity, first)
        prediction = self.predict(output, labels)
        if output.requires_grad:
            gradient = prediction.detach() / self._scale(output)
            torch.autograd.backward(output, gradient.to(output.dtype))
        return Local(output.detach(), _gradient(leaf), prediction, None)

    def finish(self, activity: Any, loss_fn: Callable[..., Tensor], *targets: Any, first: bool = False) -> Local:
        """The last stage: run the module and back-propagate ``loss_fn(output, *targets)`` through it.

        Raises:
            TypeError, ValueError: the module gave no floating-point tensor, or ``loss_fn`` no scalar.
            RuntimeError: gradients are switched off, or nothing requires any.
        """
        leaf, output = self._run(activity, first)
        loss = scalar(loss_fn(output, *targets))
        loss.backward()
        return Local(output.detach(), _gradient(leaf), None, loss.detach())

    def predict(self, activity: Tensor, labels: Tensor | None = None) -> Tensor:
        """The predictor's output for an activity of this stage, with its graph.

        ``advance`` gives one that :meth:`fit` takes as long as the predictor has not been updated since. Whoever gets
        the gradient later, after updates for other minibatches, predicts anew: ``fit(predict(h, labels), gradient)``.

        Raises:
            TypeError, ValueError: the predictor gave something else than a tensor of the activity's shape.
        """
        if self.predictor is None:
            raise TypeError("predictor: this stage was made without one, as the last of a chain is")
        activity = activity.detach()
        prediction = self.predictor(activity, labels) if self.conditioned else self.predictor(activity)
        if not isinstance(prediction, Tensor):
            raise TypeError(f"predictor: expected a tensor, got {type(prediction).__name__}")
        if prediction.shape != activity.shape:
            raise ValueError(
                f"predictor: expected the activity's shape {tuple(activity.shape)}, got {tuple(prediction.shape)}"
            )
        return prediction

    def fit(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Add to the predictor's ``.grad`` that of its error: squared, summed over a sample, mean over the batch.

        Args:
            prediction: ``Local.prediction`` of this stage.
            gradient: ``Local.input_gradient`` of the stage above, for the same minibatch; a constant here.

        Returns:
            The error, detached; a mean over no samples is 0.
        """
        target = gradient.detach() * self._scale(gradient)
        error = squared_error(prediction, target)
        if error.requires_grad:
            error.backward()
        return error.detach()

    def _run(self, activity: Any, first: bool) -> tuple[Tensor | None, Tensor]:
        if not torch.is_grad_enabled():
            raise RuntimeError("gradients are switched off here (no_grad or inference_mode); nothing can be trained")
        leaf, own = None, activity
        if not first:
            leaf = activity.detach().requires_grad_()
            own = leaf.clone()  # for modules that write to their input: the predictor below still has the other one
        output = self.module(own)
        name = type(self.module).__name__
        if not isinstance(output, Tensor):
            raise TypeError(f"modules: expected {name} to return one tensor, got {type(output).__name__}")
        if not output.is_floating_point():
            raise TypeError(f"modules: expected {name} to return floating-point numbers, got {output.dtype}")
        return leaf, output

    def _scale(self, activity: Tensor) -> float:
        return scale_of(self.gradient_scale, len(activity))

    def extra_repr(self) -> str:
        return f"conditioned={self.conditioned}, gradient_scale={self.gradient_scale!r}"


# ---- what stages and recurrent networks share ----


def checked_scale(value: float | str) -> float | str:
    """A ``gradient_scale``; TypeError or ValueError if it is none."""
    if isinstance(value, str) and value != "batch":
        raise ValueError(f'gradient_scale: expected "batch" or a number > 0, got {value!r}')
    return value if isinstance(value, str) else real("gradient_scale", value, above=0.0)


def scale_of(gradient_scale: float | str, batch: int) -> float:
    """The number that it is for so many samples."""
    return float(max(batch, 1)) if gradient_scale == "batch" else float(gradient_scale)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Summed over a sample, mean over the batch."""
    # Under autocast both may be bfloat16, whose squares lose what a small error is about.
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().sum() / max(len(prediction), 1)


def scalar(loss: Any) -> Tensor:
    """What a ``loss_fn`` gave; TypeError or ValueError unless it is one number in a tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: expected a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn: expected a scalar tensor, got shape {tuple(loss.shape)}")
    return loss


def _gradient(leaf: Tensor | None) -> Tensor | None:
    # A module whose output does not depend on its input leaves no gradient there.
    return leaf if leaf is None else torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
