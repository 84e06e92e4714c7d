"""LearnedOptimizer: state_dict, copies and pickles continue bit for bit, and what does not fit is refused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from tests.helpers import random_network
from tests.optimizer_helpers import STATE, parameters, run


def trained(seed: int = 1, **options):
    net = random_network(seed=seed)
    params = [*parameters((70,), (4, 5)), *parameters((6,), dtype=torch.bfloat16), *parameters((), dtype=torch.float64)]
    optimizer = l2l.LearnedOptimizer(params, net, **options)
    run(optimizer, params, 3)
    return net, params, optimizer


def clones(params) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def assert_same_run(optimizer, params, other, other_params) -> None:
    run(optimizer, params, 3, seed=50)
    run(other, other_params, 3, seed=50)
    for param, other_param in zip(params, other_params, strict=True):
        assert torch.equal(param, other_param)
        assert torch.equal(
            torch.cat([part.flatten() for pair in optimizer.state_of(param).to_logical() for part in pair]),
            torch.cat([part.flatten() for pair in other.state_of(other_param).to_logical() for part in pair]),
        )


def test_state_dict_continues_bit_for_bit():
    net, params, optimizer = trained(lr=0.3, weight_decay=0.01)
    optimizer.param_groups[0]["lr"] = 0.25
    state_dict = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    other.load_state_dict(loaded)
    assert other.param_groups[0]["lr"] == 0.25 and other.param_groups[0]["weight_decay"] == 0.01
    assert other.networks == [net]
    assert_same_run(optimizer, params, other, others)


def test_state_dict_is_logical_and_a_snapshot():
    net, params, optimizer = trained()
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert state_dict["param_groups"][0]["params"] == [0, 1, 2, 3]
    description = state_dict["param_groups"][0]["network"]
    assert description.items() >= net.options().items() and description["type"] == "CoordinatewiseLSTM"
    for k, param in enumerate(params):
        saved = state_dict["state"][k][STATE]
        assert saved.shape == (*param.shape, 2 * 2 * 20)
        saved = saved.reshape(-1, 2, 2, 20)
        for layer, pair in enumerate(optimizer.state_of(param).to_logical()):
            assert torch.equal(saved[:, layer, 0], pair[0]) and torch.equal(saved[:, layer, 1], pair[1])
    kept = copy.deepcopy(state_dict)
    run(optimizer, params, 1)
    assert all(torch.equal(state_dict["state"][k][STATE], kept["state"][k][STATE]) for k in range(4))


@pytest.mark.parametrize("numel", [63, 64, 65, 128])  # a tile has 64 coordinates, and one full tile needs no copying
def test_state_dict_is_a_snapshot_of_whole_tiles_too(numel):
    params = parameters((numel,))
    optimizer = l2l.LearnedOptimizer(params, random_network())
    run(optimizer, params, 1)
    saved = optimizer.state_dict()["state"][0][STATE]
    kept = saved.clone()
    run(optimizer, params, 1)
    assert torch.equal(saved, kept)
    assert saved.is_contiguous()
    assert saved.untyped_storage().nbytes() == saved.nbytes


def test_loading_does_not_touch_the_loaded_dict():
    net, params, optimizer = trained()
    optimizer.state[params[0]]["note"] = torch.ones(2)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    other.load_state_dict(state_dict)
    other.state[others[0]]["note"].add_(1)
    run(other, others, 1)
    other.param_groups[0]["lr"] = 9.0
    assert state_dict["param_groups"] == kept["param_groups"]
    assert torch.equal(state_dict["state"][0]["note"], torch.ones(2))
    for k in range(4):
        assert torch.equal(state_dict["state"][k][STATE], kept["state"][k][STATE])


def test_state_dict_of_a_fresh_optimizer_resets_another():
    net, params, optimizer = trained()
    fresh = l2l.LearnedOptimizer(clones(params), net)
    optimizer.load_state_dict(fresh.state_dict())
    assert len(optimizer.state) == 0
    others = clones(params)
    assert_same_run(optimizer, params, l2l.LearnedOptimizer(others, net), others)


def test_state_dict_hooks():
    net, params, optimizer = trained()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, d: {**d, "more": d["state"][0][STATE].shape})
    state_dict = optimizer.state_dict()
    assert seen == ["save"] and state_dict["more"] == (70, 80)
    other = l2l.LearnedOptimizer(clones(params), net)

    def scale(opt, loaded):
        return {**loaded, "param_groups": [{**loaded["param_groups"][0], "lr": 0.125}]}

    other.register_load_state_dict_pre_hook(scale)
    other.register_load_state_dict_post_hook(lambda opt: seen.append(opt.param_groups[0]["lr"]))
    other.load_state_dict(state_dict)
    assert seen == ["save", 0.125]


def test_load_rejects_what_does_not_fit_and_keeps_everything():
    net, params, optimizer = trained()
    good = optimizer.state_dict()
    cases = []
    fewer = copy.deepcopy(good)
    fewer["param_groups"][0]["params"].pop()
    cases.append((fewer, "groups of"))
    groups = copy.deepcopy(good)
    groups["param_groups"].append({**groups["param_groups"][0], "params": []})
    cases.append((groups, "groups of"))
    shape = copy.deepcopy(good)
    shape["state"][3][STATE] = torch.zeros(2, 2, 2, 20)
    cases.append((shape, r"expected 'lstm_state' of shape \(80,\)"))
    kind = copy.deepcopy(good)
    kind["state"][3][STATE] = "state"
    cases.append((kind, "got str"))
    network = copy.deepcopy(good)
    network["param_groups"][0]["network"]["hidden_size"] = 8
    cases.append((network, "hidden_size=8"))
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    run(other, others, 1)
    kept = other.state_dict()
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(bad)
        now = other.state_dict()
        assert now["param_groups"] == kept["param_groups"]
        assert all(torch.equal(now["state"][k][STATE], kept["state"][k][STATE]) for k in range(4))


def test_load_warns_of_another_network():
    net, params, optimizer = trained()
    state_dict = optimizer.state_dict()
    other = l2l.LearnedOptimizer(clones(params), random_network(output_scale=0.5))
    with pytest.warns(UserWarning, match="output_scale=0.1, now output_scale=0.5"):
        other.load_state_dict(state_dict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state_dict)


def test_deepcopy_and_pickle():
    net, params, optimizer = trained()
    optimizer.start_segment()
    for copier in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        others, other = copier((params, optimizer))
        assert other.param_groups[0]["params"][0] is others[0] and other.networks[0] is not net
        with pytest.raises(RuntimeError, match="no open segment"):
            other.backward_segment()
        run(other, others, 1, seed=20)
        assert not torch.equal(others[0], params[0])
    optimizer.discard_segment()
    others, other = copy.deepcopy((params, optimizer))
    assert_same_run(optimizer, params, other, others)
