"""Segments used wrongly: what is refused, and that nothing is lost or silently wrong then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from tests.helpers import assert_close, random_network
from tests.segment_helpers import TOLERANCE, Optimizee, net_gradient, record_run, unrolled_gradient, zero_states


def start(steps: int = 2, final: bool = True):
    net = random_network()
    optimizee = Optimizee()
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    record_run(optimizer, optimizee, steps, final=final)
    return net, optimizee, optimizer


def test_order_of_calls():
    net = random_network()
    optimizee = Optimizee()
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    with pytest.raises(RuntimeError, match="no open segment"):
        optimizer.backward_segment()
    optimizer.start_segment()
    with pytest.raises(RuntimeError, match="no step was recorded"):
        optimizer.backward_segment()
    with pytest.raises(RuntimeError, match="already open"):
        optimizer.start_segment()
    with pytest.raises(RuntimeError, match="load_state_dict: a segment is open"):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.discard_segment()
    optimizer.discard_segment()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.start_segment()
    record_run(optimizer, optimizee, 2)
    optimizer.backward_segment()
    with pytest.raises(RuntimeError, match="no open segment"):
        optimizer.backward_segment()


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ([1.0], ValueError),
        ([1.0, 1.0, 1.0], ValueError),
        ([], ValueError),
        (torch.ones(3), ValueError),
        (torch.ones(2, 1), ValueError),
        (torch.ones(2, dtype=torch.complex64), ValueError),
        (1.0, TypeError),
        ("11", TypeError),
        ([1.0, None], TypeError),
        ([1.0, "x"], TypeError),
    ],
)
def test_wrong_weights_leave_the_segment_open(weights, error):
    net, _, optimizer = start()
    with pytest.raises(error, match="weights"):
        optimizer.backward_segment(weights)
    assert net.weight_out.grad is None
    optimizer.backward_segment(torch.ones(2, dtype=torch.int64))
    assert net.weight_out.grad is not None


def test_missing_final_gradient():
    net, optimizee, optimizer = start(final=False)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient at theta_T"):
        optimizer.backward_segment()
    optimizer.backward_segment([1.0, 0.0])  # not needed there
    assert net.weight_out.grad.norm() > 0


def test_forgotten_final_gradient():
    net, optimizee, optimizer = start(steps=3, final=False)
    with pytest.raises(RuntimeError, match="still holds the gradients of the last step"):
        optimizer.backward_segment()
    optimizer.zero_grad(set_to_none=False)
    optimizee.loss(5).backward()
    optimizer.backward_segment()


def test_constant_gradients_are_not_taken_for_forgotten_ones():
    net = random_network()
    param = nn.Parameter(torch.zeros(5))
    optimizer = l2l.LearnedOptimizer([param], net)
    optimizer.start_segment()
    param.grad = torch.ones(5)
    for _ in range(3):  # one tensor, given once
        optimizer.step()
    optimizer.backward_segment()
    optimizer.start_segment()
    for t in range(4):  # a linear function
        optimizer.zero_grad()
        param.sum().backward()
        if t < 3:
            optimizer.step()
    optimizer.backward_segment()


def test_sparse_final_gradient():
    net, optimizee, optimizer = start()
    optimizee.theta[1].grad = torch.ones(9).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.backward_segment()
    assert net.weight_out.grad is None


def test_network_changed_during_the_segment():
    net, _, optimizer = start()
    with torch.no_grad():
        net.bias_out.add_(1.0)
    with pytest.raises(RuntimeError, match="network's parameters changed"):
        optimizer.backward_segment()
    assert net.weight_out.grad is None
    net, _, optimizer = start()
    optimizer.param_groups[0]["network"] = random_network()
    with pytest.raises(RuntimeError, match="replaced"):
        optimizer.step()


def test_state_replaced_during_the_segment():
    net, optimizee, optimizer = start()
    optimizer.state.clear()
    with pytest.raises(RuntimeError, match="state was replaced"):
        optimizer.backward_segment()
    with pytest.raises(RuntimeError, match="state was replaced"):
        optimizer.step()
    optimizer.discard_segment()
    optimizer.step()


def test_wrong_end_state_gradients():
    net, optimizee, optimizer = start()
    theta = optimizee.theta[0]
    good = net.init_state(theta.numel())
    cases = [
        ([good], TypeError, "mapping"),
        ({theta: good.data}, TypeError, "State values"),
        ({nn.Parameter(torch.ones(1)): good}, ValueError, "not a parameter"),
        ({theta: net.init_state(5)}, ValueError, "expected a gradient like"),
        ({theta: good.to(torch.float64)}, ValueError, "expected a gradient like"),
        ({theta: random_network(hidden_size=8).init_state(theta.numel())}, ValueError, "expected a gradient like"),
        ({theta: good.to("meta")}, ValueError, "device"),
    ]
    for value, error, message in cases:
        with pytest.raises(error, match=message):
            optimizer.backward_segment(grad_end_states=value)
        assert net.weight_out.grad is None
    optimizer.backward_segment(grad_end_states={theta: good})


def test_failed_step_breaks_the_segment(monkeypatch):
    net, _, optimizer = start()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(l2l.ops, "step_", fail)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    with pytest.raises(RuntimeError, match="failed half-way"):
        optimizer.backward_segment()
    with pytest.raises(RuntimeError, match="failed half-way"):
        optimizer.step()
    optimizer.discard_segment()
    optimizer.step()


def test_nan_in_one_coordinate_spoils_the_meta_gradient_visibly():
    net = random_network()
    param = nn.Parameter(torch.zeros(5))
    optimizer = l2l.LearnedOptimizer([param], net)
    optimizer.start_segment()
    param.grad = torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])
    optimizer.step()
    param.grad = torch.ones(5)
    optimizer.backward_segment()
    assert net.weight_out.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_written_in_place_are_recorded_by_value(dtype):
    """zero_grad(set_to_none=False) reuses the gradients' memory from step to step."""
    net = random_network(gain=1.0)
    optimizee = Optimizee(dtype=dtype)
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    seen = []
    for t in range(4):
        optimizer.zero_grad(set_to_none=False)
        optimizee.loss(t).backward()
        seen.append([p.grad.clone() for p in optimizee.theta])
        if t < 3:
            optimizer.step()
    optimizer.backward_segment()
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, [1.0] * 3, [1.0] * 3)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


def test_a_parameter_may_get_its_first_gradient_late():
    net = random_network(gain=1.0)
    optimizee = Optimizee()
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)

    def edit(t):
        if t < 2:
            optimizee.theta[1].grad = None

    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 4, edit=edit)
    optimizer.backward_segment()
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, [1.0] * 4, [1.0] * 4)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)
