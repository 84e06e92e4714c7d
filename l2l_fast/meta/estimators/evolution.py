"""Evolution strategies over whole episodes of a general-purpose optimizer: few weights, long horizons, many tasks.

What no truncated gradient sees, a schedule, a gain per kind of tensor, how bold to be early on, is learned by comparing
whole ways. Every member of a crowd keeps one perturbation of phi for all of its episode, while phi itself moves on
(ES-Single, Vicol 2023, "Low-variance gradient estimation in unrolled computation graphs with ES-single"): its estimate
is of the loss over the horizon up to now, with less variance than fresh perturbations have. All members of a crowd
have theta_0 and minibatches in common, so that they differ by phi alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ...kernels import checks
from ...kernels.tensor_inputs import DEFAULT_INPUTS
from ...networks import effective
from ...networks.lstm import CoordinatewiseLSTM
from ...networks.several import Networks, members
from ...problems import Task
from ...problems.zoo.task import ZooTask
from ..crowd import Crowd
from ..protocol import Protocol
from ..rollout import finite_prefix
from .base import Estimator, MetaStep, accumulate

_LARGEST = 4.0  # difference of two members' log losses: one that diverges is much worse, but not all there is
_FLOOR = 1e-6  # of losses, as a part of f(theta_0)


class Evolution(Estimator):
    """The estimate of ``pairs`` antithetic pairs of members, after every segment of ``unroll`` steps:

        1 / (2 sigma^2) * mean over pairs of eps * clip(L(phi + eps) - L(phi - eps), -4, 4),    eps ~ N(0, sigma^2)

    where L is the mean of ln f over the segment, times a weight that rises from 0.5 at the start of an episode to 2 at
    its end. The number of steps T of an episode is drawn from [shortest, horizon], its logarithm uniform.

    Only for zoo tasks of one problem, and a normalized network with the default inputs per tensor. Everything random
    comes from the episode's generator.

    Args:
        pairs: how many; a crowd has twice as many members.
        sigma: standard deviation of a perturbation.
        shortest: the least number of steps of an episode.
        parameters: names of those of the network that are trained; the variance of the estimate grows with their size.
            Default: all that act beside phi, ``weight_nominal`` and, of a network that has it, ``weight_orthogonal``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(
        self,
        pairs: int = 4,
        sigma: float = 0.1,
        shortest: int = 200,
        parameters: Sequence[str] | None = None,
    ) -> None:
        self.pairs = checks.positive_int("pairs", pairs)
        self.sigma = checks.real("sigma", sigma)
        self.shortest = checks.positive_int("shortest", shortest)
        if not 0.0 < self.sigma < math.inf:
            raise ValueError(f"sigma: expected a positive number, got {sigma}")
        if parameters is not None:
            if isinstance(parameters, str) or not parameters or not all(isinstance(name, str) for name in parameters):
                raise TypeError(f"parameters: expected names such as ('weight_nominal',), or None, got {parameters!r}")
            parameters = tuple(parameters)
        self.parameters = parameters

    def episode(
        self,
        task: Task,
        net: Networks,
        protocol: Protocol,
        meta_step: MetaStep,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """See :meth:`Estimator.episode`; the losses returned are means over the members, and end at T.

        Raises:
            TypeError: not a task of the zoo. ValueError: of several problems, several networks, or another kind of
                network than the above.
        """
        generator = torch.Generator() if generator is None else generator
        task, network = _checked(task, net)
        low = math.log(min(self.shortest, protocol.horizon))
        drawn = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
        total = round(math.exp(low + drawn * (math.log(protocol.horizon) - low)))
        trained = self._trained(network)
        count = sum(parameter.numel() for parameter in trained)
        eps = self.sigma * torch.randn(self.pairs, count, generator=generator, dtype=torch.float64, device="cpu")
        eps = torch.cat([eps, -eps])
        crowd = Crowd(task, 2 * self.pairs, network.config, total)
        copies = [copy.deepcopy(network) for _ in eps]
        curve: list[Tensor] = []
        losses = _evaluate(crowd)
        while crowd.age < total:
            weights = self._perturbed(network, copies, eps)
            segment = []
            for _ in range(min(protocol.unroll, total - crowd.age)):
                curve.append(losses)
                grad = crowd.theta.grad
                assert grad is not None
                crowd.step(grad, *weights)
                losses = _evaluate(crowd)
                segment.append(losses)
            progress = crowd.age / total
            found = _mean_log(torch.stack(segment), curve[0])
            difference = (found[: self.pairs] - found[self.pairs :]).clamp(-_LARGEST, _LARGEST)
            weighted = (0.5 + 1.5 * progress**2) * difference
            estimate = (weighted.unsqueeze(1) * eps[: self.pairs]).mean(0) / (2 * self.sigma**2)
            accumulate(trained, estimate)
            meta_step()
        curve.append(losses)
        return finite_prefix([each.double().sum() for each in curve], crowd.members)

    def config(self) -> dict[str, Any]:
        """See :meth:`Estimator.config`; ``parameters`` of None are all that act beside phi."""
        names = None if self.parameters is None else list(self.parameters)
        own = {"pairs": self.pairs, "sigma": self.sigma, "shortest": self.shortest, "parameters": names}
        return {**super().config(), "estimator": "evolution", **own}

    def follows(self, member: CoordinatewiseLSTM) -> bool:
        """Only weights that stay: a perturbation must be the only difference within a pair."""
        return not effective.changes_by_itself(member)

    def _trained(self, network: CoordinatewiseLSTM) -> list[torch.nn.Parameter]:
        own = dict(network.named_parameters())
        default = ("weight_nominal", "weight_orthogonal") if network.orthogonal else ("weight_nominal",)
        names = default if self.parameters is None else self.parameters
        unknown = [name for name in names if name not in own]
        if unknown:
            raise ValueError(f"parameters: the network has {sorted(own)}, not {unknown}")
        return [own[name] for name in names if own[name].requires_grad]

    @torch.no_grad()
    def _perturbed(
        self, network: CoordinatewiseLSTM, copies: list[CoordinatewiseLSTM], eps: Tensor
    ) -> list[Tensor]:
        """phi and what is beside it, of the members."""
        centre = parameters_to_vector(self._trained(network))
        for twin, row in zip(copies, eps.to(centre), strict=True):
            vector_to_parameters(centre + row, self._trained(twin))
        named = ([twin.phi(), *twin.beside_phi()] for twin in copies)
        return [torch.stack([each.float() for each in weights]) for weights in zip(*named, strict=True)]


def _checked(task: Task, net: Networks) -> tuple[ZooTask, CoordinatewiseLSTM]:
    if not isinstance(task, ZooTask):
        raise TypeError(f"task: evolution compares optimizees of the zoo, got {type(task).__name__}")
    networks = list(members(net).values())
    if len(networks) != 1:
        raise ValueError(f"net: evolution trains one network, got {len(networks)}")
    network, expected = networks[0], len(DEFAULT_INPUTS)
    if network.tensor_inputs != expected:
        raise ValueError(
            "net: evolution trains normalized networks with the default inputs, expected tensor_inputs="
            f"{expected}, got {network.tensor_inputs}"
        )
    return task, network


def _evaluate(crowd: Crowd) -> Tensor:
    """The members' losses, detached, with their gradients in ``theta.grad``."""
    crowd.theta.grad = None
    losses = crowd.losses()
    losses.sum().backward()
    return losses.detach()


def _mean_log(losses: Tensor, first: Tensor) -> Tensor:
    """The mean of ln f over a segment ``[steps, members]``; of one that diverges +large."""
    floor = _FLOOR * first.double().abs().mean()
    found = torch.maximum(losses.double(), floor).log().mean(0)
    return torch.where(losses.isfinite().all(0), found, 1e3)
