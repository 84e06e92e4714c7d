"""What the tests of LearnedOptimizer as one of torch's optimizers share."""

from __future__ import annotations

import io

import torch
from torch import nn

import l2l_fast as l2l
from tests.helpers import random_network


def through_a_file(value):
    """What ``torch.load`` makes of it with its defaults, which let nothing but plain data in."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clones(params) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def network() -> l2l.CoordinatewiseLSTM:
    return random_network(seed=1)


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
