"""The live state of LearnedOptimizer in the hands of others: tools that move, copy, wrap, profile and checkpoint it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from tests.contract_helpers import clones, equal, network, through_a_file
from tests.gac_helpers import gac_network
from tests.helpers import random_network
from tests.optimizer_helpers import parameters, run

# ---- live state ----


def test_the_live_state_is_tensors_and_what_is_done_to_them_counts():
    net, params = network(), parameters((70,), (4, 5))
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 2)
    for param in params:
        tensors = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
        assert sum(value.numel() for value in tensors) >= 80 * param.numel()
    # Replaced by copies, as code does that moves an optimizer to another device: nothing changes.
    twin_params, twin = copy.deepcopy((params, optimizer))
    for entry in twin.state.values():
        for key, value in entry.items():
            entry[key] = value.clone() if isinstance(value, torch.Tensor) else value
    # Zeroed in place, which is how torch's own tests reset momentum: a new start.
    reset_params, reset = copy.deepcopy((params, optimizer))
    fresh_params = clones(params)
    for entry in reset.state.values():
        for value in entry.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    fresh = l2l.LearnedOptimizer(fresh_params, net)
    for each, its in ((optimizer, params), (twin, twin_params), (reset, reset_params), (fresh, fresh_params)):
        run(each, its, 2, seed=7)
    for a, b, c, d in zip(params, twin_params, reset_params, fresh_params, strict=True):
        assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)


@pytest.mark.parametrize("shape", [(70,), (3, 64), (), (2, 64, 80)])
def test_the_saved_form_is_understood_in_the_live_state(shape):
    """ZeRO puts what was saved into the state as it is. (3, 64) with 16 x 2 units looks the same in both forms."""
    net = random_network(hidden_size=16)
    params = parameters(shape)
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 2)
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    other.state[others[0]] = optimizer.state_dict()["state"][0]
    assert equal(other.state_dict(), optimizer.state_dict())
    run(optimizer, params, 2, seed=4)
    run(other, others, 2, seed=4)
    assert torch.equal(params[0], others[0])


def test_groups_are_plain_data_and_a_network_may_be_assigned():
    a, b = random_network(seed=1), random_network(seed=2)
    params = parameters((6,), (6,))
    optimizer = l2l.LearnedOptimizer([{"params": params[:1]}, {"params": params[1:], "network": b}], a)
    assert optimizer.networks == [a, b]
    through_a_file([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    optimizer.param_groups[1]["network"] = a
    run(optimizer, params, 1)
    assert optimizer.networks == [a, a]
    optimizer.param_groups[1]["network"] = {"id": 0, "hidden_size": 8}
    with pytest.raises(ValueError, match="hidden_size=8"):
        run(optimizer, params, 1)
    optimizer.param_groups[1]["network"] = {"id": 7}
    with pytest.raises(ValueError, match="network: expected one of"):
        run(optimizer, params, 1)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("kind", ["plain", "memory"])
def test_distributed_checkpoints_take_and_give_it(kind, flat):
    """They look in the checkpoint for the names that they see in the live state."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    net = network() if kind == "plain" else l2l.NTMBFGS(memory="low_rank")
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = l2l.LearnedOptimizer(model.parameters(), net, lr=0.5)
    run(optimizer, list(model.parameters()), 3)
    twin = copy.deepcopy(model)
    other = l2l.LearnedOptimizer(twin.parameters(), net)
    saved = through_a_file(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    dcp.set_optimizer_state_dict(twin, other, saved, options=options)
    assert equal(optimizer.state_dict(), other.state_dict())
    run(optimizer, list(model.parameters()), 2, seed=5)
    run(other, list(twin.parameters()), 2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_optimizer_without_groups_has_nothing_to_do():
    optimizer = l2l.LearnedOptimizer(parameters((2,)), network())
    optimizer.param_groups.clear()
    optimizer.step()


class Wrapper(torch.optim.Optimizer):
    """As implementations of SAM and Lookahead wrap an optimizer: its groups and state are the wrapper's own, saved and
    loaded by the methods of torch.optim.Optimizer."""

    def __init__(self, params, make, **options):
        super().__init__(params, dict(options))
        self.base = make(self.param_groups, **options)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def step(self, closure=None):
        return self.base.step(closure)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base.param_groups, self.base.state = self.param_groups, self.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrappers_save_and_load_it_as_any_optimizer(dtype):
    net = network()
    params = parameters((70,), (4, 5), dtype=dtype)
    wrapper = Wrapper(params, l2l.LearnedOptimizer, network=net)
    run(wrapper, params, 2)
    others = clones(params)
    other = Wrapper(others, l2l.LearnedOptimizer, network=net)
    other.load_state_dict(through_a_file(wrapper.state_dict()))
    run(wrapper, params, 2, seed=4)
    run(other, others, 2, seed=4)
    for a, b in zip(params, others, strict=True):
        # torch rounds all state to the parameter's dtype when it loads.
        torch.testing.assert_close(a, b, rtol=0, atol=0 if dtype == torch.float32 else 0.05)


def test_the_memory_profiler_sees_the_state():
    from torch.profiler import ProfilerActivity, profile
    from torch.profiler._memory_profiler import Category

    model = nn.Linear(64, 50)
    optimizer = l2l.LearnedOptimizer(model.parameters(), network())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_stack=True) as prof:
        for _ in range(2):
            model(torch.ones(3, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    memory = prof._memory_profile()
    sizes = {}
    for _, action, (key, version), size in memory.timeline:
        if action.name in ("CREATE", "PREEXISTING"):
            sizes[memory._categories.get(key, version)] = sizes.get(memory._categories.get(key, version), 0) + size
    assert sizes[Category.OPTIMIZER_STATE] >= 4 * 80 * 64 * 50


# ---- copies ----


def test_a_copy_keeps_the_process_group():
    calls = []
    params = parameters((8,))
    optimizer = l2l.LearnedOptimizer(params, gac_network(), process_group=lambda tensor: calls.append(1))
    run(optimizer, params, 1)
    each = len(calls)
    others, other = copy.deepcopy((params, optimizer))
    run(other, others, 1)
    assert len(calls) == 2 * each and other.process_group is optimizer.process_group


def test_an_unpickled_optimizer_says_that_its_process_group_is_lost():
    params = parameters((8,))
    optimizer = l2l.LearnedOptimizer(params, gac_network(), process_group=lambda tensor: None)
    run(optimizer, params, 1)
    data = pickle.dumps((params, optimizer))
    with pytest.warns(UserWarning, match="process_group"):
        others, other = pickle.loads(data)
    kept = others[0].detach().clone()
    with pytest.raises(RuntimeError, match="process_group: lost"):
        run(other, others, 1)
    assert torch.equal(others[0], kept)
    other.process_group = lambda tensor: None  # as the message says
    run(other, others, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = l2l.LearnedOptimizer(params, gac_network(), process_group=torch.neg_)  # a function with a name
        assert pickle.loads(pickle.dumps(plain)).process_group is torch.neg_


def test_a_reduction_that_fails_stops_further_steps():
    fail = True

    def reduce(tensor):
        if fail:
            raise ConnectionError("peer is gone")

    params = parameters((8,))
    optimizer = l2l.LearnedOptimizer(params, gac_network(), process_group=reduce)
    saved, kept = optimizer.state_dict(), params[0].detach().clone()
    with pytest.raises(ConnectionError):
        run(optimizer, params, 1)
    fail = False
    for each in (optimizer, copy.deepcopy(optimizer)):
        with pytest.raises(RuntimeError, match="half-way .*peer is gone.*load_state_dict"):
            each.step()
    assert torch.equal(params[0], kept)
    optimizer.load_state_dict(saved)
    run(optimizer, params, 1)
