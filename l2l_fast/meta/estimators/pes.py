"""Persistent evolution strategies: the gradient of the whole horizon, without bias, from truncated unrolls.

Truncated back-propagation knows nothing of what a segment's end is worth later; it learns to decay its steps too early.
PES (Vicol et al. 2021, "Unbiased gradient estimation in unrolled computation graphs with persistent evolution
strategies") perturbs phi anew in every segment and multiplies a segment's loss by *all* perturbations since the start
of the episode, because all of them made the state that it began in. No back-propagation, so anything that steps will
do: networks with memory, optimizees that cannot be differentiated twice, horizons of any length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...kernels import checks
from ...networks import effective
from ...networks.lstm import CoordinatewiseLSTM
from ...networks.several import Networks
from ...optim.optimizer import LearnedOptimizer
from ...problems import Task
from ...problems.theta import Theta
from ..assignment import optimizer_groups
from ..protocol import Protocol
from ..rollout import finite_prefix, rollout
from .base import Estimator, MetaStep, accumulate


class PES(Estimator):
    """The estimate of ``pairs`` antithetic pairs, each a task optimised by phi + eps and by phi - eps:

        1 / (2 sigma^2) * mean over pairs of xi * (L(phi + eps) - L(phi - eps)),    xi: the sum of the pair's eps so far

    with L the segment's weighted loss and eps ~ N(0, sigma^2), drawn for every segment. All pairs of an episode
    optimise the episode's task (theta_0 and minibatches in common, so that they differ by phi alone), at staggered
    ages: pair j begins ``j / pairs`` of an episode later, so that a meta-update sees the beginning of one and the end
    of another. An episode makes up to twice the meta-updates of one of truncated back-propagation. A pair that diverges
    ends there.

    What the estimate is of is the gradient of the loss smoothed by the perturbation; in expectation it is exact for any
    sigma on a loss that is quadratic in phi. Everything random comes from the episode's generator: a run is a function
    of its seed, for any number of threads, and nothing is carried from episode to episode.

    Args:
        pairs: how many; the estimate's variance falls as 1 / pairs.
        sigma: standard deviation of a perturbation; Vicol et al. take 0.01 for learned optimizers.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(self, pairs: int = 4, sigma: float = 0.01) -> None:
        self.pairs = checks.positive_int("pairs", pairs)
        self.sigma = checks.real("sigma", sigma)
        if not 0.0 < self.sigma < math.inf:
            raise ValueError(f"sigma: expected a positive number, got {sigma}")

    def episode(
        self,
        task: Task,
        net: Networks,
        protocol: Protocol,
        meta_step: MetaStep,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """See :meth:`Estimator.episode`; the losses returned are means over all members of pairs.

        Raises:
            TypeError: the task cannot be copied.
        """
        generator = torch.Generator() if generator is None else generator
        segments = list(protocol.segments())
        delays = [j * len(segments) // self.pairs for j in range(self.pairs)]
        pairs = [_Pair(task, net, protocol.horizon) for _ in delays]
        for update in range(len(segments) + delays[-1]):
            at = {j: update - delay for j, delay in enumerate(delays) if 0 <= update - delay < len(segments)}
            weights = {j: protocol.weights[slice(*segments[k])] for j, k in at.items()}
            found = [self._of(pairs[j], net, each, generator) for j, each in weights.items()]
            estimates = [each for each in found if each is not None]
            if estimates:
                accumulate(_trained(net), torch.stack(estimates).mean(0))
                meta_step()
        curves = [finite_prefix(m.losses, task.num_problems) for pair in pairs for m in pair.members]
        return [sum(values) / len(values) for values in zip(*(_padded(c, protocol.horizon + 1) for c in curves))]

    def _of(self, pair: _Pair, net: Networks, weights: Sequence[float], generator: torch.Generator) -> Tensor | None:
        """A pair's estimate over its next segment, of these weights; None if it has none to give (no weight, or it
        diverged before). One that diverges now gives NaN, so that a trainer counts an update that was left out."""
        if pair.diverged:
            return None
        centre = torch.nn.utils.parameters_to_vector(_trained(net)).detach()
        eps = self.sigma * torch.randn(centre.shape, generator=generator, dtype=centre.dtype, device="cpu")
        pair.perturbed += eps.double()
        eps = eps.to(centre.device)
        plus, minus = pair.members
        difference = (plus.advance(centre + eps, weights) - minus.advance(centre - eps, weights)).item()
        pair.diverged = not math.isfinite(difference)
        return pair.perturbed * (difference / (2.0 * self.sigma**2)) if any(weights) else None

    def config(self) -> dict[str, Any]:
        """See :meth:`Estimator.config`."""
        return {**super().config(), "estimator": "pes", "pairs": self.pairs, "sigma": self.sigma}

    def follows(self, member: CoordinatewiseLSTM) -> bool:
        """Only weights that stay: a perturbation must be the only difference within a pair."""
        return not effective.changes_by_itself(member)


class _Member:
    """One copy of the task, optimised by one copy of phi."""

    def __init__(self, task: Task, net: Networks, horizon: int) -> None:
        self.task, self.net = _copied(task), copy.deepcopy(net)
        theta = Theta(self.task)
        optimizer = LearnedOptimizer(optimizer_groups(self.task, self.net, horizon))
        # f is evaluated at theta_horizon, too; the step from there is never taken.
        self.way: Iterator[Tensor] = rollout(theta, optimizer, horizon + 1)
        self.losses = [next(self.way)]

    def advance(self, phi: Tensor, weights: Sequence[float]) -> Tensor:
        """The weighted sum of the losses per problem of the next ``len(weights)`` steps with ``phi``; float64."""
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(phi, _trained(self.net))
        losses = list(islice(self.way, len(weights)))
        self.losses += losses
        values = torch.stack(losses).flatten().double()
        used = torch.tensor(weights, dtype=torch.float64, device=values.device)
        # A loss without weight may be infinite and change nothing.
        return torch.where(used != 0.0, used * values, 0.0).sum() / self.task.num_problems


class _Pair:
    """Two copies of the task, and the sum of the perturbations of phi that they have had so far, float64."""

    def __init__(self, task: Task, net: Networks, horizon: int) -> None:
        self.members = _Member(task, net, horizon), _Member(task, net, horizon)
        count = sum(parameter.numel() for parameter in _trained(net))
        self.perturbed = torch.zeros(count, dtype=torch.float64, device="cpu")
        self.diverged = False


def _trained(net: Networks) -> list[torch.nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _copied(task: Task) -> Task:
    try:
        return copy.deepcopy(task)
    except Exception as error:
        raise TypeError(f"{task.origin or 'task'}: PES needs copies of it, and it cannot be copied: {error}") from error


def _padded(curve: list[float], length: int) -> list[float]:
    """A pair that diverged has no further losses."""
    return curve + [math.inf] * (length - len(curve))
