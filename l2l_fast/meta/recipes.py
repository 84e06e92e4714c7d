"""Settings that train well, found on validation tasks: what ``train`` starts from and what ``demo`` uses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..kernels import checks
from ..kernels.tensor_inputs import DEFAULT_INPUTS
from ..networks.lstm import CoordinatewiseLSTM
from ..networks.ntm_bfgs import NTMBFGS
from ..networks.several import Networks, members
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
        """The untrained network, a function of ``seed``, of 64 bits; the global random state is left alone. With
        ``memory`` among the changes it is a :class:`l2l_fast.NTMBFGS`.

        Raises:
            TypeError, ValueError: a change of the wrong type or out of range, or not of such a network.
        """
        seed = checks.integer("seed", seed, *SEEDS)
        options = {**self.network, **changes}
        kind = NTMBFGS if "memory" in options else CoordinatewiseLSTM
        known = inspect.signature(kind).parameters
        for name in options:
            if name not in known:
                needs = "no" if kind is NTMBFGS else "a"
                raise ValueError(f"{name}: is of a network with {needs} memory, got {options[name]!r}")
        net = nn.utils.skip_init(kind, **options)
        net.reset_parameters(torch.Generator().manual_seed(seed))
        return net

    def make_trainer(self, net: Networks, problem: Problem, episodes: int | None = None, **changes: Any) -> MetaTrainer:
        """The trainer; the meta-learning rate decays over ``episodes``, the recipe's own by default. The recipe's
        coordinate_fraction holds where coordinates can be sampled at all."""
        episodes = self.episodes if episodes is None else episodes
        options = {"decay_episodes": episodes, **self.trainer, **changes}
        if "coordinate_fraction" not in changes and not _can_sample(net, options):
            options.pop("coordinate_fraction", None)
        return MetaTrainer(net, problem, **options)


def _can_sample(net: Networks, options: Mapping[str, Any]) -> bool:
    """Whether it is back-propagation, fused, through coordinates that know nothing of each other."""
    unrolled = any(options.get(name) for name in ("autograd", "second_derivatives", "meta_loss", "synthetic_gradients"))
    together = any(member.communicates or member.has_memory for member in members(net).values())
    return options.get("estimator", "bptt") == "bptt" and not unrolled and not together


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
