"""Placement itself; needs no GPU."""

from __future__ import annotations

import torch

import l2l_fast as l2l
from tests.cuda.placement import Placement
from tests.helpers import double, random_network


def test_what_a_test_makes_is_placed() -> None:
    with Placement("meta"):
        made = [torch.zeros(3), torch.tensor([1.0]), torch.full((2,), 3.0), torch.nn.Linear(2, 2).bias]
        made += [torch.rand(3, generator=torch.Generator()), l2l.CoordinatewiseLSTM().weight_out]
        made += [random_network().phi(), double(random_network()).phi(), random_network().init_state(5).data]
        assert {tensor.device.type for tensor in made} == {"meta"}
        assert torch.zeros(3, device="cpu").device.type == "cpu"
    assert torch.zeros(3).device.type == "cpu"


def test_what_the_package_makes_is_not() -> None:
    """State.zeros takes a device; without one it means the default."""
    with Placement("meta"):
        assert l2l.State.zeros(5, 8, 2).data.device.type == "cpu"
