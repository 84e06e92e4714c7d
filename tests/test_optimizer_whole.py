"""LearnedOptimizer.step is whole or nothing: what is wrong in one group leaves all groups and all state alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from tests.gac_helpers import gac_network
from tests.helpers import random_network

Kind = str


def good(n: int, dtype=torch.float32) -> torch.Tensor:
    param = nn.Parameter(torch.ones(n, dtype=dtype))
    param.grad = torch.full_like(param, 0.5)
    return param


def bad(kind: Kind, other: torch.Tensor) -> torch.Tensor:
    """A parameter with a gradient that no step may take; ``other`` is a parameter of an earlier group."""
    if kind.startswith("expanded"):
        param = torch.zeros(1, dtype=torch.float64 if "float64" in kind else torch.float32).expand(5)
        param.grad = torch.ones(5, dtype=param.dtype)
        return param
    if kind == "overlapping itself":
        param = torch.zeros(70).as_strided((64, 3), (1, 1))
        param.grad = torch.ones(64, 3)
        return param
    if kind == "memory of an earlier group":
        param = other.detach()[1:]
        param.grad = torch.ones(param.shape)
        return param
    param = good(6, torch.float64 if "float64" in kind else torch.float32)
    if kind == "gradient in an earlier group's memory":
        param.grad = other.detach()[:6]
    elif kind == "gradient shares memory with the parameter":
        base = torch.ones(7)
        param = nn.Parameter(base[:6])
        param.grad = base[1:]
    elif kind.startswith("resized"):
        param.data = torch.zeros(3, dtype=param.dtype)
    elif kind == "inference":
        with torch.inference_mode():
            param = torch.ones(6)
            param.grad = torch.ones(6)
    elif kind == "freed":
        param.untyped_storage().resize_(0)
    elif kind == "sparse":
        param.grad = torch.ones(6).to_sparse()
    elif kind == "sparse float64":
        param.grad = torch.ones(6, dtype=torch.float64).to_sparse()
    elif kind == "integer":
        param = torch.ones(6)
        param.grad = torch.ones(6)
    elif kind == "meta":
        param = nn.Parameter(torch.ones(6, device="meta"))
        param.grad = torch.ones(6, device="meta")
    return param


KINDS = [
    *("expanded", "expanded float64", "overlapping itself", "memory of an earlier group"),
    *("gradient in an earlier group's memory", "gradient shares memory with the parameter"),
    *("resized", "resized float64", "inference", "freed", "sparse", "sparse float64", "integer", "meta"),
    *("lr", "state", "network", "groups"),
]


@pytest.mark.parametrize("first", ["plain", "gac", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_last_group_leaves_everything_as_it_was(kind, first):
    a = good(70, torch.float64 if first == "float64" else torch.float32)
    other = a if first != "float64" else good(70)
    b = bad(kind, other)
    groups = [{"params": [a]}, {"params": [b], "network": gac_network() if kind == "groups" else random_network()}]
    if first == "float64":
        groups.insert(1, {"params": [other]})
    optimizer = l2l.LearnedOptimizer(groups, gac_network() if first == "gac" else random_network())
    if kind == "integer":  # a tensor can change its dtype after it has been given to the optimizer
        b.data = torch.ones(6, dtype=torch.int32)
    elif kind == "lr":
        optimizer.param_groups[-1]["lr"] = float("nan")
    elif kind == "state":
        optimizer.state[b]["lstm_state"] = torch.zeros(1, 7, 64)
    elif kind == "network":
        optimizer.networks[-1].to("meta")
    elif kind == "groups":
        optimizer.param_groups[-1]["num_problems"] = 4
    keep = [p for p in (a, other, b) if not p.is_meta and kind != "freed" or p is not b]
    before = [p.detach().clone() for p in keep]
    states = {key: dict(entry) for key, entry in optimizer.state.items()}
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)) as caught:
        optimizer.step()
    assert "half-way" not in str(caught.value)
    assert all(torch.equal(p.detach(), value) for p, value in zip(keep, before, strict=True))
    assert {key: dict(entry) for key, entry in optimizer.state.items()} == states
    # And without the culprit it goes on.
    b.grad = None
    optimizer.param_groups[-1]["lr"] = 1.0
    if kind not in ("network", "groups"):
        optimizer.step()
        assert not torch.equal(a, before[0])


def test_parts_of_one_tensor_are_accepted_across_groups():
    base, grads = torch.zeros(50, 4), torch.randn(50, 4)
    parts = [nn.Parameter(base[:, :2]), nn.Parameter(base[:, 2:])]
    for param, grad in zip(parts, (grads[:, :2], grads[:, 2:]), strict=True):
        param.grad = grad
    net = random_network()
    l2l.LearnedOptimizer([{"params": [parts[0]]}, {"params": [parts[1]]}], net).step()
    whole = nn.Parameter(torch.zeros(50, 4))
    whole.grad = grads
    l2l.LearnedOptimizer([whole], net).step()
    assert torch.equal(base, whole)


def test_a_launch_that_fails_after_another_stops_further_steps(monkeypatch):
    from l2l_fast.kernels import operators as ops

    a, b = good(6), good(7)
    optimizer = l2l.LearnedOptimizer([{"params": [a]}, {"params": [b]}], random_network())
    saved, step, calls = optimizer.state_dict(), ops.step_, []

    def fails_second(*args, check_only=False, **options):
        if not check_only:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return step(*args, check_only=check_only, **options)

    monkeypatch.setattr(ops, "step_", fails_second)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"half-way \(KeyboardInterrupt"):
        optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()


def _interrupted(monkeypatch, optimizer, at: int = 1):
    """A step in which Ctrl-C was pressed while its at-th operator ran: it is raised as that returns."""
    from l2l_fast.kernels import operators as ops

    step, calls = ops.step_, []

    def interrupted(*args, check_only=False, **options):
        step(*args, check_only=check_only, **options)
        if not check_only:
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ops, "step_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()


def _twins(net, steps: int, **options):
    found = []
    for _ in range(2):
        params = [nn.Parameter(torch.linspace(-1, 1, numel)) for numel in (7, 70)]
        optimizer = l2l.LearnedOptimizer(params, net, **options)
        for t in range(steps):
            _give(params, t)
            optimizer.step()
        _give(params, steps)
        found.append((params, optimizer))
    return found


def _give(params, t: int) -> None:
    for param in params:
        param.grad = torch.cos(torch.arange(param.numel()) + t) + 0.1


SEPARATE = {
    "LSTM": lambda: (random_network(), {}),
    "general": lambda: (l2l.load_pretrained("general"), {"total_steps": 9}),
    "general-small": lambda: (l2l.load_pretrained("general-small"), {"total_steps": 9}),
    "averages": lambda: (gac_network(), {}),
    "int8": lambda: (random_network(), {"state_dtype": "int8"}),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", SEPARATE)
def test_an_interrupt_while_the_only_operator_runs_leaves_a_whole_step(kind, steps, monkeypatch):
    net, options = SEPARATE[kind]()
    (params, optimizer), (twins, other) = _twins(net, steps, **options)
    _interrupted(monkeypatch, optimizer)
    other.step()
    for t in range(steps + 1, steps + 4):
        assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
        for each in (params, twins):
            _give(each, t)
        optimizer.step()
        other.step()


@pytest.mark.parametrize("kind", ["two groups", "memory", "segment"])
def test_an_interrupt_with_more_to_come_stops_further_steps(kind, monkeypatch):
    params = [good(6), good(7)]
    net = l2l.NTMBFGS.from_bfgs("low_rank") if kind == "memory" else random_network()
    groups = [{"params": [param]} for param in params] if kind == "two groups" else params
    optimizer = l2l.LearnedOptimizer(groups, net)
    saved = optimizer.state_dict()
    if kind == "segment":
        optimizer.start_segment()
    _interrupted(monkeypatch, optimizer)
    with pytest.raises(RuntimeError, match=r"half-way \(KeyboardInterrupt"):
        optimizer.step()
    optimizer.discard_segment()
    optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_of_problems_that_does_not_divide_is_refused_in_time(dtype):
    a, b = good(4), good(4, dtype)
    optimizer = l2l.LearnedOptimizer([{"params": [a], "network": random_network()}, {"params": [b]}], gac_network())
    for groups, error in ((3, ValueError), (2.0, TypeError), (True, TypeError)):
        optimizer.param_groups[1]["num_problems"] = groups
        with pytest.raises(error, match="num_problems: expected"):
            optimizer.step()
        assert torch.equal(a, torch.ones(4)) and len(optimizer.state) == 0


def test_a_refused_step_leaves_the_segment_open():
    gradients = []
    for refused in (False, True):
        param, net = good(6), random_network()
        optimizer = l2l.LearnedOptimizer([param], net)
        optimizer.start_segment()
        optimizer.step()
        if refused:
            param.grad = optimizer.state[param]["lstm_state"].view(-1)[:6]
            with pytest.raises(ValueError, match="grads"):
                optimizer.step()
        param.grad = torch.ones(6)
        optimizer.step()
        param.grad = torch.full((6,), 2.0)
        optimizer.backward_segment()
        gradients.append(net.weight_out.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_groups_replaced_during_a_segment_are_noticed():
    param = good(6)
    optimizer = l2l.LearnedOptimizer([param], random_network())
    optimizer.start_segment()
    optimizer.step()
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="group was replaced"):
        optimizer.step()


@pytest.mark.parametrize("change", [lambda m: m.int(), lambda m: m[..., :1].expand_as(m), lambda m: m.to_sparse()])
@pytest.mark.parametrize("name", ["memory_matrix", "memory_reads"])
def test_a_memory_that_cannot_be_written_is_refused_in_time(name, change):
    a, b = good(4), good(5)
    groups = [{"params": [a], "network": random_network()}, {"params": [b]}]
    optimizer = l2l.LearnedOptimizer(groups, l2l.NTMBFGS(hidden_size=4))
    optimizer.step()
    kept = a.detach().clone()
    optimizer.state[b][name] = change(optimizer.state[b][name])
    with pytest.raises(TypeError, match=name):
        optimizer.step()
    assert torch.equal(a, kept)
