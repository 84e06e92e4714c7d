"""Shared by the tests of networks whose coordinates communicate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import l2l_fast as l2l
from tests.helpers import random_network, random_state

GAC_CONFIGS = [
    {"hidden_size": 20, "num_layers": 2, "gac_cells": 5},
    {"hidden_size": 20, "num_layers": 2, "preprocess": "identity", "output_scale": 1.0, "gac_cells": 2},
    {"hidden_size": 7, "num_layers": 3, "gac_cells": 7, "output_scale": 0.5},
    {"hidden_size": 4, "num_layers": 1, "preprocess": "identity", "gac_cells": 1},
    {"hidden_size": 20, "num_layers": 2, "gac_cells": 2, "extra_inputs": 1, "num_outputs": 8},
    {"hidden_size": 9, "num_layers": 2, "gac_cells": 0, "extra_inputs": 3, "num_outputs": 2},
    {"hidden_size": 33, "num_layers": 4, "preprocess": "identity", "gac_cells": 3, "num_outputs": 16},
]
GAC_IDS = [
    f"H{c['hidden_size']}xL{c['num_layers']}-k{c['gac_cells']}-E{c.get('extra_inputs', 0)}-O{c.get('num_outputs', 1)}"
    for c in GAC_CONFIGS
]
# Options of one network of every kind.
KINDS = {
    "plain": {},
    "averages": {"gac_cells": 3},
    "extra inputs and outputs": {"extra_inputs": 2, "num_outputs": 3},
    "all": {"gac_cells": 3, "extra_inputs": 2, "num_outputs": 3},
}
every_kind = pytest.mark.parametrize("options", list(KINDS.values()), ids=list(KINDS))


def shared_state(net: l2l.CoordinatewiseLSTM, numel: int, groups: int, seed: int = 1) -> l2l.State:
    """A random state as a step leaves it: the h of averaging cells are equal within a group."""
    pairs = []
    for h, c in random_state(net, numel, seed).to_logical():
        h = h.clone().view(groups, -1, net.hidden_size)
        h[:, :, : net.gac_cells] = h[:, :1, : net.gac_cells]
        pairs.append((h.flatten(0, 1), c))
    return l2l.State.from_logical(pairs)


def extra_for(net: l2l.CoordinatewiseLSTM, shape: tuple[int, ...], seed: int = 5, dtype=torch.float32) -> Tensor | None:
    if net.extra_inputs == 0:
        return None
    return torch.randn((net.extra_inputs, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def gac_network(seed: int = 0, **options) -> l2l.CoordinatewiseLSTM:
    return random_network(seed, **{"gac_cells": 3, **options})
