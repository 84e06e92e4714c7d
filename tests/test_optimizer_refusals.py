"""What LearnedOptimizer refuses before anything is written, run or recorded: shared memory, tangents, segments."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import l2l_fast as l2l
from tests.gac_helpers import gac_network
from tests.helpers import random_network
from tests.optimizer_helpers import STATE, parameters, run, set_gradients


def ntm(memory: str = "low_rank", **options) -> l2l.NTMBFGS:
    return l2l.NTMBFGS(**{"hidden_size": 4, "memory": memory, "history": 2, **options})


# ---- memories ----


def _between_groups(state, a, b):
    state[a]["memory_reads"] = state[b]["memory_reads"]


def _overlapping(state, a, b):
    both = torch.zeros(7, dtype=a.dtype)
    state[a]["memory_reads"], state[b]["memory_reads"] = both[:6].view(1, 1, 6), both[1:].view(1, 1, 6)


def _with_a_state(state, a, b):
    state[a]["memory_reads"] = state[b][STATE].view(-1)[:6].view(1, 1, 6)


def _with_a_parameter(state, a, b):
    state[a]["memory_reads"] = b.detach().view(1, 1, 6)


def _with_a_gradient(state, a, b):
    state[a]["memory_reads"] = b.grad.view(1, 1, 6)


def _inference(state, a, b):
    with torch.inference_mode():
        state[a]["memory_reads"] = torch.zeros(1, 1, 6, dtype=a.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", ["dense", "low_rank"])
@pytest.mark.parametrize(
    "change", [_between_groups, _overlapping, _with_a_state, _with_a_parameter, _with_a_gradient, _inference]
)
def test_memories_must_be_apart(change, memory, dtype):
    params = parameters((6,), (6,), dtype=dtype)
    optimizer = l2l.LearnedOptimizer([{"params": [param]} for param in params], ntm(memory))
    run(optimizer, params, 1)
    set_gradients(params, 3)
    change(optimizer.state, *params)
    before = [param.detach().clone() for param in params]
    states = [
        {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in entry.items()}
        for entry in optimizer.state.values()
    ]
    with pytest.raises((ValueError, RuntimeError), match=r"'memory_reads' of param_groups\[[01]\]"):
        optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip(params, before, strict=True))
    for entry, kept in zip(optimizer.state.values(), states, strict=True):
        assert all(torch.equal(entry[key], kept[key]) for key in kept if isinstance(kept[key], torch.Tensor))


def test_the_two_halves_of_one_memory_must_be_apart():
    params = parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, ntm())
    run(optimizer, params, 1)
    entry, kept = optimizer.state[params[0]], params[0].detach().clone()
    entry["memory_left"] = entry["memory_right"]
    with pytest.raises(
        ValueError, match="'memory_(left|right)' of param_groups.*'memory_(left|right)' of param_groups"
    ):
        optimizer.step()
    assert torch.equal(params[0], kept)
    entry["memory_left"] = entry["memory_left"].clone()
    with torch.inference_mode():  # whatever mode the check was first made in
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", ["dense", "low_rank"])
def test_a_group_without_coordinates_has_nothing_to_do(memory, dtype, groups):
    (first,), empty = parameters((6,)), parameters((0,), (0, 3), dtype=dtype)
    net = ntm(memory, read_heads=2, gac_cells=1)
    optimizer = l2l.LearnedOptimizer(
        [{"params": [first], "network": random_network()}, {"params": empty, "num_problems": groups}], net
    )
    run(optimizer, [first, *empty], 3)
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, [first, *empty], 1)
    # And one among others changes nothing.
    mixed, alone = parameters((0,), (4,), dtype=dtype), []
    alone.append(nn.Parameter(mixed[1].detach().clone()))
    one, other = l2l.LearnedOptimizer(mixed[::-1], net), l2l.LearnedOptimizer(alone, net)
    run(one, mixed[::-1], 3)
    run(other, alone, 3)
    assert torch.equal(mixed[1], alone[0])


def test_a_memory_of_no_coordinates_is_read_and_written():
    for memory in ("dense", "low_rank"):
        net = ntm(memory, add_read=True)
        update, state, new = net(torch.zeros(0, 3), net.init_state(0), net.init_memory(0))
        assert update.shape == (0, 3) and state.numel == 0 and new.size == 0


# ---- transforms and tangents ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [random_network, gac_network, ntm])
def test_an_optimizer_s_step_is_not_transformed(make, dtype):
    net = make()

    def step(grad):
        param = nn.Parameter(torch.zeros(5, dtype=dtype))
        param.grad = grad
        l2l.LearnedOptimizer([param], net).step()
        return param.detach()

    with pytest.raises(NotImplementedError, match="cannot be transformed by torch.func"):
        torch.func.vmap(step)(torch.ones(3, 5, dtype=dtype))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tangent_of_an_option_is_not_lost(name, dtype):
    params = parameters((6,), dtype=dtype)
    optimizer = l2l.LearnedOptimizer(params, random_network())
    kept = params[0].detach().clone()
    set_gradients(params)

    def step(value):
        optimizer.param_groups[0][name] = value
        optimizer.step()
        return params[0].detach().sum()

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=name):
        step(forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0)))
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(NotImplementedError, match=name):
            transform(step)(torch.tensor(0.5))
    assert torch.equal(params[0], kept)
    with forward_ad.dual_level():
        step(torch.tensor(0.5))  # without a tangent


# ---- closures ----


@pytest.mark.parametrize("kind", ["half-way", "segment", "process group"])
def test_a_closure_is_not_called_in_vain(kind, monkeypatch):
    params, calls = parameters((6,)), []
    optimizer = l2l.LearnedOptimizer(params, gac_network(), process_group=None)
    if kind == "segment":
        optimizer.start_segment()
    if kind == "process group":
        from l2l_fast.optim import joint

        optimizer.process_group = joint.refuse  # what an unpickled one is left with
    else:
        with monkeypatch.context() as patch:
            patch.setattr(l2l.optimizer.joint, "fused_step", lambda *args: (args[-1](), 1 / 0))
            with pytest.raises(ZeroDivisionError):
                run(optimizer, params, 1)
    if kind == "segment":
        optimizer._failure = None  # the segment refuses by itself
    with pytest.raises(RuntimeError, match="half-way|process_group: lost"):
        optimizer.step(lambda: calls.append(1))
    assert not calls


# ---- segments ----


def test_a_network_that_no_segment_can_hold_is_not_let_into_one():
    params = parameters((6,), (4,))
    optimizer = l2l.LearnedOptimizer(params[:1], random_network())
    optimizer.start_segment()
    run(optimizer, params[:1], 1)
    with pytest.raises(NotImplementedError, match="add_param_group.*memory"):
        optimizer.add_param_group({"params": params[1:], "network": ntm()})
    assert len(optimizer.param_groups) == 1
    run(optimizer, params[:1], 1, seed=1)
    set_gradients(params[:1], 2)
    optimizer.backward_segment()
    optimizer.add_param_group({"params": params[1:], "network": ntm()})


@pytest.mark.parametrize("how", ["network", "process_group"])
def test_what_makes_a_segment_impossible_later_is_refused_by_the_step(how):
    params = parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, gac_network())
    optimizer.start_segment()
    if how == "network":
        optimizer.param_groups[0]["network"] = ntm()
    else:
        optimizer.process_group = lambda tensor: None
    kept = params[0].detach().clone()
    with pytest.raises(NotImplementedError, match="step, with a segment open"):
        run(optimizer, params, 1)
    assert torch.equal(params[0], kept) and len(optimizer.state) == 0


def test_a_segment_in_which_only_a_frozen_network_moved_something_is_named():
    params, frozen, trained = parameters((6,), (4,)), random_network(seed=1), random_network(seed=2)
    frozen.requires_grad_(False)
    optimizer = l2l.LearnedOptimizer(
        [{"params": params[:1], "network": frozen}, {"params": params[1:], "network": trained}]
    )
    optimizer.start_segment()
    run(optimizer, params[:1], 2)
    set_gradients(params, 5)
    with pytest.raises(ValueError, match="network: only parameters of a frozen network moved"):
        optimizer.backward_segment()
    run(optimizer, params, 1, seed=6)  # it is still open
    set_gradients(params, 7)
    optimizer.backward_segment()
    assert trained.weight_out.grad.any() and frozen.weight_out.grad is None


def test_a_segment_in_which_nothing_moved_is_named():
    params, net = parameters((6,)), random_network()
    optimizer = l2l.LearnedOptimizer(params, net)
    optimizer.start_segment()
    optimizer.step()
    with pytest.raises(RuntimeError, match="no parameter had a gradient"):
        optimizer.backward_segment([0.0])
    assert net.weight_out.grad is None
