"""Groups that come from elsewhere: a list that is used twice, those of another optimizer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import l2l_fast as l2l


def param(*shape: int) -> nn.Parameter:
    made = nn.Parameter(torch.ones(shape))
    made.grad = torch.ones(shape)
    return made


def test_a_list_of_groups_serves_several_optimizers():
    groups = [{"params": [param(3)]}, {"params": [param(4)], "weight_decay": 1e-5}]
    before = [dict(group) for group in groups]
    for net in (l2l.load_pretrained("general"), l2l.load_pretrained("mnist-mlp")):
        optimizer = l2l.LearnedOptimizer(groups, net)
        assert all(each is net for each in optimizer.networks)
        optimizer.step()
    assert groups == before


def test_a_group_that_was_given_no_network_takes_the_one_of_each_optimizer():
    first, second = l2l.CoordinatewiseLSTM(), l2l.CoordinatewiseLSTM()  # alike but for their weights
    head = {"params": [param(6)]}
    l2l.LearnedOptimizer([{"params": [param(5)], "network": first}, head], first)
    optimizer = l2l.LearnedOptimizer([{"params": [param(5)], "network": second}, head], second)
    assert [each is second for each in optimizer.networks] == [True, True]


def test_a_constructor_that_failed_can_be_called_again():
    net, groups = l2l.CoordinatewiseLSTM(), [{"params": [param(3)]}, {"params": [param(4)], "lr": -1.0}]
    with pytest.raises(ValueError, match="lr"):
        l2l.LearnedOptimizer(groups, net)
    groups[1]["lr"] = 1.0
    assert all(each is net for each in l2l.LearnedOptimizer(groups, net).networks)


def test_an_optimizer_made_like_another_takes_its_groups():
    net = l2l.CoordinatewiseLSTM()
    one = l2l.LearnedOptimizer([{"params": [param(3)], "lr": 0.5}, {"params": [param(4)]}], net)
    one.load_state_dict(one.state_dict())
    other = type(one)(one.param_groups, **one.defaults)
    assert all(each is net for each in other.networks) and other.param_groups[0]["lr"] == 0.5
    other.step()


def test_a_description_without_its_network_is_refused():
    one = l2l.LearnedOptimizer([param(3)], l2l.CoordinatewiseLSTM())
    description, own = one.param_groups[0]["network"], l2l.CoordinatewiseLSTM()
    other = l2l.LearnedOptimizer([param(4)], own)
    for foreign in (description, copy.deepcopy(description)):
        for each in (other, copy.deepcopy(other)):
            with pytest.raises(ValueError, match="network: expected a network in a new group"):
                each.add_param_group({"params": [param(5)], "network": foreign})
    with pytest.raises(ValueError, match="network: expected a network in a new group"):
        l2l.LearnedOptimizer(one.param_groups, l2l.CoordinatewiseLSTM(hidden_size=8))
    with pytest.raises(ValueError, match="network: expected a network in a new group"):
        l2l.LearnedOptimizer(one.param_groups)
    other.add_param_group({"params": [param(5)], "network": other.param_groups[0]["network"]})
    assert [each is own for each in other.networks] == [True, True]


def test_options_that_numpy_made():
    net = l2l.CoordinatewiseLSTM()
    optimizer = l2l.LearnedOptimizer([param(3)], net, maximize=np.True_)
    twin = l2l.LearnedOptimizer([param(3)], net, maximize=True)
    for each in (optimizer, twin):
        each.step()
        each.param_groups[0]["maximize"] = torch.tensor(False)
        each.step()
    assert torch.equal(*(each.param_groups[0]["params"][0] for each in (optimizer, twin)))
    optimizer.param_groups[0]["maximize"] = None
    with pytest.raises(TypeError, match="maximize: expected a bool, got None"):
        optimizer.step()


def test_messages_of_what_is_out_of_range():
    net = l2l.load_pretrained("general")
    with pytest.raises(ValueError, match=r"total_steps: expected a number below 2\^62, got 9223372036854775808"):
        l2l.LearnedOptimizer([param(3)], net, total_steps=2**63)
    with pytest.raises(TypeError, match=r"network: .* got str; load_pretrained\('general'\) loads"):
        l2l.LearnedOptimizer([param(3)], "general")
    with pytest.raises(ValueError, match="device: expected a device such as 'cpu'"):
        l2l.load_pretrained("general", device="gpu")
    weights = param(3)
    optimizer = l2l.LearnedOptimizer([weights], net, total_steps=9)
    optimizer.step()
    optimizer.state[weights]["lstm_age"] = 2**63 - 1
    with pytest.raises(ValueError, match=r"expected a number of steps >= 0 as .*, which is beyond 2\^62"):
        optimizer.step()
    named = l2l.LearnedOptimizer([("first", param(3))], net, total_steps=9)
    unnamed = param(3)
    unnamed.grad = torch.ones(3).to_sparse()
    named.param_groups[0]["params"].append(unnamed)
    with pytest.raises(TypeError, match="grad"):
        named.step()


def test_the_state_of_a_parameter_that_was_cut_is_not_saved_as_that_of_the_rest():
    weights, net = param(4, 4), l2l.CoordinatewiseLSTM()
    optimizer = l2l.LearnedOptimizer([weights], net)
    optimizer.step()
    for cut in (torch.ones(4, 2), torch.ones(8, 9)):
        weights.data = cut
        with pytest.raises(ValueError, match=r"state: expected that of the \d+ coordinates .* del optimizer.state"):
            optimizer.state_dict()
    del optimizer.state[weights]
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_checkpoints_know_nothing_of_the_default_device(kind):
    weights = param(70)
    optimizer = l2l.LearnedOptimizer([weights], l2l.load_pretrained("mnist-mlp"), state_dtype=kind)
    for _ in range(3):
        optimizer.step()
    expected = optimizer.state_dict()["state"][0]["lstm_state"]
    with torch.device("meta"):
        found = optimizer.state_dict()["state"][0]["lstm_state"]
        state = optimizer.state_of(weights)
        optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(found, expected) and not state.data.is_meta
    assert torch.equal(optimizer.state_dict()["state"][0]["lstm_state"], expected)


def test_a_state_under_an_unknown_key_does_not_pass_unnoticed():
    weights = param(3)
    optimizer = l2l.LearnedOptimizer([weights], l2l.CoordinatewiseLSTM())
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"] = {str(key): entry for key, entry in saved["state"].items()}
    with pytest.warns(UserWarning, match=r"a 'lstm_state' under '0', which is none of the groups' parameters \[0\]"):
        optimizer.load_state_dict(saved)


def test_a_state_that_has_no_values_is_refused():
    weights = param(3)
    optimizer = l2l.LearnedOptimizer([weights], l2l.CoordinatewiseLSTM())
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["lstm_state"] = saved["state"][0]["lstm_state"].to("meta")
    with pytest.raises(ValueError, match="'lstm_state' with values, got a tensor of the device meta"):
        optimizer.load_state_dict(saved)


def test_a_live_state_of_any_strides_is_taken():
    weights, net = param(128), l2l.CoordinatewiseLSTM()
    optimizers = [l2l.LearnedOptimizer([weights], net), l2l.LearnedOptimizer([param(128)], net)]
    for optimizer in optimizers:
        optimizer.step()
    entry = optimizers[0].state[weights]
    entry["lstm_state"] = entry["lstm_state"].transpose(0, 1).contiguous().transpose(0, 1)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(weights, optimizers[1].param_groups[0]["params"][0])
