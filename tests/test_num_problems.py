"""``num_problems`` under its name before 0.2, ``groups``: in arguments, parameter groups and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import reference
from tests.gac_helpers import gac_network
from tests.helpers import random_network

WARNING = "groups: is called num_problems now"


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (8,))]


def steps(optimizer: l2l.LearnedOptimizer, count: int = 2, seed: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach().clone() for param in params]


def same(a, b) -> bool:
    leaves = [torch.utils._pytree.tree_leaves(x) for x in (a, b)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*leaves, strict=True))


def calls():
    net, memory_net = gac_network(), l2l.NTMBFGS()
    grad = torch.linspace(-1.0, 1.0, 12)
    state = net.init_state(12)
    logical = state.to_logical()
    memory, place = memory_net.init_memory(12, 4), {"device": "cpu", "dtype": torch.float32}
    phi = net.phi().detach()
    segment = ([logical], [[grad], [grad]], [1.0], [1.0], [1.0], phi, net.config)
    return {
        "forward": lambda **n: net(grad, state, **n),
        "init_memory": lambda **n: memory_net.init_memory(12, **n),
        "memory_from": lambda **n: memory_net.memory_from(memory.entries(), 12, **n),
        "create": lambda **n: type(memory).create(3, read_heads=1, initial="zero", **place, **n),
        "lstm_step": lambda **n: reference.lstm_step(grad, logical, phi, net.config, **n),
        "step": lambda **n: reference.step(net, grad, logical, **n),
        "global_average": lambda **n: reference.global_average(logical[0][0] + grad[:, None], 2, **n),
        "join": lambda **n: reference.join([grad, 2 * grad], **n),
        "separate": lambda **n: reference.separate(grad, [4, 8], **n),
        "join_states": lambda **n: reference.join_states([logical, logical], **n),
        "separate_states": lambda **n: reference.separate_states(logical, [4, 8], **n),
        "segment_backward": lambda **n: reference.segment_backward(*segment, **n),
    }


@pytest.mark.parametrize("name", calls())
def test_functions_take_the_former_name(name):
    call = calls()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call(num_problems=4)
    with pytest.warns(DeprecationWarning, match=WARNING) as caught:
        actual = call(groups=4)
    assert same(actual, expected) and [each.filename for each in caught] == [__file__]
    with pytest.raises(TypeError, match="groups"):
        call(groups=4, num_problems=4)


def test_a_position_and_the_former_name_are_refused_together():
    net, grad = gac_network(), torch.ones(12)
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match="num_problems"):
        net(grad, net.init_state(12), 4, groups=4)


def test_a_memory_tells_its_problems_under_the_former_name():
    memory = l2l.NTMBFGS().init_memory(12, 4)
    with pytest.warns(DeprecationWarning, match=WARNING) as caught:
        assert memory.groups == 4 == memory.num_problems
    assert caught[0].filename == __file__


@pytest.mark.parametrize("make", [gac_network, l2l.NTMBFGS])
@pytest.mark.parametrize("how", ["constructor", "group", "added", "assigned"])
def test_optimizers_take_the_former_name(make, how):
    net = make()
    expected = steps(l2l.LearnedOptimizer(parameters(), net, num_problems=4))
    assert not same(expected, steps(l2l.LearnedOptimizer(parameters(), net)))
    given = {"params": parameters(), "groups": 4}
    with pytest.warns(DeprecationWarning, match=WARNING) as caught:
        if how == "constructor":
            optimizer = l2l.LearnedOptimizer(parameters(), net, groups=4)
        elif how == "group":
            optimizer = l2l.LearnedOptimizer([given], net)
        elif how == "added":
            optimizer = l2l.LearnedOptimizer([{"params": []}], net)
            optimizer.add_param_group(given)
        else:
            optimizer = l2l.LearnedOptimizer(parameters(), net)
            optimizer.param_groups[0]["groups"] = 4
            optimizer.networks  # noqa: B018  (the next look)
    assert [each.filename for each in caught] == [__file__]
    assert "groups" not in optimizer.param_groups[-1] and optimizer.param_groups[-1]["num_problems"] == 4
    assert given["groups"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(steps(optimizer), expected)


def test_both_names_are_refused():
    net = gac_network()
    with pytest.raises(TypeError, match="groups: .* num_problems alone"):
        l2l.LearnedOptimizer(parameters(), net, groups=4, num_problems=4)
    optimizer = l2l.LearnedOptimizer([{"params": []}], net)
    with pytest.raises(TypeError, match="groups: .* num_problems alone"):
        optimizer.add_param_group({"params": parameters(), "groups": 4, "num_problems": 4})
    assert len(optimizer.param_groups) == 1


def former(state_dict: dict) -> dict:
    """The state dict as it was written before 0.2."""
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group["groups"] = group.pop("num_problems")
    return state_dict


@pytest.mark.parametrize("make", [gac_network, l2l.NTMBFGS, random_network])
def test_state_dicts_with_the_former_name_load(make):
    net = make()
    optimizer = l2l.LearnedOptimizer(parameters(), net, num_problems=4)
    steps(optimizer)
    file = io.BytesIO()
    torch.save(former(optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [nn.Parameter(param.detach().clone()) for param in optimizer.param_groups[0]["params"]]
    other = l2l.LearnedOptimizer(params, net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)
        assert saved["param_groups"][0]["groups"] == 4
        assert other.param_groups[0]["num_problems"] == 4 and "groups" not in other.param_groups[0]
        assert same(steps(other, seed=9), steps(optimizer, seed=9))


def test_what_an_earlier_release_made_of_a_present_state_dict_loads():
    """It knew nothing of num_problems, took one problem and kept the rest of the group as it was."""
    net = gac_network()
    optimizer = l2l.LearnedOptimizer(parameters(), net, num_problems=4)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["groups"] = 1
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["num_problems"] == 1 and "groups" not in optimizer.param_groups[0]


def test_pickles_of_whole_optimizers_from_before():
    optimizer = l2l.LearnedOptimizer(parameters(), gac_network(), num_problems=4)
    twin = copy.deepcopy(optimizer)
    for options in (optimizer.defaults, *optimizer.param_groups):
        options["groups"] = options.pop("num_problems")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pickle.loads(pickle.dumps(optimizer))
        assert loaded.param_groups[0]["num_problems"] == 4 == loaded.defaults["num_problems"]
        assert same(steps(loaded), steps(twin))
        loaded.add_param_group({"params": [nn.Parameter(torch.zeros(8))]})
    assert loaded.param_groups[1]["num_problems"] == 4
