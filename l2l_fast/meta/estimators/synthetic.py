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
        self.predictor_lr = _at_least_zero("predictor_lr", predictor_lr)
        self.discount = _part("discount", discount)
        self.bp_lambda = _part("bp_lambda", bp_lambda)
        self.auxiliary = _at_least_zero("auxiliary", auxiliary)
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
        at = course.chosen(course.boundary(0))
        for start, end in protocol.segments():
            optimizer.start_segment()
            for loss in islice(way, end - start):
                losses.append(loss)
                course.see()
            weights = [w / task.num_problems for w in protocol.weights[start:end]]
            following = course.boundary(end)
            predicted = course.predict(following)
            if not (any(weights) or predicted):
                optimizer.discard_segment()
            else:
                found = optimizer.backward_segment(
                    weights,
                    course.of_states(predicted),
                    True,
                    grad_end_params=course.of_params(predicted),
                    return_grad_start_params=True,
                )
                meta_step()
                course.learn(at, found, predicted, end)
            at = course.chosen(following)
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

    def boundary(self, t: int) -> dict[_Tensor, Boundary]:
        """What is known at theta_t, of all tensors that ever had a gradient."""
        left, progress = self.left[t], t / self.protocol.horizon
        found = {}
        for tensor in self.tensors:
            if tensor.moments.steps:
                state = self.optimizer.state_of(tensor.param)
                found[tensor] = Boundary.of(tensor.moments, state, tensor.network.config, left, progress)
        return found

    def chosen(self, at: Mapping[_Tensor, Boundary]) -> dict[_Tensor, tuple[Tensor, Boundary]]:
        """The tiles of each tensor that the predictors will learn from, and what is known of them: the rest of it takes
        as much memory as the state."""
        found = {}
        for tensor, boundary in at.items() if self.estimator.predictor_lr > 0.0 else ():
            if boundary.left > 0.0:
                number = boundary.x.shape[0]
                count = min(number, math.ceil(self.estimator.coordinates / TILE))
                tiles = torch.randperm(number, generator=self.generator, device="cpu")[:count].sort().values
                tiles = tiles.to(boundary.x.device)
                found[tensor] = tiles, boundary.part(tiles)
        return found

    def predict(self, at: Mapping[_Tensor, Boundary]) -> dict[_Tensor, Tensor]:
        """The synthetic gradients ``[tiles, 1 + rows, 64]``, discounted; none where there is nothing to come, or
        nothing known."""
        return {
            tensor: self.factor * tensor.predictor.predict(boundary)
            for tensor, boundary in at.items()
            if boundary.left > 0.0 and not tensor.predictor.is_zero()
        }

    def of_states(self, predicted: Mapping[_Tensor, Tensor]) -> dict[Tensor, State]:
        """As ``backward_segment`` takes them."""
        found = {}
        for tensor, values in predicted.items():
            state = self.optimizer.state_of(tensor.param)
            if state is not None:
                data = torch.zeros_like(state.data)
                data[:, : tensor.rows] = values[:, 1:]
                found[tensor.param] = like(state, data)
        return found

    def of_params(self, predicted: Mapping[_Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """As ``backward_segment`` takes them."""
        return {
            tensor.param: values[:, 0].reshape(-1)[: tensor.param.numel()].view(tensor.param.shape)
            for tensor, values in predicted.items()
        }

    def learn(
        self,
        at: Mapping[_Tensor, tuple[Tensor, Boundary]],
        found: StartGradients,
        predicted: Mapping[_Tensor, Tensor],
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
            if later is not None:
                left = self.factor * self.left[end]
                example = example._replace(following=later[tiles], following_left=left)
            learned.append(_Learned(tensor, tiles, example, returned, None if later is None else later[:, :1].clone()))
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


def _part(name: str, value: Any) -> float:
    number = _at_least_zero(name, value)
    if number > 1.0:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")
    return number


def _at_least_zero(name: str, value: Any) -> float:
    number = checks.real(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return number
