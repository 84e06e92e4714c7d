"""A chain of modules, each of which is updated from a predicted gradient, without waiting for those above."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...kernels.checks import positive_int
from ...kernels.surroundings import without_autocast
from .predictors import check_labels, predictor_for
from .stage import Local, Stage, checked_scale


class Backward(NamedTuple):
    """What :meth:`Decoupled.backward` found.

    Attributes:
        loss: the loss of the last module's output, detached, no dimensions.
        output: the last module's output, detached.
        predictor_losses: detached, ``[len(modules) - 1]``: every predictor's squared error, summed over a sample, mean
            over the batch, in units of ``gradient_scale`` times the gradient.
    """

    loss: Tensor
    output: Tensor
    predictor_losses: Tensor


@dataclass(frozen=True)
class Update:
    """A unit of :meth:`Decoupled.units` whose gradients are complete.

    Attributes:
        index: which unit: that of module ``index`` and of the predictor below it.
        local: what the stage's pass gave.
        predictor_loss: the error of the predictor below, detached; None for the first unit.
    """

    index: int
    local: Local
    predictor_loss: Tensor | None


class Decoupled(nn.Module):
    """Trains a chain of modules with synthetic gradients (Jaderberg et al. 2017, section 2.1 and figure 2).

    Between modules i and i + 1 stands a predictor ``M_i`` of ``dL / dh_i``. Module i is updated from ``M_i(h_i)`` at
    once; ``M_i`` is trained towards ``M_{i+1}(h_{i+1}) dh_{i+1} / dh_i`` (the last one towards the true gradient), a
    constant, by the squared error::

        net = dni.Decoupled([block1, block2, head], example=images[:2], num_classes=10)
        opt = torch.optim.Adam(net.parameters())     # or l2l.LearnedOptimizer(...): modules and predictors, one step
        for images, labels in batches:
            opt.zero_grad()
            net.backward(images, F.cross_entropy, labels)
            opt.step()
        net(images)                                  # the modules one after the other; predictors are for training

    The predictors' last layers start at zero: at first only the last module moves. A single module has no predictor:
    that is back-propagation. Modules or predictors with ``requires_grad_(False)`` stay as they are; gradients still
    pass through such a module.

    Args:
        modules: from one tensor to one floating-point tensor ``[batch, ...]`` each.
        example: an input of the first module, any batch size, to see the shapes, dtypes and devices of activities;
            nothing is trained on it, and buffers and modes stay as they are. Needed unless ``predictors`` are given.
        num_classes: number of classes, for predictors that are told the labels ("conditioned"); None: they are not.
        predictor: ``predictor(shape, num_classes)`` makes the predictor for activities of that shape (without the
            batch); ``functools.partial(dni.predictor_for, hidden=(1024, 1024))`` is the paper's largest.
        predictors: the predictors themselves, one less than modules, instead. They are called with the activity and, if
            ``num_classes`` is given, the labels, and return a tensor of the activity's shape.
        gradient_scale: what predictors give is this many times the gradient; "batch" is the number of samples, right
            for losses that are means over the batch; see :class:`Stage`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        example: Any = None,
        *,
        num_classes: int | None = None,
        predictor: Callable[..., nn.Module] = predictor_for,
        predictors: Sequence[nn.Module] | None = None,
        gradient_scale: float | str = "batch",
    ) -> None:
        super().__init__()
        chain = _checked_modules(modules)
        self.num_classes = None if num_classes is None else positive_int("num_classes", num_classes)
        gradient_scale = checked_scale(gradient_scale)
        if predictors is None:
            predictors = _made(chain, example, self.num_classes, predictor)
        else:
            predictors = list(predictors)
            for one in predictors:
                if not isinstance(one, nn.Module):
                    raise TypeError(f"predictors: expected nn.Modules, got {type(one).__name__}")
            if len(predictors) != len(chain) - 1:
                raise ValueError(f"predictors: expected {len(chain) - 1}, one less than modules, got {len(predictors)}")
        conditioned = self.num_classes is not None
        self.stages = nn.ModuleList(
            Stage(module, one, conditioned and one is not None, gradient_scale)
            for module, one in zip(chain, [*predictors, None], strict=True)
        )

    def _chain(self) -> list[Stage]:
        return cast("list[Stage]", list(self.stages))

    def forward(self, inputs: Any) -> Tensor:
        """The modules one after the other."""
        for stage in self._chain():
            inputs = stage(inputs)
        return inputs

    def backward(
        self, inputs: Any, loss_fn: Callable[..., Tensor], *targets: Any, labels: Tensor | None = None
    ) -> Backward:
        """One pass: adds to the ``.grad`` of all modules and predictors, as ``loss.backward()`` would.

        Args:
            inputs: the first module's.
            loss_fn: ``loss_fn(output, *targets)``, a scalar.
            targets: what the loss is measured against.
            labels: int64 ``[batch]``, for conditioned predictors and no others; by default the first of ``targets``.

        Raises:
            TypeError, ValueError: an argument, or what a module gave, is not as described.
            RuntimeError: gradients are switched off, or nothing requires any.
        """
        errors, loss, output = [], None, None
        for update in self.updates(inputs, loss_fn, *targets, labels=labels):
            loss, output = update.local.loss, update.local.output
            if update.predictor_loss is not None:
                errors.append(update.predictor_loss)
        assert loss is not None and output is not None  # the last stage has them
        return Backward(loss, output, torch.stack(errors) if errors else loss.new_zeros(0))

    def updates(
        self, inputs: Any, loss_fn: Callable[..., Tensor], *targets: Any, labels: Tensor | None = None
    ) -> Iterator[Update]:
        """The same pass in pieces: a unit is given as soon as its gradients are complete, before the next module has
        been called. Who updates it then is not locked::

            optimizers = [torch.optim.Adam(unit) for unit in net.units()]
            for update in net.updates(images, F.cross_entropy, labels):
                optimizers[update.index].step()
                optimizers[update.index].zero_grad()
        """
        if self.num_classes is None:
            if labels is not None:
                raise TypeError("labels: expected none, as predictors were made without num_classes, got some")
        elif labels is not None or len(self.stages) > 1:
            if labels is None and not targets:
                raise TypeError("labels: expected classes for the conditioned predictors, got none, and no targets")
            labels = check_labels(targets[0] if labels is None else labels, self.num_classes)
        return self._updates(inputs, loss_fn, targets, labels)

    def _updates(
        self, inputs: Any, loss_fn: Callable[..., Tensor], targets: tuple[Any, ...], labels: Tensor | None
    ) -> Iterator[Update]:
        activity, below, chain = inputs, None, self._chain()
        for index, stage in enumerate(chain):
            first, last = index == 0, index == len(chain) - 1
            if last:
                local = stage.finish(activity, loss_fn, *targets, first=first)
            else:
                local = stage.advance(activity, labels, first=first)
            error = None
            if below is not None and local.input_gradient is not None:
                error = chain[index - 1].fit(below, local.input_gradient)
            activity, below = local.output, local.prediction
            yield Update(index, local, error)

    def units(self) -> list[list[nn.Parameter]]:
        """Parameters by the :meth:`updates` that completes their gradients: of module i and the predictor below it.
        What several of these share is with the last of them."""
        below = [[], *(list(stage.predictor.parameters()) for stage in self._chain() if stage.predictor is not None)]
        units = [[*stage.module.parameters(), *under] for stage, under in zip(self._chain(), below, strict=True)]
        last = {id(parameter): index for index, unit in enumerate(units) for parameter in unit}
        return [
            list({id(parameter): parameter for parameter in unit if last[id(parameter)] == index}.values())
            for index, unit in enumerate(units)
        ]

    def module_parameters(self) -> Iterator[nn.Parameter]:
        """Of the modules alone, each once, for optimizers that treat predictors otherwise."""
        yield from nn.ModuleList(stage.module for stage in self._chain()).parameters()

    def predictor_parameters(self) -> Iterator[nn.Parameter]:
        """Of the predictors alone, each once."""
        yield from nn.ModuleList(stage.predictor for stage in self._chain() if stage.predictor is not None).parameters()


def _checked_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(modules, nn.Module) and not isinstance(modules, (nn.Sequential, nn.ModuleList)):
        raise TypeError(f"modules: expected a sequence of nn.Modules, got one {type(modules).__name__}")
    try:
        chain = list(modules)
    except TypeError:
        raise TypeError(f"modules: expected a sequence of nn.Modules, got {type(modules).__name__}") from None
    if not chain:
        raise ValueError("modules: expected at least one, got none")
    for module in chain:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules: expected nn.Modules, got {type(module).__name__}")
    return chain


def _made(
    chain: list[nn.Module], example: Any, num_classes: int | None, predictor: Callable[..., nn.Module]
) -> list[nn.Module]:
    if not callable(predictor):
        raise TypeError(f"predictor: expected a function that makes predictors, got {type(predictor).__name__}")
    if len(chain) == 1:
        return []
    if example is None:
        raise TypeError("example: expected an input of the first module, to see shapes; or give predictors=[...]")
    made = []
    modes = [(part, part.training) for module in chain for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False  # running statistics and random streams stay as they are
        # Or activities, and predictors made like them, would be of a type that later passes do not have.
        device = example.device if isinstance(example, Tensor) else torch.device("cpu")
        with torch.no_grad(), without_autocast(device):
            for module in chain[:-1]:
                example = module(example)
                if not isinstance(example, Tensor) or not example.is_floating_point() or example.dim() < 1:
                    raise TypeError(f"modules: expected {type(module).__name__} to return one floating-point tensor")
                one = predictor(tuple(example.shape[1:]), num_classes)
                if not isinstance(one, nn.Module):
                    raise TypeError(f"predictor: expected it to make an nn.Module, got {type(one).__name__}")
                made.append(one.to(device=example.device, dtype=example.dtype))
    finally:
        for part, mode in modes:
            part.training = mode
    return made
