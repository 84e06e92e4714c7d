"""start_segment / backward_segment against float64 autograd through an unrolled trajectory, and finite differences."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import reference
from tests.helpers import assert_close, random_network, random_state, structured_gradient
from tests.segment_helpers import (
    TOLERANCE,
    Optimizee,
    Resting,
    net_gradient,
    record_run,
    unrolled_gradient,
    zero_states,
)


@pytest.mark.parametrize("preprocess", ["log_sign", "identity"])
@pytest.mark.parametrize("steps", [1, 20])
def test_segment_matches_unrolled_autograd(preprocess, steps, isa):
    net = random_network(preprocess=preprocess, gain=1.0)
    optimizee = Optimizee()
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    weights = torch.rand(steps).tolist()
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, steps)
    assert optimizer.backward_segment(weights) is None
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, weights, [1.0] * steps)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


def test_segment_matches_finite_differences():
    """Of the loss itself, with the gradients that the network sees frozen (the dropped path of the paper)."""
    net = random_network(gain=1.0, hidden_size=8)
    optimizee = Optimizee()
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net, lr=0.5, weight_decay=0.05)
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 5)
    optimizer.backward_segment()
    actual = net_gradient(net).double()
    phi = net.phi().detach().double()

    def meta_loss(phi):
        theta = [p.double() for p in theta0]
        states = zero_states(net, optimizee)
        total = 0.0
        for t in range(5):
            for k in range(4):
                update, states[k] = reference.lstm_step(seen[t][k].double(), states[k], phi, net.config)
                theta[k] = theta[k] * (1 - 0.5 * 0.05) + 0.5 * update
            total += float(optimizee.loss(t + 1, theta))
        return total

    for seed in range(3):
        direction = torch.randn(phi.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        numeric = (meta_loss(phi + 1e-5 * direction) - meta_loss(phi - 1e-5 * direction)) / 2e-5
        # A random direction may be nearly orthogonal to the gradient: compare with the largest possible value.
        scale = float(actual.norm() * direction.norm())
        assert abs(numeric - float(actual @ direction)) <= TOLERANCE * scale
        assert abs(numeric) > 10 * TOLERANCE * scale


def test_consecutive_segments_carry_the_state():
    net = random_network(gain=1.0)
    optimizee = Optimizee()
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    for first in (0, 4):
        net.zero_grad()
        theta0 = [p.detach().clone() for p in optimizee.theta]
        states = [
            optimizer.state_of(p).to_logical() if p in optimizer.state else net.init_state(p.numel()).to_logical()
            for p in optimizee.theta
        ]
        optimizer.start_segment()
        seen = record_run(optimizer, optimizee, 4, first=first)
        optimizer.backward_segment()
        expected, _ = unrolled_gradient([net] * 4, states, theta0, seen, [1.0] * 4, [1.0] * 4)
        assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


def test_the_boundary_gradient_may_be_reused():
    net = random_network(gain=1.0)
    results = []
    for reuse in (True, False):
        net.zero_grad()
        optimizee = Optimizee()
        optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
        optimizer.start_segment()
        record_run(optimizer, optimizee, 3)
        optimizer.backward_segment()
        optimizer.start_segment()
        if not reuse:
            optimizer.zero_grad()
            optimizee.loss(3).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizee.loss(4).backward()
        optimizer.backward_segment()
        results.append((net_gradient(net), optimizee.theta[0].detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recording_does_not_change_the_trajectory():
    net = random_network()
    results = []
    for recorded in (True, False):
        optimizee = Optimizee()
        optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
        if recorded:
            optimizer.start_segment()
        record_run(optimizer, optimizee, 3)
        results.append([p.detach() for p in optimizee.theta])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_accumulate_over_segments_and_respect_frozen_parameters():
    net = random_network(gain=1.0)
    net.bias_l0.requires_grad_(False)
    gradients = []
    for accumulate in (False, True):
        net.zero_grad()
        for seed in (1, 2):
            if not accumulate:
                net.zero_grad()
            optimizee = Optimizee(seed)
            optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
            optimizer.start_segment()
            record_run(optimizer, optimizee, 3)
            optimizer.backward_segment()
            if not accumulate:
                gradients.append(net.weight_hh_l0.grad.clone())
    assert net.bias_l0.grad is None
    torch.testing.assert_close(net.weight_hh_l0.grad, gradients[0] + gradients[1])


def test_frozen_network_is_left_alone():
    """It has nothing to learn, which is an error unless the gradients of the states are wanted."""
    net = random_network().requires_grad_(False)
    optimizee = Optimizee()
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    record_run(optimizer, optimizee, 2)
    with pytest.raises(ValueError, match="network: none of its parameters requires grad"):
        optimizer.backward_segment()
    grads = optimizer.backward_segment(return_grad_start_states=True)
    assert net.weight_out.grad is None and grads[optimizee.theta[0]].data.abs().sum() > 0


# ---- groups and options ----


def test_groups_sharing_a_network_and_groups_with_their_own():
    shared, own = random_network(seed=1, gain=1.0), random_network(seed=2, gain=1.0, hidden_size=8, num_layers=1)
    optimizee = Optimizee()
    theta = list(optimizee.theta)
    theta0 = [p.detach().clone() for p in theta]
    groups = [{"params": theta[:1]}, {"params": theta[1:2], "network": own}, {"params": theta[2:]}]
    optimizer = l2l.LearnedOptimizer(groups, shared)
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 5)
    optimizer.backward_segment()
    nets = [shared, own, shared, shared]
    states = [net.init_state(p.numel()).to_logical() for net, p in zip(nets, theta, strict=True)]
    expected, _ = unrolled_gradient(nets, states, theta0, seen, [1.0] * 5, [1.0] * 5)
    assert_close(net_gradient(shared), expected[id(shared)], TOLERANCE)
    assert_close(net_gradient(own), expected[id(own)], TOLERANCE)


def test_scheduler_and_weight_decay():
    net = random_network(gain=1.0)
    optimizee = Optimizee()
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net, lr=2.0, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    optimizer.register_step_post_hook(lambda *args: scheduler.step())
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 6)
    optimizer.backward_segment()
    lrs = [2.0 * 0.7**t for t in range(6)]
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, [1.0] * 6, lrs, decay=0.1)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maximize(dtype):
    """The network sees -grad, the meta-gradient is still that of the user's f."""
    net = random_network(gain=1.0)
    optimizee = Optimizee(dtype=dtype)
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net, maximize=True)
    weights = [0.5, 1.0, 0.0, 2.0]
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 4)
    optimizer.backward_segment(torch.tensor(weights))
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, weights, [1.0] * 4, sign=-1.0)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


def test_clipped_gradients_are_those_of_the_meta_loss():
    net = random_network(gain=1.0)
    optimizee = Optimizee()
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 4, edit=lambda t: nn.utils.clip_grad_norm_(optimizee.parameters(), 0.05))
    optimizer.backward_segment()
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, [1.0] * 4, [1.0] * 4)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    net = random_network(gain=1.0)
    optimizee = Optimizee(dtype=dtype)
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 3)
    optimizer.backward_segment()
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, [1.0] * 3, [1.0] * 3)
    assert_close(net_gradient(net), expected[id(net)], 1e-6 if dtype == torch.float64 else TOLERANCE)


def test_one_group_may_mix_dtypes():
    net = random_network(gain=1.0)
    optimizee = Optimizee(dtype=torch.float64)
    optimizee.theta[1] = nn.Parameter(optimizee.theta[1].detach().float())
    optimizee.theta[3] = nn.Parameter(optimizee.theta[3].detach().bfloat16())

    def loss(t, theta=None):
        return Optimizee.loss(optimizee, t, [p.double() for p in optimizee.theta])

    optimizee.loss = loss
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net, weight_decay=0.1)
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 3)
    optimizer.backward_segment()
    expected, _ = unrolled_gradient(
        [net] * 4, zero_states(net, optimizee), theta0, seen, [1.0] * 3, [1.0] * 3, decay=0.1
    )
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


def test_float64_network():
    net = random_network(gain=1.0).double()
    optimizee = Optimizee(dtype=torch.float64)
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 3)
    optimizer.backward_segment()
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, [1.0] * 3, [1.0] * 3)
    assert_close(net_gradient(net), expected[id(net)], 1e-10)


# ---- parameters without a gradient, groups that join ----


@settings(max_examples=20)
@given(data=st.data())
def test_missing_gradients_at_any_step(data):
    run = Resting(data)
    steps, mask, net, optimizee = run.steps, run.mask, run.net, run.optimizee
    optimizer, theta0, edit = run.optimizer, run.theta0, run.edit
    moved = [any(row[k] for row in mask[:steps]) for k in range(4)]
    weights = [0.5 + 0.25 * s for s in range(steps)]
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, steps, edit=edit)
    needed = [p for p, m, last in zip(optimizee.theta, moved, mask[steps], strict=True) if m and last]
    if not needed:
        with pytest.raises(RuntimeError, match="gradient at theta_T"):
            optimizer.backward_segment(weights)
        return
    starts = optimizer.backward_segment(weights, return_grad_start_states=True)
    expected, expected_starts = unrolled_gradient(
        [net] * 4, zero_states(net, optimizee), theta0, seen, weights, [1.0] * steps, decay=0.1
    )
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)
    for k, param in enumerate(optimizee.theta):
        assert (param in starts) == moved[k]
        if moved[k]:
            actual = [part for pair in starts[param].to_logical() for part in pair]
            assert_close(torch.stack(actual), torch.stack(expected_starts[k]), TOLERANCE)


def test_a_step_without_any_gradient_counts():
    net = random_network(gain=1.0)
    optimizee = Optimizee()
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 3, edit=lambda t: optimizer.zero_grad() if t == 1 else None)
    optimizer.backward_segment([1.0, 2.0, 3.0])
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, [1.0, 2.0, 3.0], [1.0] * 3)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


def test_a_group_may_join_during_the_segment():
    net = random_network(gain=1.0)
    optimizee = Optimizee()
    theta = list(optimizee.theta)
    theta0 = [p.detach().clone() for p in theta]
    optimizer = l2l.LearnedOptimizer(theta[:2], net)
    optimizer.start_segment()

    def edit(t):
        if t == 2:
            optimizer.add_param_group({"params": theta[2:]})

    seen = record_run(optimizer, optimizee, 4, edit=edit)
    optimizer.backward_segment()
    for t in range(2):
        seen[t][2] = seen[t][3] = None
    expected, _ = unrolled_gradient([net] * 4, zero_states(net, optimizee), theta0, seen, [1.0] * 4, [1.0] * 4)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)


def test_zero_size_parameters():
    net = random_network(gain=1.0)
    empty, param = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(5))
    optimizer = l2l.LearnedOptimizer([empty, param], net)
    optimizer.start_segment()
    for t in range(3):
        empty.grad, param.grad = torch.zeros(0, 3), structured_gradient((5,), seed=t)
        if t < 2:
            optimizer.step()
    starts = optimizer.backward_segment(return_grad_start_states=True)
    assert net_gradient(net).isfinite().all() and net_gradient(net).norm() > 0
    assert starts[empty].numel == 0


# ---- synthetic gradients ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_injected_end_state_gradients_and_returned_start_state_gradients(dtype):
    net = random_network(gain=1.0)
    optimizee = Optimizee(dtype=dtype)
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    record_run(optimizer, optimizee, 2, final=False)
    theta0 = [p.detach().clone() for p in optimizee.theta]
    states = [optimizer.state_of(p).to_logical() for p in optimizee.theta]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    injected = {p: random_state(net, p.numel(), seed=40 + k, dtype=state_dtype) for k, p in enumerate(optimizee.theta)}
    del injected[optimizee.theta[1]]
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 4, first=2)
    starts = optimizer.backward_segment(grad_end_states=injected, return_grad_start_states=True)
    ends = [injected[p].to_logical() if p in injected else None for p in optimizee.theta]
    expected, expected_starts = unrolled_gradient([net] * 4, states, theta0, seen, [1.0] * 4, [1.0] * 4, end_grads=ends)
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)
    for k, param in enumerate(optimizee.theta):
        assert isinstance(starts[param], l2l.State)
        actual = [part for pair in starts[param].to_logical() for part in pair]
        assert_close(torch.stack(actual), torch.stack(expected_starts[k]), TOLERANCE)


def test_two_segments_chained_by_state_gradients_equal_one():
    """With theta's own share injected through the weights of the loss: the exact gradient of a longer unroll."""
    net = random_network(gain=1.0)
    gradients = [structured_gradient((70,), seed=t) for t in range(7)]

    def run(boundaries):
        net.zero_grad()
        theta = nn.Parameter(torch.zeros(70))
        optimizer = l2l.LearnedOptimizer([theta], net)
        segments = []
        for begin, end in boundaries:
            optimizer.start_segment()
            for t in range(begin, end):
                theta.grad = gradients[t].clone()
                optimizer.step()
            theta.grad = gradients[end].clone()
            segments.append((optimizer._segment, dict(optimizer.state)))
            optimizer.discard_segment()
        return theta, optimizer, segments

    theta, optimizer, [(whole, _)] = run([(0, 6)])
    optimizer._segment = whole
    optimizer.backward_segment()
    expected = net_gradient(net)

    # The same in two halves: theta_3's gradient from the later half is the sum of g_4 ... g_6.
    theta, optimizer, [(first, _), (second, _)] = run([(0, 3), (3, 6)])
    optimizer._segment = second
    start_grads = optimizer.backward_segment(return_grad_start_states=True)
    optimizer._segment = first
    first.current_states = second.current_states  # the later half wrote to the state, as it should
    theta.grad = gradients[3] + gradients[4] + gradients[5] + gradients[6]
    optimizer.backward_segment(grad_end_states=start_grads)
    assert_close(net_gradient(net), expected, 1e-5)


# ---- memory ----


def test_memory_is_the_start_state_and_the_records():
    net = random_network()
    theta = nn.Parameter(torch.randn(64 * 50))
    optimizer = l2l.LearnedOptimizer([theta], net)
    optimizer.start_segment()
    for t in range(4):
        theta.grad = structured_gradient((64 * 50,), seed=t)
        optimizer.step()
    gc.collect()
    segment = optimizer._segment
    [tape] = segment.tapes.values()
    assert [step.gradients.numel() for step in tape.steps] == [64 * 50] * 4
    assert segment.start_states[theta].data.numel() == 80 * 64 * 50
    records = [weakref.ref(step.gradients) for step in tape.steps]
    last = weakref.ref(theta.grad)
    theta.grad = structured_gradient((64 * 50,), seed=9)
    assert last() is None  # recording keeps no gradient tensor alive
    optimizer.backward_segment()
    del segment, tape
    gc.collect()
    assert all(record() is None for record in records)
