"""Truncated back-propagation that does not ignore the future: synthetic gradients at the boundaries of segments.

Back-propagation over a segment of T steps gives d L_segment / d phi, as if the episode ended there. With a prediction
SG of the gradient of the future loss with respect to what crosses the boundary, x_T = (h, c and theta of every
coordinate), the meta-gradient becomes (Jaderberg et al. 2017, "Decoupled neural interfaces using synthetic gradients",
section 2.1 on recurrent networks)

    sum over the segment of d L / d phi + SG(x_T) d x_T / d phi

and SG is trained at the segment's start towards stop_gradient[ d L_segment / d x_0 + SG(x_T) d x_T / d x_0 ], which the
same backward pass returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import checks
from ...kernels.state import TILE, State
from ...networks.lstm import CoordinatewiseLSTM
from ...networks.several import Networks, members
from ...optim.optimizer import LearnedOptimizer
from ...optim.segment_backward import like
from ...optim.segment_params import StartGradients
from ...problems import Task
from ...problems.theta import Theta
from ..assignment import names_by_network, optimizer_groups
from ..protocol import Protocol
from ..rollout import finite_prefix, rollout
from .base import MetaStep
from .fused import FusedBPTT
from .predictor import Boundary, Example, Moments, Predictor, tiled

_BLOCK = 256  # tiles that a prediction is made of at once, which needs several times the memory of their state
_ONE = "net"  # how the predictor of a single network is called in checkpoints


class SyntheticGradients(FusedBPTT):
    """Truncated back-propagation with a predictor of what comes after each segment, one for every network
    (:mod:`l2l_fast.meta.estimators.predictor`). It starts from zero, as truncated back-propagation bit for bit, learns
    along with the network, after every segment, and is part of checkpoints.

    Args:
        units: of the predictor's hidden layer.
        predictor_lr: of the predictor's Adam; 0: it is not trained.
        discount: what comes after a segment counts this much, to the power of its number of steps; 1, as in the paper:
            as much as the segment itself. Back-propagation through an optimizer holds the gradients of f constant, as
            if the steps to come did not answer to what is done now. So the gradient over a long horizon, even where it
            is exact, is not the true one, and less of it can be better (docs/synthetic_gradients.md).
        bp_lambda: BP(lambda) of the paper, for theta: targets mix what is predicted at the next boundary with what the
            rest of the episode has brought, ``(1 - bp_lambda)`` to ``bp_lambda``. 1: no prediction is in the targets of
            theta, which are then known at the end of the episode, when the predictor is trained. Those of (h, c) are
            always bootstrapped: anything else would need every segment's backward pass twice.
        auxiliary: above 0, the predictor also predicts, by a second read-out of its hidden layer, its own prediction at
            the next boundary, with this weight in its loss.
        coordinates: of every tensor, about so many at most, drawn anew for every segment, train the predictor.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(
        self,
        units: int = 32,
        predictor_lr: float = 3e-3,
        discount: float = 0.95,
        bp_lambda: float = 0.0,
        auxiliary: float = 0.0,
        coordinates: int = 2048,
    ) -> None:
        super().__init__()
        self.units = checks.positive_int("units", units)
        self.predictor_lr = checks.real("predictor_lr", predictor_lr, 0.0)
        self.discount = checks.real("discount", discount, 0.0, 1.0, expected="a number between 0 and 1")
        self.bp_lambda = checks.real("bp_lambda", bp_lambda, 0.0, 1.0, expected="a number between 0 and 1")
        self.auxiliary = checks.real("auxiliary", auxiliary, 0.0)
        self.coordinates = checks.positive_int("coordinates", coordinates)
        self.predictors: dict[str, Predictor] = {}

    def episode(
        self,
        task: Task,
        net: Networks,
        protocol: Protocol,
        meta_step: MetaStep,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """See :meth:`Estimator.episode`. A segment without weight has a gradient here, if there is weight to come."""
        generator = torch.Generator() if generator is None else generator
        theta = Theta(task)
        optimizer = LearnedOptimizer(optimizer_groups(task, net, protocol.horizon))
        course = _Course(self, task, net, theta, optimizer, protocol, generator)
        way = rollout(theta, optimizer, protocol.horizon + 1)
        losses = [next(way)]
        course.see()
        at = course.chosen(0)
        for start, end in protocol.segments():
            optimizer.start_segment()
            for loss in islice(way, end - start):
                losses.append(loss)
                course.see()
            weights = [w / task.num_problems for w in protocol.weights[start:end]]
            predicted = course.predict(end)
            if not (any(weights) or predicted):
                optimizer.discard_segment()
            else:
                learns = self.predictor_lr > 0.0
                found = optimizer.backward_segment(
                    weights,
                    {tensor.param: each.state for tensor, each in predicted.items() if each.state is not None},
                    learns,
                    grad_end_params={tensor.param: each.params(tensor.param) for tensor, each in predicted.items()},
                    return_grad_start_params=learns,
                )
                meta_step()
                if learns:
                    assert isinstance(found, StartGradients)  # as asked for
                    course.learn(at, found, predicted, end)
            at = course.chosen(end)
        course.finish()
        return finite_prefix(losses, task.num_problems)

    def config(self) -> dict[str, Any]:
        """See :meth:`Estimator.config`."""
        names = ("units", "predictor_lr", "discount", "bp_lambda", "auxiliary", "coordinates")
        own = {name: getattr(self, name) for name in names}
        return {**super().config(), "estimator": "synthetic_gradients", **own}

    def predictor_of(self, key: str, network: CoordinatewiseLSTM, generator: torch.Generator) -> Predictor:
        """The predictor of a network, made when it is first asked for."""
        key = key or _ONE
        if key not in self.predictors:
            self.predictors[key] = Predictor(network.config, self.units, generator, self.auxiliary > 0.0)
        predictor = self.predictors[key]
        if not predictor.fits(network.config):
            raise ValueError(f"net: its predictor of synthetic gradients was made for another network than {network}")
        return predictor

    def state_dict(self) -> dict[str, Tensor]:
        """See :meth:`Estimator.state_dict`."""
        return {
            f"{key}.{name}": value
            for key, predictor in self.predictors.items()
            for name, value in predictor.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Estimator.load_state_dict`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            key, _, rest = name.partition(".")
            parts.setdefault(key, {})[rest] = value
        made = {key: Predictor.from_state_dict(part, self.units, self.auxiliary > 0.0) for key, part in parts.items()}
        self.predictors = made


class _Tensor:
    """One tensor of the task: its network, what its gradients were, and what its predictor learns from it."""

    def __init__(self, param: Tensor, key: str, network: CoordinatewiseLSTM, predictor: Predictor) -> None:
        self.param, self.key, self.network, self.predictor = param, key, network, predictor
        self.moments = Moments(param)
        self.rows = network.config.rows - network.config.averages


class _Predicted(NamedTuple):
    """The synthetic gradient of a tensor: with respect to theta, in tiles ``[tiles, 1, 64]``, and to its state."""

    theta: Tensor
    state: State | None

    def params(self, param: Tensor) -> Tensor:
        """That of theta in the shape of the parameter."""
        return self.theta.view(-1)[: param.numel()].view(param.shape)


class _Learned(NamedTuple):
    """What a segment has to teach about its beginning, of one tensor: an example without its target of theta, the tiles
    it is of, and the whole tensor's gradients with respect to theta that its backward pass returned and was given."""

    tensor: _Tensor
    tiles: Tensor
    example: Example
    returned: Tensor
    injected: Tensor | None


class _Course:
    """An episode's way from boundary to boundary."""

    def __init__(
        self,
        estimator: SyntheticGradients,
        task: Task,
        net: Networks,
        theta: Theta,
        optimizer: LearnedOptimizer,
        protocol: Protocol,
        generator: torch.Generator,
    ) -> None:
        self.estimator, self.optimizer, self.protocol, self.generator = estimator, optimizer, protocol, generator
        self.left = self._weights_left(task.num_problems)
        self.tensors: list[_Tensor] = []
        self.kept: list[list[_Learned]] = []  # by segment, where learning waits for the end
        networks = members(net)
        for key, names in names_by_network(task, net).items():
            for name in names:
                param = theta.parameters[name]
                predictor = estimator.predictor_of(key, networks[key], generator).to(param.device)
                if param.numel():
                    self.tensors.append(_Tensor(param, key, networks[key], predictor))

    def _weights_left(self, num_problems: int) -> dict[int, float]:
        """By boundary: the weights of the losses to come, those of the next segment in full, the others discounted."""
        found = {self.protocol.horizon: 0.0}
        for start, end in reversed(self.protocol.segments()):
            own = sum(self.protocol.weights[start:end]) / num_problems
            found[start] = own + self.factor * found[end]
        return found

    @property
    def factor(self) -> float:
        """What the future counts at a boundary, beside the segment that ends there."""
        return self.estimator.discount**self.protocol.unroll

    def see(self) -> None:
        """The gradients are those of the next theta."""
        for tensor in self.tensors:
            if tensor.param.grad is not None:
                tensor.moments.update(tensor.param.grad)

    def chosen(self, t: int) -> dict[_Tensor, tuple[Tensor, Boundary]]:
        """Tiles of every tensor that ever had a gradient, which the predictors will learn from, and what is known of
        them at theta_t. Of all tiles it would take as much memory as the state."""
        found = {}
        for tensor in self._known(t) if self.estimator.predictor_lr > 0.0 else ():
            number = tensor.moments.grad.shape[0]
            count = min(number, math.ceil(self.estimator.coordinates / TILE))
            tiles = torch.randperm(number, generator=self.generator, device="cpu")[:count].sort().values
            tiles = tiles.to(tensor.param.device)
            found[tensor] = tiles, self._boundary(tensor, self.optimizer.state_of(tensor.param), t, tiles)
        return found

    def predict(self, t: int) -> dict[_Tensor, _Predicted]:
        """The synthetic gradients at theta_t, discounted; none where there is nothing to come, or nothing known."""
        found: dict[_Tensor, _Predicted] = {}
        known = self._known(t)
        silent = {predictor for predictor in {tensor.predictor for tensor in known} if predictor.is_zero()}
        for tensor in known:
            if tensor.predictor in silent:
                continue
            state = self.optimizer.state_of(tensor.param)
            theta = torch.empty_like(tensor.moments.grad)
            end = None if state is None else like(state, torch.zeros_like(state.data))
            for first in range(0, theta.shape[0], _BLOCK):
                block = slice(first, first + _BLOCK)
                values = self.factor * tensor.predictor.predict(self._boundary(tensor, state, t, block))
                theta[block] = values[:, :1]
                if end is not None:
                    end.data[block, : tensor.rows] = values[:, 1:]
            found[tensor] = _Predicted(theta, end)
        return found

    def _known(self, t: int) -> list[_Tensor]:
        """The tensors whose future can be predicted at theta_t."""
        return [tensor for tensor in self.tensors if tensor.moments.steps and self.left[t] > 0.0]

    def _boundary(self, tensor: _Tensor, state: State | None, t: int, tiles: Tensor | slice) -> Boundary:
        progress = t / self.protocol.horizon
        return Boundary.of(tensor.moments, state, tensor.network.config, self.left[t], progress, tiles)

    def learn(
        self,
        at: Mapping[_Tensor, tuple[Tensor, Boundary]],
        found: StartGradients,
        predicted: Mapping[_Tensor, _Predicted],
        end: int,
    ) -> None:
        """Take the gradients that a segment returned as targets at its beginning, now or at the end of the episode."""
        learned = []
        for tensor, (tiles, part) in at.items():
            state = (found.states or {}).get(tensor.param)
            if state is None:
                continue  # it has not moved yet
            later = predicted.get(tensor)
            target = torch.where(part.inside, state.data[tiles, : tensor.rows].float(), 0.0)
            returned = tiled(found.params[tensor.param])
            example = Example(part, returned[tiles], target)
            if later is not None and later.state is not None:
                values = torch.cat([later.theta[tiles], later.state.data[tiles, : tensor.rows].float()], dim=1)
                example = example._replace(following=values, following_left=self.factor * self.left[end])
            learned.append(_Learned(tensor, tiles, example, returned, None if later is None else later.theta))
        if self.estimator.bp_lambda == 0.0:
            self._step(learned)
        else:
            self.kept.append(learned)

    def finish(self) -> None:
        """Learn what had to wait: with G the targets of theta at the next boundary, discounted, what was injected there
        is replaced by ``(1 - lambda) SG + lambda G``. d theta_T / d theta_0 is 1, so the difference is all to be added.
        """
        targets: dict[_Tensor, Tensor] = {}
        for learned in reversed(self.kept):
            changed = []
            for each in learned:
                target = each.returned
                if each.tensor in targets:
                    before = 0.0 if each.injected is None else each.injected
                    target = target + self.estimator.bp_lambda * (self.factor * targets[each.tensor] - before)
                targets[each.tensor] = target
                changed.append(each._replace(example=each.example._replace(theta=target[each.tiles])))
            self._step(changed)

    def _step(self, learned: list[_Learned]) -> None:
        by_key: dict[str, list[_Learned]] = {}
        for each in learned:
            by_key.setdefault(each.tensor.key, []).append(each)
        for group in by_key.values():
            tensor = group[0].tensor
            examples = [each.example for each in group]
            tensor.predictor.learn(examples, self.estimator.predictor_lr, self.estimator.auxiliary)
