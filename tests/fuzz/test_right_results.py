"""Whatever the shape, strides, dtype and network: the operators give what the float64 reference gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from l2l_fast.kernels.state import num_tiles
from tests.fuzz.cases import (
    DTYPES,
    LAYOUTS,
    READ_ONLY_LAYOUTS,
    assert_near,
    blocked_state,
    examples,
    gradient_values,
    identical,
    logical,
    memory_of,
    networks,
    phi_of,
    plain_step,
    plain_step_backward,
    seeds,
    shapes,
    with_layout,
)
from tests.helpers import structured_gradient

VALUES, GRADIENTS, SEGMENTS = 2e-5, 2e-5, 1e-4  # relative errors
styles = st.sampled_from(["structured", "structured", "extreme"])


def reference_step(net, grad, data):
    """Update and logical state in float64."""
    state = l2l.State(data, grad.numel(), net.hidden_size, net.num_layers)
    pairs = [(h.double(), c.double()) for h, c in state.to_logical()]
    update, new = reference.lstm_step(grad.double(), pairs, phi_of(net).double(), net.config)
    return update, torch.cat([part for pair in new for part in pair], dim=1)


@examples(40)
@given(net=networks(), shape=shapes, seed=seeds, style=styles)
def test_step(net, shape, seed, style, isa):
    grad = gradient_values(net, shape, seed, style)
    data = blocked_state(net, grad.numel(), seed, padding=float("nan"))
    update, new_data = plain_step(grad, data, phi_of(net), net.config)
    expected, expected_state = reference_step(net, grad, data)
    assert_near(update, expected, VALUES, 0.05 * abs(net.output_scale), "update")
    assert_near(logical(new_data, grad.numel(), net), expected_state, VALUES, 0.05, "state")


@examples(40)
@given(
    net=networks(),
    shape=shapes,
    seed=seeds,
    style=styles,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(READ_ONLY_LAYOUTS),
)
def test_layout_and_dtype_change_nothing(net, shape, seed, style, dtype, layout, isa):
    """A step, and back through it, on strided low-precision tensors is that on contiguous float32 ones, rounded."""
    grad = with_layout(gradient_values(net, shape, seed, style).to(dtype), layout, seed)
    upstream = structured_gradient((1, *grad.shape), seed=seed + 1)
    plain = grad.resolve_neg().float().contiguous()
    data, grad_data = (blocked_state(net, grad.numel(), seed + k) for k in (0, 1))
    phi = phi_of(net)

    update, new_data = plain_step(grad, data, phi, net.config)
    expected, expected_data = plain_step(plain, data, phi, net.config)
    assert update.is_contiguous() and identical(update, expected)
    assert identical(new_data, expected_data)
    # Through autograd, which makes the upstream gradient contiguous.
    strided = with_layout(upstream, layout, seed + 1)
    upstream = strided.resolve_neg().contiguous()  # an expanded one repeats some values
    expected = plain_step_backward(upstream[0], grad_data, plain, data, phi, net.config)
    leaves = [x.detach().requires_grad_() for x in (grad, data, phi)]
    results = ops.step(leaves[0], None, *leaves[1:], net.config)
    grads = torch.autograd.grad(results, leaves, [strided, grad_data])
    assert identical(grads[0], expected[0].to(dtype))
    assert identical(grads[1], expected[1]) and identical(grads[2], expected[2])
    grads = plain_step_backward(upstream[0], grad_data, grad, data, phi, net.config)
    assert grads[0].is_contiguous() and identical(grads[0], expected[0].to(dtype))
    assert identical(grads[1], expected[1]) and identical(grads[2], expected[2])


@examples(40)
@given(net=networks(), shape=shapes, seed=seeds)
def test_step_backward(net, shape, seed, isa):
    grad = gradient_values(net, shape, seed, "structured")
    numel = grad.numel()
    data, grad_data = (blocked_state(net, numel, seed + k, padding=float("nan")) for k in (0, 1))
    grad_update = structured_gradient(shape, seed=seed + 2)
    actual = plain_step_backward(grad_update, grad_data, grad, data, phi_of(net), net.config)

    wide = [t.double().requires_grad_() for t in (grad, logical(data, numel, net), phi_of(net))]
    parts = wide[1].split(net.hidden_size, dim=1)
    update, new = reference.lstm_step(wide[0], list(zip(parts[::2], parts[1::2])), wide[2], net.config)
    new_state = torch.cat([part for pair in new for part in pair], dim=1)
    upstream = [grad_update.double(), logical(grad_data, numel, net).double()]
    expected = torch.autograd.grad([update, new_state], wide, upstream)
    # The slope of log_sign is up to e^p; gradients of few coordinates may cancel.
    assert_near(actual[0], expected[0], GRADIENTS, 1e-3, "d grad")
    assert_near(logical(actual[1], numel, net), expected[1], GRADIENTS, 1e-3, "d state")
    assert_near(actual[2], expected[2], GRADIENTS, 1e-3, "d phi")


@st.composite
def parameters(draw):
    """Arguments of the in-place step: for each parameter a shape, and dtype, layout and seed of it and its gradient."""
    one = st.tuples(
        shapes, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS),
        st.sampled_from(READ_ONLY_LAYOUTS), seeds,
    )  # fmt: skip
    return draw(st.lists(one, min_size=0, max_size=4))


@examples(40)
@given(
    net=networks(),
    parameters=parameters(),
    style=styles,
    lr=st.sampled_from([1.0, 0.0, 0.3, -2.0, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 1.5]),
    maximize=st.booleans(),
    recorded=st.booleans(),
)
def test_step_in_place(net, parameters, style, lr, weight_decay, maximize, recorded, isa):
    """State and record as the functional step's, bit for bit; parameters to one rounding; nothing else written."""
    params, grads, states = [], [], []
    for shape, dtype, grad_dtype, layout, grad_layout, seed in parameters:
        grad = with_layout(gradient_values(net, shape, seed, style).to(grad_dtype), grad_layout, seed)
        params.append(with_layout(torch.randn(grad.shape).to(dtype), layout, seed + 1))
        grads.append(grad)
        states.append(blocked_state(net, grad.numel(), seed))
    before = [param.clone() for param in params]
    around = [memory_of(param).clone() for param in params]
    grads_before = [memory_of(grad).clone() for grad in grads]
    tiles = [num_tiles(param.numel()) for param in params]
    record_tiles = [2 + sum(tiles[k + 1 :]) for k in range(len(tiles))] if recorded else []
    record = torch.full((64 * (sum(tiles) + 3) + 5,), 7.0) if recorded else None
    phi = phi_of(net)
    seen = [(-g.float() if maximize else g.float()).contiguous() for g in (g.resolve_neg() for g in grads)]
    expected = [plain_step(g, state, phi, net.config) for g, state in zip(seen, states)]

    options = {"record": record, "record_tiles": record_tiles}
    ops.step_(params, grads, states, phi, net.config, lr, weight_decay, maximize, **options)

    for k, (update, state) in enumerate(expected):
        numel = params[k].numel()
        assert identical(logical(states[k], numel, net), logical(state, numel, net))
        kept, moved = before[k].double() * (1 - lr * weight_decay), lr * update.double()
        rounding = torch.finfo(params[k].dtype).eps * (kept + moved).abs() + torch.finfo(params[k].dtype).tiny
        rounding += 2 * torch.finfo(torch.float32).eps * (kept.abs() + moved.abs())
        assert ((params[k].double() - kept - moved).abs() <= rounding).all()
        # What lies between the elements of a parameter, and the gradient, stay as they were.
        params[k].copy_(before[k])
        assert identical(memory_of(params[k]), around[k])
        assert identical(memory_of(grads[k]), grads_before[k])
        if record is not None:
            place = record[64 * record_tiles[k] :][: 64 * tiles[k]]
            assert identical(place[:numel], seen[k].view(-1)) and not place[numel:].any()
            place.fill_(7.0)
    assert record is None or record.eq(7.0).all()


@examples(30)
@given(
    net=networks(),
    sizes=st.lists(st.one_of(st.integers(0, 90), st.sampled_from([64, 128, 129])), min_size=0, max_size=3),
    steps=st.integers(1, 6),
    seed=seeds,
    injected=st.booleans(),
    need_start=st.booleans(),
)
def test_segment_backward(net, sizes, steps, seed, injected, need_start, isa):
    generator = torch.Generator().manual_seed(seed)
    tiles = [num_tiles(n) for n in sizes]
    places = [1 + sum(tiles[k + 1 :]) for k in range(len(tiles))]
    records = [torch.full((64 * (sum(tiles) + 2),), float("nan")) for _ in range(steps + 1)]
    grads = []
    for t, record in enumerate(records):
        grads.append([gradient_values(net, (n,), seed + 31 * t + k, "structured") for k, n in enumerate(sizes)])
        for k, n in enumerate(sizes):
            record[64 * places[k] :][: 64 * tiles[k]] = torch.nn.functional.pad(grads[t][k], (0, 64 * tiles[k] - n))
    weights = (torch.rand(steps, generator=generator) * 2 - 0.5).tolist()
    lrs = (torch.rand(steps, generator=generator) + 0.5).tolist()
    decays = (1 - 0.2 * torch.rand(steps, generator=generator)).tolist()
    starts = [blocked_state(net, n, seed + k, padding=3.0) for k, n in enumerate(sizes)]
    ends = [blocked_state(net, n, seed + 10 + k) for k, n in enumerate(sizes)] if injected else []
    phi = phi_of(net)
    grad_phi, grad_starts = ops.segment_backward(
        starts, sizes, places, records, [], weights, lrs, decays, phi, net.config, 1, ends, need_start
    )

    def wide(states):
        return [
            l2l.State(data, n, net.hidden_size, net.num_layers).to(torch.float64).to_logical()
            for data, n in zip(states, sizes)
        ]

    wide_grads = [[g.double() for g in row] for row in grads]
    expected_phi, expected_starts = reference.segment_backward(
        wide(starts), wide_grads, weights, lrs, decays, phi.double(), net.config, wide(ends) if injected else None
    )
    assert_near(grad_phi, expected_phi, SEGMENTS, 1e-3, "d phi")
    assert len(grad_starts) == (len(sizes) if need_start else 0)
    for data, n, expected in zip(grad_starts, sizes, expected_starts):
        parts = torch.cat([part for pair in expected for part in pair], dim=1)
        assert_near(logical(data, n, net), parts, SEGMENTS, 1e-3, "d start state")


@pytest.mark.parametrize("steps", [30, 75])
def test_a_long_segment(steps, isa):
    """Longer than what the scratch of a tile holds at once."""
    net = l2l.CoordinatewiseLSTM()
    records = [torch.zeros(128) for _ in range(steps + 1)]
    for t, record in enumerate(records):
        record[:70] = structured_gradient((70,), seed=t)
    ones, phi = [1.0] * steps, phi_of(net)
    start = blocked_state(net, 70, 3)
    grad_phi, _ = ops.segment_backward([start], [70], [0], records, [], ones, ones, ones, phi, net.config)
    logical_start = l2l.State(start, 70, 20, 2).to(torch.float64).to_logical()
    expected, _ = reference.segment_backward(
        [logical_start], [[r[:70].double()] for r in records], ones, ones, ones, phi.double(), net.config
    )
    assert_near(grad_phi, expected, SEGMENTS, 0.0, "d phi")
