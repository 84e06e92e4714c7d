"""Truncated back-propagation through time by the fused kernel: an ordinary loop with LearnedOptimizer."""

from __future__ import annotations

from itertools import islice

import torch

from ...networks import effective
from ...networks.lstm import CoordinatewiseLSTM
from ...networks.several import Networks
from ...optim.optimizer import LearnedOptimizer
from ...optim.segment_sampling import Sampling
from ...problems import Task
from ...problems.theta import Theta
from ..assignment import optimizer_groups
from ..protocol import Protocol
from ..rollout import finite_prefix, rollout
from .base import Estimator, MetaStep


class FusedBPTT(Estimator):
    """One fused launch per segment, by :meth:`l2l_fast.LearnedOptimizer.backward_segment`.

    Args:
        coordinate_fraction: below 1, back-propagate through a random part of the coordinates, see
            :mod:`l2l_fast.optim.segment_sampling`.
    """

    def __init__(self, coordinate_fraction: float = 1.0) -> None:
        self.coordinate_fraction = coordinate_fraction

    def episode(
        self,
        task: Task,
        net: Networks,
        protocol: Protocol,
        meta_step: MetaStep,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """See :meth:`Estimator.episode`."""
        theta = Theta(task)
        optimizer = LearnedOptimizer(optimizer_groups(task, net, protocol.horizon))
        sampling = None
        if self.coordinate_fraction < 1.0:
            sampling = Sampling(self.coordinate_fraction, torch.Generator() if generator is None else generator)
        # f is evaluated at theta_horizon, too; the step from there is never taken.
        way = rollout(theta, optimizer, protocol.horizon + 1)
        losses = [next(way)]
        for start, end in protocol.segments():
            optimizer.start_segment(sampling)
            losses.extend(islice(way, end - start))
            weights = [w / task.num_problems for w in protocol.weights[start:end]]
            if any(weights):
                optimizer.backward_segment(weights)
                meta_step()
            else:
                optimizer.discard_segment()
        return finite_prefix(losses, task.num_problems)

    def follows(self, member: CoordinatewiseLSTM) -> bool:
        """Only weights that stay: those of all steps of a segment are one vector."""
        return not effective.changes_by_itself(member)
