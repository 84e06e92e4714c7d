"""Networks trained as the shipped ones were, from other seeds."""

from __future__ import annotations

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluation.experiments.report import weights_digest
from l2l_fast.meta import record_of
from l2l_fast.networks import pretrained, shipped
from tests.helpers import random_network


def test_they_are_found_by_name_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_ALIKE", tmp_path)
    assert pretrained.trained_alike("quadratic") == {}
    for name in ("quadratic.seed-3", "quadratic.seed-12", "quadratic-gaussian.seed-1", "quadratic.other-1", "mnist"):
        random_network(seed=len(name), hidden_size=4).save(tmp_path / f"{name}.safetensors")
    found = pretrained.trained_alike("quadratic")
    assert sorted(found) == ["seed 12", "seed 3"] and list(pretrained.trained_alike("quadratic-gaussian")) == ["seed 1"]
    assert torch.equal(found["seed 3"].phi(), l2l.load(tmp_path / "quadratic.seed-3.safetensors").phi())
    for name in ("quadratc", "", "quadratic.seed-3"):
        with pytest.raises(ValueError, match="name: expected one of"):
            pretrained.trained_alike(name)


@pytest.mark.parametrize("name", pretrained.names())
def test_those_in_the_package_are_other_networks_of_the_same_kind(name):
    net = pretrained.load_pretrained(name)
    digests = [weights_digest(net)]
    for seed, other in pretrained.trained_alike(name).items():
        record = record_of(other)
        assert seed.startswith("seed ") and record is not None
        assert type(other) is type(net)
        if isinstance(net, l2l.CoordinatewiseLSTM):
            assert other.options() == net.options()
        digests.append(weights_digest(other))
    assert len(set(digests)) == len(digests)
