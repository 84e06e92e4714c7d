"""The gradient that crosses a segment's boundary by way of theta, against float64 autograd and longer segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import reference
from l2l_fast.optim.segment_sampling import Sampling
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


def injections(params, seed: int = 0, dtype=None) -> list[torch.Tensor]:
    found = [structured_gradient(tuple(p.shape), seed=90 + seed + k) for k, p in enumerate(params)]
    return [each.to(p.dtype if dtype is None else dtype) for each, p in zip(found, params, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_injected_and_returned_gradients_of_theta(dtype, maximize, isa):
    net = random_network(gain=1.0)
    optimizee = Optimizee(dtype=dtype)
    theta = list(optimizee.theta)
    theta0 = [p.detach().clone() for p in theta]
    optimizer = l2l.LearnedOptimizer(theta, net, lr=0.7, weight_decay=0.1, maximize=maximize)
    ends = injections(theta)
    ends[2] = None
    weights = [0.5, 0.0, 2.0, 1.5]
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, 4)
    result = optimizer.backward_segment(
        weights,
        grad_end_params={p: end for p, end in zip(theta, ends, strict=True) if end is not None},
        return_grad_start_states=True,
        return_grad_start_params=True,
    )
    expected_params = []
    expected, expected_states = unrolled_gradient(
        [net] * 4, zero_states(net, optimizee), theta0, seen, weights, [0.7] * 4,
        decay=0.1, sign=-1.0 if maximize else 1.0, end_params=ends, start_params=expected_params,
    )  # fmt: skip
    assert_close(net_gradient(net), expected[id(net)], 1e-6 if dtype == torch.float64 else TOLERANCE)
    for k, param in enumerate(theta):
        found = result.params[param]
        assert found.shape == param.shape
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(found, expected_params[k], 1e-12 if dtype == torch.float64 else 1e-6)
        actual = [part for pair in result.states[param].to_logical() for part in pair]
        assert_close(torch.stack(actual), torch.stack(expected_states[k]), TOLERANCE)


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("last", [1.0, 0.3, 0.0])
def test_injecting_zeros_changes_no_bit(numel, last, isa):
    """Of phi's gradient and of what is returned, with a state in the middle of its course."""
    net = random_network(gain=1.0)
    found = []
    for inject in (False, True):
        net.zero_grad()
        params = [nn.Parameter(torch.zeros(numel)), nn.Parameter(torch.zeros(5, 40).T)]
        optimizer = l2l.LearnedOptimizer(params, net, weight_decay=0.01)
        for t in range(9):
            for k, param in enumerate(params):
                param.grad = structured_gradient(tuple(param.shape), seed=10 * t + k)
            if t == 3:
                optimizer.start_segment()
            if t < 8:
                optimizer.step()
        more = {}
        if inject:
            zeros = [net.init_state(param.numel()) for param in params]
            more["grad_end_params"] = {param: torch.zeros_like(param) for param in params}
            more["grad_end_states"] = dict(zip(params, zeros, strict=True))
        weights = [1.0, 0.7, 0.1, 1.3, last]
        states, grads = optimizer.backward_segment(
            weights, return_grad_start_states=True, return_grad_start_params=True, **more
        )
        logical = [part for p in params for pair in states[p].to_logical() for part in pair]
        found.append([net_gradient(net), *logical, *(grads[p] for p in params)])
    assert net_gradient(net).norm() > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def chained(net, dtype, length: int, numel: int = 70, decay: float = 0.0):
    """phi's gradient over ``2 * length`` steps with constant gradients, and the sum of those of its two halves, the
    later one's start gradients injected into the earlier."""
    grads = [structured_gradient((numel,), seed=t).to(dtype) for t in range(2 * length + 1)]
    theta = nn.Parameter(torch.zeros(numel, dtype=dtype))
    optimizer = l2l.LearnedOptimizer([theta], net, weight_decay=decay)

    def run(begin: int, end: int):
        optimizer.start_segment()
        for t in range(begin, end):
            theta.grad = grads[t].clone()
            optimizer.step()
        theta.grad = grads[end].clone()
        segment = optimizer._segment
        optimizer.discard_segment()
        return segment

    whole = run(0, 2 * length)
    optimizer._segment = whole
    start = optimizer.backward_segment(return_grad_start_states=True, return_grad_start_params=True)
    expected = net_gradient(net).clone(), start.params[theta], start.states[theta].data
    net.zero_grad()
    optimizer = l2l.LearnedOptimizer([theta], net, weight_decay=decay)
    first, second = run(0, length), run(length, 2 * length)
    optimizer._segment = second
    middle = optimizer.backward_segment(return_grad_start_states=True, return_grad_start_params=True)
    optimizer._segment = first
    first.current_states = second.current_states  # the later half wrote to the state, as it should
    theta.grad = grads[length].clone()
    start = optimizer.backward_segment(
        grad_end_states=middle.states,
        grad_end_params=middle.params,
        return_grad_start_states=True,
        return_grad_start_params=True,
    )
    return expected, (net_gradient(net), start.params[theta], start.states[theta].data)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"gac_cells": 2}, {"preprocess": "normalized", "output_scale": 0.1}])
def test_two_segments_chained_equal_one_of_twice_the_length(decay, options, isa):
    """All that crosses the boundary is injected: with gradients held constant, nothing is lost."""
    for whole, halves in zip(*chained(random_network(gain=1.0, **options), torch.float32, 5, decay=decay)):
        assert_close(halves, whole, TOLERANCE)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"gac_cells": 2}, {"preprocess": "normalized", "output_scale": 0.1}])
def test_two_segments_chained_equal_one_in_float64(decay, options):
    for whole, halves in zip(*chained(random_network(gain=1.0, **options).double(), torch.float64, 5, decay=decay)):
        assert_close(halves, whole, 1e-9)


@settings(max_examples=20)
@given(data=st.data())
def test_parameters_that_rest(data):
    """Any gradient may be missing at any step, and any injection be left out."""
    run = Resting(data)
    steps, mask, net, optimizee = run.steps, run.mask, run.net, run.optimizee
    optimizer, theta0, edit = run.optimizer, run.theta0, run.edit
    theta = list(optimizee.theta)
    ends = injections(theta)
    ends = [end if data.draw(st.booleans()) else None for end in ends]
    weights = [0.5 + 0.25 * s for s in range(steps)]
    optimizer.start_segment()
    seen = record_run(optimizer, optimizee, steps, edit=edit)
    if not any(any(row[k] for row in mask[:steps]) and mask[steps][k] for k in range(4)):
        return  # refused, as without injection
    result = optimizer.backward_segment(
        weights,
        grad_end_params={p: end for p, end in zip(theta, ends, strict=True) if end is not None},
        return_grad_start_params=True,
    )
    assert result.states is None and set(result.params) == set(theta)
    params = []
    expected, _ = unrolled_gradient(
        [net] * 4, zero_states(net, optimizee), theta0, seen, weights, [1.0] * steps,
        decay=0.1, end_params=ends, start_params=params,
    )  # fmt: skip
    assert_close(net_gradient(net), expected[id(net)], TOLERANCE)
    for k, param in enumerate(theta):
        assert_close(result.params[param], params[k], 1e-6)


def test_groups_with_networks_of_their_own_and_one_that_joins():
    shared, own = random_network(seed=1, gain=1.0), random_network(seed=2, gain=1.0, hidden_size=8, num_layers=1)
    optimizee = Optimizee()
    theta = list(optimizee.theta)
    theta0 = [p.detach().clone() for p in theta]
    optimizer = l2l.LearnedOptimizer([{"params": theta[:1]}, {"params": theta[1:2], "network": own}], shared)
    optimizer.start_segment()

    def edit(t):
        if t == 2:
            optimizer.add_param_group({"params": theta[2:], "lr": 0.5})

    seen = record_run(optimizer, optimizee, 4, edit=edit)
    for t in range(2):
        seen[t][2] = seen[t][3] = None
    ends = injections(theta, dtype=torch.float64)  # any floating-point dtype will do
    optimizer.backward_segment(grad_end_params=dict(zip(theta, ends, strict=True)))
    nets, lrs = [shared, own, shared, shared], [[1.0] * 4] * 2 + [[0.5] * 4] * 2
    totals: dict[int, torch.Tensor] = {}
    for k in range(4):
        each, _ = unrolled_gradient(
            [nets[k]], [nets[k].init_state(theta[k].numel()).to_logical()], [theta0[k]], [[row[k]] for row in seen],
            [1.0] * 4, lrs[k], end_params=[ends[k]],
        )  # fmt: skip
        totals.update((key, totals.get(key, 0.0) + value) for key, value in each.items())
    assert_close(net_gradient(shared), totals[id(shared)], TOLERANCE)
    assert_close(net_gradient(own), totals[id(own)], TOLERANCE)


def test_several_problems_side_by_side():
    """Of a network with global averages: the same as each problem on its own."""
    net = random_network(gain=1.0, gac_cells=2)
    grads = [structured_gradient((2, 33), seed=t) for t in range(4)]
    end = structured_gradient((2, 33), seed=9)
    together, apart = [], []
    for rows, problems, found in ([(0, 2)], 2, together), ([(0, 1), (1, 2)], 1, apart):
        net.zero_grad()
        for begin, stop in rows:
            theta = nn.Parameter(torch.zeros(stop - begin, 33))
            optimizer = l2l.LearnedOptimizer([theta], net, num_problems=problems)
            optimizer.start_segment()
            for t in range(4):
                theta.grad = grads[t][begin:stop].clone()
                if t < 3:
                    optimizer.step()
            result = optimizer.backward_segment(grad_end_params={theta: end[begin:stop]}, return_grad_start_params=True)
            found.append(result.params[theta])
        found.insert(0, net_gradient(net))
    assert_close(together[0], apart[0], TOLERANCE)
    assert torch.equal(together[1], torch.cat(apart[1:]))


def test_the_reference_takes_and_returns_the_same():
    net = random_network(gain=1.0).double()
    starts = [random_state(net, n, seed=n, dtype=torch.float64).to_logical() for n in (3, 5)]
    grads = [[structured_gradient((n,), seed=10 * t + n).double() for n in (3, 5)] for t in range(4)]
    grads[0][1] = grads[2][0] = None
    weights, lrs, decays = [0.5, 1.0, 2.0], [1.0, 0.5, 2.0], [0.9, 0.8, 0.7]
    ends = [torch.ones(3, dtype=torch.float64), None]
    phi = net.phi().detach()
    with_end, _ = reference.segment_backward(starts, grads, weights, lrs, decays, phi, net.config, grad_end_params=ends)
    folded = [list(row) for row in grads]
    folded[3][0] = grads[3][0] + ends[0] / 2.0
    expected, _ = reference.segment_backward(starts, folded, weights, lrs, decays, phi, net.config)
    assert_close(with_end, expected, 1e-13)
    found = reference.segment_start_params(grads, weights, decays, ends)
    first = 0.9 * (0.5 * grads[1][0] + 0.8 * (2.0 * grads[3][0] + 1.0))
    second = 0.5 * grads[1][1] + 0.8 * (1.0 * grads[2][1] + 0.7 * 2.0 * grads[3][1])
    assert_close(found[0], first, 1e-14)
    assert_close(found[1], second, 1e-14)


def test_a_sampled_segment_with_an_injection_is_exact():
    net = random_network(gain=1.0)
    found = []
    for sampling in (None, Sampling(0.1, torch.Generator())):
        net.zero_grad()
        theta = nn.Parameter(torch.zeros(64 * 40))
        optimizer = l2l.LearnedOptimizer([theta], net)
        optimizer.start_segment(sampling)
        for t in range(3):
            theta.grad = structured_gradient((64 * 40,), seed=t)
            if t < 2:
                optimizer.step()
        optimizer.backward_segment(grad_end_params={theta: torch.ones_like(theta)})
        found.append(net_gradient(net))
    assert torch.equal(*found)


def test_nothing_moved_but_the_gradient_passes_through():
    """A frozen network, and a parameter that never moved: asked for what crosses the start, there is an answer."""
    net = random_network().requires_grad_(False)
    moving, resting = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer = l2l.LearnedOptimizer([moving, resting], net)
    optimizer.start_segment()
    moving.grad = torch.ones(3)
    optimizer.step()
    moving.grad, resting.grad = torch.full((3,), 2.0), torch.full((2,), 3.0)
    end = torch.tensor([1.0, float("nan")])
    states, params = optimizer.backward_segment([0.5], grad_end_params={resting: end}, return_grad_start_params=True)
    assert states is None
    assert params[moving].tolist() == [1.0] * 3
    assert params[resting][0].item() == 2.5 and params[resting][1].isnan()


def test_a_nan_stays_in_its_coordinate():
    net = random_network(gain=1.0)
    theta = nn.Parameter(torch.zeros(70))
    optimizer = l2l.LearnedOptimizer([theta], net)
    optimizer.start_segment()
    for _ in range(2):
        theta.grad = torch.ones(70)
        optimizer.step()
    theta.grad = torch.full((70,), 2.0)
    end = torch.zeros(70)
    end[3] = torch.nan
    states, params = optimizer.backward_segment(
        grad_end_params={theta: end}, return_grad_start_states=True, return_grad_start_params=True
    )
    others = torch.arange(70) != 3
    assert params[theta][3].isnan() and params[theta][others].isfinite().all()
    h, _ = states[theta].to_logical()[0]
    assert h[3].isnan().any() and h[others].isfinite().all()
    assert net_gradient(net).isnan().any()


def test_wrong_gradients_of_theta_are_named_and_nothing_is_written():
    net, optimizee = random_network(), Optimizee()
    optimizer = l2l.LearnedOptimizer(optimizee.parameters(), net)
    optimizer.start_segment()
    record_run(optimizer, optimizee, 2)
    theta = optimizee.theta[0]
    good = torch.ones_like(theta)
    cases = [
        ([good], TypeError, "mapping"),
        ({theta: 1.0}, TypeError, "expected a tensor, got float"),
        ({theta: good.to_sparse()}, TypeError, "dense"),
        ({theta: good.to(torch.int64)}, TypeError, "int64"),
        ({nn.Parameter(torch.ones(1)): torch.ones(1)}, ValueError, "not a parameter"),
        ({theta: good.T}, ValueError, r"shape \(9, 4\), got \(4, 9\)"),
        ({theta: good.to("meta")}, ValueError, "device"),
    ]
    for value, error, message in cases:
        with pytest.raises(error, match=f"grad_end_params: .*{message}"):
            optimizer.backward_segment(grad_end_params=value)
        assert net.weight_out.grad is None
    optimizer.backward_segment(grad_end_params={theta: good})
    assert net.weight_out.grad is not None
