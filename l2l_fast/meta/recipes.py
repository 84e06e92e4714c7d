"""Settings that train well, found on validation tasks: what ``train`` starts from and what ``demo`` uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..kernels import checks
from ..networks.lstm import CoordinatewiseLSTM
from ..optim.tensor_features import DEFAULT_INPUTS
from ..problems import Problem
from . import MetaTrainer
from .estimators import Evolution

SEEDS = (-(1 << 63), (1 << 64) - 1)  # that a torch.Generator takes


@dataclass(frozen=True)
class Recipe:
    """How to train on one kind of problem: arguments of the network and of :class:`MetaTrainer`, and how long."""

    network: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    episodes: int = 500

    def make_network(self, seed: int = 0, **changes: Any) -> CoordinatewiseLSTM:
        """The untrained network, a function of ``seed``, of 64 bits; the global random state is left alone."""
        seed = checks.integer("seed", seed, *SEEDS)
        net = nn.utils.skip_init(CoordinatewiseLSTM, **{**self.network, **changes})
        net.reset_parameters(torch.Generator().manual_seed(seed))
        return net

    def make_trainer(
        self, net: CoordinatewiseLSTM, problem: Problem, episodes: int | None = None, **changes: Any
    ) -> MetaTrainer:
        """The trainer; the meta-learning rate decays over ``episodes``, the recipe's own by default."""
        episodes = self.episodes if episodes is None else episodes
        return MetaTrainer(net, problem, **{"decay_episodes": episodes, **self.trainer, **changes})


RECIPES = {
    # The text of the paper uses no scaling here either; gradients are of order 1 and need no preprocessing.
    "quadratic": Recipe(
        network={"preprocess": "identity", "output_scale": 1.0},
        trainer={"lr": 1e-2, "betas": (0.9, 0.99), "clip_norm": 1.0, "validate_every": 50},
        episodes=300,
    ),
    "mnist": Recipe(
        network={"preprocess": "log_sign", "p": 10.0, "output_scale": 0.1},
        # Until about episode 200 this looks stuck at the level of the hand-written optimizers; then it falls below.
        trainer={
            "lr": 2e-2,
            "betas": (0.9, 0.99),
            "clip_norm": 0.3,
            "coordinate_fraction": 0.25,
            "validate_every": 50,
        },
        episodes=450,
    ),
    # A general-purpose optimizer, from Adam; half of the episodes have fewer than 630 steps.
    "zoo": Recipe(
        network={
            "hidden_size": 4,
            "num_layers": 1,
            "preprocess": "normalized",
            "output_scale": 0.01,
            "tensor_inputs": len(DEFAULT_INPUTS),
        },
        trainer={
            "horizon": 2000,
            "unroll": 50,
            "lr": 4e-3,
            "betas": (0.9, 0.98),
            "decay_to": 0.1,
            "validate_every": 0,
            "estimator": Evolution(),
        },
        episodes=450,
    ),
}


def get(problem: Problem) -> Recipe:
    """The recipe for a problem; for one that has none, the paper's settings for neural networks."""
    return RECIPES.get(problem.name, RECIPES["mnist"])
