"""LearnedOptimizer: wrong arguments and gradients are refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from tests.helpers import assert_close, random_network
from tests.optimizer_helpers import Oracle, parameters, run, set_gradients


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a finite number >= 0"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"lr": "1"}, TypeError, "lr"),
        ({"lr": torch.ones(2)}, ValueError, "lr"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"weight_decay": None}, TypeError, "weight_decay"),
        ({"maximize": 1}, TypeError, "maximize"),
        ({"network": None}, ValueError, "network"),
        ({"network": nn.Linear(1, 1)}, TypeError, "network: .*Linear"),
    ],
)
def test_constructor_rejects(options, error, message):
    with pytest.raises(error, match=message):
        l2l.LearnedOptimizer(parameters((3,)), **{"network": random_network(), **options})


def test_constructor_rejects_parameters():
    net = random_network()
    for tensor in (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64), torch.eye(3).to_sparse()):
        with pytest.raises(TypeError, match="params"):
            l2l.LearnedOptimizer([tensor], net)
    param = parameters((3,))[0]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="more than once"):
        l2l.LearnedOptimizer([param, param], net)
    with pytest.raises(ValueError, match="empty parameter list"):
        l2l.LearnedOptimizer([], net)
    with pytest.raises(ValueError, match="more than one parameter group"):
        l2l.LearnedOptimizer([{"params": [param]}, {"params": [param]}], net)


@pytest.mark.parametrize("kind", ["sparse", "complex", "integer", "device"])
def test_bad_gradient_in_the_last_group_leaves_the_first_alone(kind):
    net = random_network()
    a, b = torch.randn(5), torch.randn(6)
    optimizer = l2l.LearnedOptimizer([{"params": [a]}, {"params": [b], "network": random_network()}], net)
    run(optimizer, [a, b], 1)
    kept = [a.clone(), *(optimizer.state_of(p).data.clone() for p in (a, b))]
    set_gradients([a], 1)
    b.grad = None
    if kind == "sparse":
        b.grad = torch.ones(6).to_sparse()
    elif kind == "device":
        b.grad = torch.ones(6)
        optimizer.networks[1].to("meta")
    else:  # a tensor can change its dtype after it has been given to the optimizer
        b.data = torch.ones(6, dtype=torch.complex64 if kind == "complex" else torch.int32)
        b.grad = torch.ones_like(b)
    with pytest.raises(
        ValueError if kind == "device" else TypeError, match="device" if kind == "device" else "params|grad"
    ):
        optimizer.step()
    assert torch.equal(a, kept[0]) and torch.equal(optimizer.state_of(a).data, kept[1])
    assert torch.equal(optimizer.state_of(b).data, kept[2])


def test_parameter_resized_or_network_replaced():
    net = random_network()
    params = parameters((5,))
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 1)
    params[0].grad = None
    params[0].data = torch.zeros(7)
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        run(optimizer, params, 1)
    optimizer = l2l.LearnedOptimizer(params, net)
    run(optimizer, params, 1)
    optimizer.param_groups[0]["network"] = random_network(hidden_size=8)
    with pytest.raises(ValueError, match="hidden_size=8"):
        run(optimizer, params, 1)


def test_expanded_parameter_is_refused():
    param = torch.zeros(1).expand(5)
    optimizer = l2l.LearnedOptimizer([param], random_network())
    param.grad = torch.ones(5)
    with pytest.raises(ValueError, match="overlap"):
        optimizer.step()


def test_new_weights_of_the_network_are_used_at_once():
    """However they were written: in place, through .data, or by load_state_dict."""
    net, other = random_network(seed=1), random_network(seed=2)
    params = parameters((70,))
    start = params[0].detach().clone()
    optimizer = l2l.LearnedOptimizer(params, net)
    set_gradients(params)
    changes = [
        lambda: net.load_state_dict(other.state_dict()),
        lambda: [p.data.mul_(0.5) for p in net.parameters()],
        lambda: [setattr(p, "data", p.data * 2) for p in net.parameters()],
    ]
    for change in changes:
        change()
        oracle = Oracle([start], net)
        oracle.step([params[0].grad])
        with torch.no_grad():
            params[0].copy_(start)
        optimizer.state.clear()
        optimizer.step()
        assert_close(params[0], oracle.params[0], 2e-6)
