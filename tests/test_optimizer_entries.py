"""The state of LearnedOptimizer and its checkpoints: whose entries they are, what is missing, what is half-written."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn.utils import parametrizations, prune, weight_norm

import l2l_fast as l2l
from tests.contract_helpers import clones, equal, network, through_a_file
from tests.gac_helpers import gac_network
from tests.optimizer_helpers import STATE, parameters, run

KINDS = {
    "plain": lambda: network(),
    "gac": lambda: gac_network(),
    "dense": lambda: l2l.NTMBFGS(hidden_size=4),
    "low_rank": lambda: l2l.NTMBFGS(hidden_size=4, memory="low_rank"),
}


def foreign() -> dict:
    """What wrappers of optimizers keep in the state of a parameter."""
    return {"step": torch.tensor(7), "memory": {"slow": torch.ones(3)}, "slow_buffer": torch.ones(2), "note": "a"}


def same(entry, expected) -> bool:
    return all(key in entry and equal(entry[key], value) for key, value in expected.items())


# ---- entries of others ----


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_others_are_kept_and_not_read(kind, when):
    net, params = KINDS[kind](), parameters((6,), (2,))
    optimizer = l2l.LearnedOptimizer(params, net)
    undisturbed, others = l2l.LearnedOptimizer(third := clones(params), net), clones(params)
    if when == "after":
        run(optimizer, params, 2)
    optimizer.state[params[0]].update(foreign())
    if when == "before":
        run(optimizer, params, 2)
    run(undisturbed, third, 2)
    assert same(optimizer.state[params[0]], foreign())
    loaded = l2l.LearnedOptimizer(others, net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(loaded.state[others[0]], foreign())
    assert equal(loaded.state_dict(), optimizer.state_dict())
    with torch.no_grad():
        for param, start in zip(others, params, strict=True):
            param.copy_(start)
    for each, its in ((optimizer, params), (undisturbed, third), (loaded, others)):
        run(each, its, 3, seed=5)
    for a, b, c in zip(params, third, others, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("kind", ["plain", "low_rank"])
def test_a_number_of_coordinates_that_is_another_s_is_kept(kind):
    params = parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, KINDS[kind]())
    optimizer.state[params[0]]["numel"] = 11
    assert optimizer.state_dict()["state"][0] == {"numel": 11}
    with pytest.warns(UserWarning, match="no 'lstm_state'"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[params[0]] == {"numel": 11}


def test_a_memory_s_count_survives_the_dtype_of_the_parameter():
    """As torch.optim.Optimizer.load_state_dict casts what wrappers of optimizers load."""
    net, params = l2l.NTMBFGS(hidden_size=4, memory="low_rank", history=2), parameters((6,), dtype=torch.bfloat16)
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 1)
    memory = net.memory_from(optimizer.state[params[0]], 6)
    for count in (0, 255, 258, 99_999, 2**31 - 2):
        memory.written = 3 * (count // 3)
        entries = {name: value.to(torch.bfloat16) for name, value in memory.entries().items()}
        assert net.memory_from(entries, 6).written == memory.written
    for wrong in (float("nan"), float("inf"), -3.0, 0.5, 1e30):
        with pytest.raises(ValueError, match="memory_written"):
            net.memory_from({**memory.entries(), "memory_written": torch.tensor([wrong, 0, 0, 0])}, 6)


def test_a_memory_s_count_as_it_was_saved_before_loads():
    net, params = KINDS["low_rank"](), parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 4)
    saved = optimizer.state_dict()
    del saved["state"][0]["memory_written"]
    saved["state"][0]["step"] = torch.tensor(12)
    others = clones(params)
    other = l2l.LearnedOptimizer(others, net)
    other.load_state_dict(through_a_file(saved))
    assert equal(other.state_dict(), optimizer.state_dict())
    other.state[others[0]] = saved["state"][0]  # as some wrappers put it there
    run(optimizer, params, 2, seed=7)
    run(other, others, 2, seed=7)
    assert torch.equal(params[0], others[0])


# ---- networks that were swapped ----


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_a_checkpoint_after_a_memory_was_given_up_loads(kind):
    net, plain, params = KINDS[kind](), l2l.CoordinatewiseLSTM(hidden_size=4), parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 2)
    optimizer.param_groups[0]["network"] = plain
    run(optimizer, params, 1)
    others = clones(params)
    other = l2l.LearnedOptimizer(others, plain)
    for each in (other, optimizer):
        each.load_state_dict(through_a_file(optimizer.state_dict()))
    assert equal(other.state_dict()["state"], optimizer.state_dict()["state"])
    run(optimizer, params, 2, seed=5)
    run(other, others, 2, seed=5)
    assert torch.equal(params[0], others[0])


# ---- what is missing ----


def test_the_state_of_another_optimizer_under_our_groups_is_named():
    params = parameters((6,))
    adam = torch.optim.Adam(params)
    run(adam, params, 1)
    optimizer = l2l.LearnedOptimizer(params, network())
    saved = {**optimizer.state_dict(), "state": adam.state_dict()["state"]}
    with pytest.warns(UserWarning, match="no 'lstm_state' in the state of parameter 0, only .*'exp_avg'") as caught:
        optimizer.load_state_dict(saved)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("missing", ["memory", "state"])
@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_half_of_what_a_memory_needs_is_named(kind, missing):
    params = parameters((6,), (2,))
    optimizer = l2l.LearnedOptimizer(params, KINDS[kind]())
    run(optimizer, params, 1)
    saved = optimizer.state_dict()
    if missing == "memory":
        saved["state"][0] = {STATE: saved["state"][0][STATE]}
    else:
        del saved["state"][1]
    words = "no memory" if missing == "memory" else "no 'lstm_state' of 1 of its 2"
    with pytest.warns(UserWarning, match=f"state_dict: .*{words}") as caught:
        optimizer.load_state_dict(saved)
    assert caught[0].filename == __file__


# ---- half-written state ----


def test_half_written_state_is_not_loaded(monkeypatch):
    from l2l_fast.kernels import operators as ops

    params = parameters((6,), (7,))
    optimizer = l2l.LearnedOptimizer([{"params": params[:1]}, {"params": params[1:]}], network())
    run(optimizer, params, 1)
    good, step, calls = optimizer.state_dict(), ops.step_, []

    def fails_second(*args, check_only=False, **options):
        calls.append(check_only)
        if calls.count(False) == 2:
            raise KeyboardInterrupt
        return step(*args, check_only=check_only, **options)

    monkeypatch.setattr(ops, "step_", fails_second)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    half = through_a_file(optimizer.state_dict())
    for each in (optimizer, l2l.LearnedOptimizer([{"params": params[:1]}, {"params": params[1:]}], network())):
        before = each.state_dict()
        with pytest.raises(ValueError, match=r"state_dict: .*half-way \(KeyboardInterrupt"):
            each.load_state_dict(half)
        assert equal(before, each.state_dict())
    with pytest.raises(RuntimeError, match="half-way"):
        optimizer.step()
    optimizer.load_state_dict(good)
    run(optimizer, params, 1)
    assert all(set(group) == set(good["param_groups"][0]) for group in optimizer.state_dict()["param_groups"])


# ---- state that is made before the first step ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_before_the_first_step_is_one_of_a_new_optimizer(kind, lr, dtype):
    net, model = KINDS[kind](), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(-0.0)
    twin, start = copy.deepcopy(model), [param.detach().clone() for param in model.parameters()]
    make_lr = lambda: torch.tensor(0.5) if lr == "tensor" else 0.5  # noqa: E731
    optimizer = l2l.LearnedOptimizer(model.parameters(), net, make_lr(), weight_decay=0.1)
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    assert all(not entry[STATE].any() for entry in saved["state"].values())
    for param, value in zip(model.parameters(), start, strict=True):
        assert param.view(torch.uint8).equal(value.view(torch.uint8))
    untouched = l2l.LearnedOptimizer(twin.parameters(), net, make_lr(), weight_decay=0.1)
    assert optimizer.param_groups[0]["lr"] == 0.5
    run(optimizer, list(model.parameters()), 2)
    run(untouched, list(twin.parameters()), 2)
    assert equal(optimizer.state_dict(), untouched.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("case", ["a gradient", "a rate", "a state"])
def test_other_steps_that_move_nothing_count(case):
    params = parameters((6,), (2,))
    optimizer = l2l.LearnedOptimizer([{"params": [param]} for param in params], network(), lr=0.0)
    if case == "a state":
        run(optimizer, params, 1)
        before = optimizer.state[params[0]][STATE].clone()
    elif case == "a rate":
        optimizer.param_groups[1]["lr"] = 1.0
    for param in params:
        param.grad = torch.zeros_like(param)
    if case == "a gradient":
        params[1].grad[1] = torch.nan
    optimizer.step()
    state = optimizer.state[params[0]][STATE]
    assert not torch.equal(state, before) if case == "a state" else state.any()


# ---- copies of optimizers with networks that torch changed ----


def _mixed(net) -> None:
    parametrizations.weight_norm(net, "weight_hh_l0")
    prune.l1_unstructured(net, "weight_out", 0.3)


CHANGES = {
    "prune": lambda net: prune.l1_unstructured(net, "weight_hh_l0", 0.5),
    "pruned twice": lambda net: [prune.random_unstructured(net, "weight_out", 0.2) for _ in range(2)],
    "weight_norm": lambda net: weight_norm(net, "weight_hh_l0"),
    "parametrized": lambda net: parametrizations.weight_norm(net, "weight_hh_l0"),
    "parametrized and pruned": _mixed,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("change", CHANGES)
def test_copies_of_a_changed_network_go_on_alike(change, way):
    net = network()
    CHANGES[change](net)
    params = parameters((6,))
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 1)
    if way == "deepcopy":
        others, other = copy.deepcopy((params, optimizer))
    elif "parametrized" in change:
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            pickle.dumps(optimizer)
        return
    elif way == "pickle":
        others, other = pickle.loads(pickle.dumps((params, optimizer)))
    else:
        buffer = io.BytesIO()
        torch.save((params, optimizer), buffer)
        buffer.seek(0)
        others, other = torch.load(buffer, weights_only=False)
    twin = other.networks[0]
    assert twin is not net and torch.equal(twin.phi(), net.phi())
    run(optimizer, params, 2, seed=3)
    run(other, others, 2, seed=3)
    assert torch.equal(params[0], others[0])
    # It is trained, and pruned or normalised, on its own.
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(twin.phi(), net.phi())
    twin.phi().sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in net.parameters())
    for each in (net, twin):
        each(torch.ones(3), each.init_state(3))  # the hooks work on
