"""start_segment / backward_segment against float64 autograd through an unrolled trajectory, and finite differences."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast import reference
from tests.helpers import Cells, assert_close, double, random_network, random_state, structured_gradient

TOLERANCE = 1e-4
STATE = "lstm_state"


class Optimizee(nn.Module):
    """A small non-convex function of several tensors, with a new minibatch at every evaluation t."""

    def __init__(self, seed: int = 0, dtype=torch.float32, width: int = 9) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(width, 4), (width,), (3, width), ()]
        self.theta = nn.ParameterList(torch.randn(shape, generator=generator).mul(0.5).to(dtype) for shape in shapes)
        self.data = structured_gradient((30, 16, 4), seed=seed).clamp(-3, 3).to(dtype)

    def loss(self, t: int, theta: list[Tensor] | None = None) -> Tensor:
        w, b, v, s = theta if theta is not None else list(self.theta)
        x = self.data[t].to(w.dtype)
        return (torch.tanh(x @ w.T + b) @ v.T * s.cos() - x[:, :3]).square().mean() + 0.01 * s.square()


def record_run(
    optimizer, optimizee, steps: int, *, first: int = 0, edit=None, final: bool = True
) -> list[list[Tensor | None]]:
    """Run a segment; returns the gradients the optimizer saw at theta_0 ... theta_T."""
    seen = []
    for t in range(first, first + steps + int(final)):
        optimizer.zero_grad()
        optimizee.loss(t).backward()
        if edit is not None:
            edit(t)
        seen.append([None if p.grad is None else p.grad.detach().clone() for p in optimizee.theta])
        if t < first + steps:
            optimizer.step()
    return seen


def unrolled_gradient(nets, states, theta0, seen, weights, lrs, decay=0.0, sign=1.0, end_grads=None):
    """d/d phi and d/d start state of sum_s w_s <g_s, theta_s>, autograd through torch.nn.LSTMCell in float64.

    nets: one network per tensor (may be shared); states: logical; seen: gradients per step and tensor or None;
    lrs: one per step.
    """
    cells = {id(net): Cells(double(net)) for net in nets}
    total = torch.zeros((), dtype=torch.float64)
    starts = []
    for k, net in enumerate(nets):
        theta = theta0[k].double()
        state = [tuple(part.detach().double().requires_grad_() for part in pair) for pair in states[k]]
        starts.append([part for pair in state for part in pair])
        for t, lr in enumerate(lrs):
            if seen[t][k] is not None:
                update, state = cells[id(net)](sign * seen[t][k].double(), state)
                theta = theta * (1 - lr * decay) + lr * update
            if seen[t + 1][k] is not None:
                total = total + weights[t] * (seen[t + 1][k].double() * theta).sum()
        if end_grads is not None and end_grads[k] is not None:
            for pair, pair_grad in zip(state, end_grads[k], strict=True):
                total = total + sum((a * b.double()).sum() for a, b in zip(pair, pair_grad, strict=True))
    leaves = [leaf for start in starts for leaf in start]
    parameters = {key: list(module.parameters()) for key, module in cells.items()}
    torch.autograd.backward(total, inputs=[*leaves, *(p for ps in parameters.values() for p in ps)])
    zero = [[torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in start] for start in starts]
    return {key: module.flat_gradient() for key, module in cells.items()}, zero


def net_gradient(net) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def zero_states(net, optimizee):
    return [net.init_state(p.numel()).to_logical() for p in optimizee.theta]


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
            optimizer.state[p][STATE].to_logical() if p in optimizer.state else net.init_state(p.numel()).to_logical()
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
    net = random_network().requires_grad_(False)
    optimizee = Optimizee()
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    record_run(optimizer, optimizee, 2)
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
    steps = data.draw(st.integers(1, 4))
    mask = [[data.draw(st.booleans()) for _ in range(4)] for _ in range(steps + 1)]
    mask[steps][data.draw(st.integers(0, 3))] = True
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    net = random_network(gain=1.0, hidden_size=8)
    optimizee = Optimizee(dtype=dtype)
    theta0 = [p.detach().clone() for p in optimizee.theta]
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net, weight_decay=0.1)

    def edit(t):
        for param, has in zip(optimizee.theta, mask[t], strict=True):
            if not has:
                param.grad = None

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
    states = [optimizer.state[p][STATE].to_logical() for p in optimizee.theta]
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
    assert [step.record.numel() for step in tape.steps] == [64 * 50] * 4
    assert segment.start_states[theta].data.numel() == 80 * 64 * 50
    records = [weakref.ref(step.record) for step in tape.steps]
    last = weakref.ref(theta.grad)
    theta.grad = structured_gradient((64 * 50,), seed=9)
    assert last() is None  # recording keeps no gradient tensor alive
    optimizer.backward_segment()
    del segment, tape
    gc.collect()
    assert all(record() is None for record in records)


# ---- errors ----


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
        patch.setattr(l2l.ops, "lstm_step_", fail)
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
