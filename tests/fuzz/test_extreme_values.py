"""NaN, infinities, denormals and garbage in padding: contained, and the processor's mode left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from tests.fuzz.cases import (
    assert_near,
    bits,
    blocked_state,
    examples,
    gradient_values,
    identical,
    logical,
    networks,
    phi_of,
    plain_step,
    plain_step_backward,
    seeds,
)
from tests.helpers import random_network, structured_gradient

# Quiet, signalling, with a payload in every part of the mantissa, and the all-ones pattern that poisoned memory has.
NAN_BITS = (0x7FC00000, 0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1, -0x3FFFF3, 0x7F8ABCDE)
nan_bits = st.sampled_from(NAN_BITS)


def put_bits(tensor: torch.Tensor, index: int, pattern: int) -> None:
    tensor.view(torch.int32).view(-1)[index] = pattern


def everything(net, grad, data, grad_update, grad_data):
    """All that the operators make of one gradient, per coordinate: update, state, d grad, d state."""
    numel, phi = grad.numel(), phi_of(net)
    update, new_data = plain_step(grad, data, phi, net.config)
    grads = plain_step_backward(grad_update, grad_data, grad, data, phi, net.config)
    param, state, record = torch.zeros(numel), data.clone(), torch.empty(64 * data.shape[0])
    ops.step_([param], [grad], [state], phi, net.config, 1.0, 0.0, False, record=record, record_tiles=[0])
    others = torch.zeros_like(record)
    others[:numel] = 1.0
    ones = [1.0, 1.0]
    _, starts = ops.segment_backward(
        [data], [numel], [0], [record, record, others], [], ones, ones, ones, phi, net.config, 1, [grad_data], True
    )
    rows = [logical(x, numel, net) for x in (new_data, state, grads[1], starts[0])]
    return [update, param, grads[0], *rows]


@examples(40)
@given(net=networks(), numel=st.integers(1, 140), seed=seeds, place=st.floats(0, 0.999), pattern=nan_bits)
def test_a_nan_gradient_stays_in_its_coordinate(net, numel, seed, place, pattern, isa):
    grad = gradient_values(net, (numel,), seed, "structured")
    data, grad_data = (blocked_state(net, numel, seed + k) for k in (0, 1))
    grad_update = structured_gradient((numel,), seed=seed + 2)
    clean = everything(net, grad, data, grad_update, grad_data)
    coordinate = int(place * numel)
    put_bits(grad, coordinate, pattern)
    dirty = everything(net, grad, data, grad_update, grad_data)
    others = torch.arange(numel) != coordinate
    assert dirty[0][coordinate].isnan() and dirty[1][coordinate].isnan()
    for a, b in zip(clean, dirty):
        assert identical(a[others], b[others])


@examples(40)
@given(net=networks(), numel=st.integers(1, 140), seed=seeds, place=st.floats(0, 0.999), pattern=nan_bits)
def test_a_nan_in_the_state_stays_in_its_coordinate(net, numel, seed, place, pattern, isa):
    grad = gradient_values(net, (numel,), seed, "structured")
    data, grad_data = (blocked_state(net, numel, seed + k) for k in (0, 1))
    grad_update = structured_gradient((numel,), seed=seed + 2)
    clean = everything(net, grad, data, grad_update, grad_data)
    coordinate = int(place * numel)
    row = seed % data.shape[1]
    put_bits(data, (coordinate // 64 * data.shape[1] + row) * 64 + coordinate % 64, pattern)
    dirty = everything(net, grad, data, grad_update, grad_data)
    others = torch.arange(numel) != coordinate
    assert dirty[0][coordinate].isnan()
    for a, b in zip(clean, dirty):
        assert identical(a[others], b[others])


@examples(40)
@given(net=networks(), seed=seeds, place=st.floats(0, 0.999999), pattern=nan_bits)
def test_a_nan_weight_reaches_every_update(net, seed, place, pattern, isa):
    """Whichever weight and whatever its bits: an optimizer that is broken must not look alive."""
    phi = phi_of(net).clone()
    put_bits(phi, int(place * phi.numel()), pattern)
    grad = gradient_values(net, (70,), seed, "structured")
    update, _ = plain_step(grad, blocked_state(net, 70, seed), phi, net.config)
    assert update.isnan().all()


@examples(40)
@given(net=networks(), seed=seeds)
def test_infinite_and_huge_gradients_give_finite_updates(net, seed, isa):
    grad = gradient_values(net, (100,), seed, "extreme")
    grad[::7], grad[3::7] = math.inf, -math.inf
    data = blocked_state(net, 100, seed)
    update, new_data = plain_step(grad, data, phi_of(net), net.config)
    pairs = l2l.State(data, 100, net.hidden_size, net.num_layers).to(torch.float64).to_logical()
    expected, _ = reference.lstm_step(grad.double(), pairs, phi_of(net).double(), net.config)
    assert expected.isfinite().all() and update.isfinite().all() and logical(new_data, 100, net).isfinite().all()
    assert_near(update, expected, 2e-5, 0.05 * abs(net.output_scale), "update")


@examples(30)
@given(net=networks(), numel=st.integers(1, 200).filter(lambda n: n % 64), seed=seeds, pattern=nan_bits)
def test_padding_never_reaches_a_result(net, numel, seed, pattern, isa):
    """The states' padding lanes may hold anything in the functional step and back through it."""
    grad = gradient_values(net, (numel,), seed, "structured")
    grad_update = structured_gradient((numel,), seed=seed + 2)
    states = [blocked_state(net, numel, seed + k) for k in (0, 1)]
    results = []
    for garbage in (False, True):
        if garbage:
            for data in states:
                data[-1, :, numel % 64 :].view(torch.int32).fill_(pattern)
        update, new_data = plain_step(grad, states[0], phi_of(net), net.config)
        grads = plain_step_backward(grad_update, states[1], grad, states[0], phi_of(net), net.config)
        results.append([update, logical(new_data, numel, net), grads[0], logical(grads[1], numel, net), grads[2]])
    assert all(identical(a, b) for a, b in zip(*results))


def test_padding_of_an_injected_end_state_gradient_is_ignored():
    """A gradient of the end state that was made elsewhere (by a network for synthetic gradients, say)."""
    net = random_network()
    results = []
    for padding in (0.0, 5.0, math.nan):
        param = torch.nn.Parameter(torch.zeros(70))
        optimizer = l2l.LearnedOptimizer([param], net)
        optimizer.start_segment()
        param.grad = structured_gradient((70,))
        optimizer.step()
        param.grad = structured_gradient((70,), seed=9)
        end = l2l.State(blocked_state(net, 70, 5, padding), 70, net.hidden_size, net.num_layers)
        optimizer.backward_segment(grad_end_states={param: end})
        results.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
    assert results[0].isfinite().all() and all(identical(results[0], other) for other in results[1:])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_processor_keeps_its_denormals(threads, isa):
    """They are flushed inside the kernels; afterwards, also after an error, all threads compute as before."""
    torch.set_num_threads(threads)
    net = random_network()
    numel = 64 * 60
    data, grad, param = blocked_state(net, numel, 1), structured_gradient((numel,)), torch.zeros(numel)
    everything(net, grad, data, grad, data)
    with pytest.raises(ValueError):
        ops.step_([param], [grad], [data[:1]], phi_of(net), net.config, 1.0, 0.0, False)
    tiny = torch.full((1 << 18,), 1e-40)
    assert (tiny * 0.5).ne(0).all() and (torch.full((), 1e-40) * 0.5).item() != 0


def test_denormal_parameters_survive(isa):
    net = random_network()
    param = torch.full((100,), 1e-40)
    before = param.clone()
    state = blocked_state(net, 100, 1)
    ops.step_([param], [torch.ones(100)], [state], phi_of(net), net.config, 0.0, 0.0, False)
    assert identical(param, before)


def test_denormals_in_the_state_count_as_zero(isa):
    """And cost nothing: a saturated cell decays through them."""
    net = random_network()
    tiny = torch.full((2, 2 * 2 * 20, 64), 1e-41)
    grad = structured_gradient((128,))
    a, _ = plain_step(grad, tiny, phi_of(net), net.config)
    b, _ = plain_step(grad, torch.zeros_like(tiny), phi_of(net), net.config)
    assert torch.equal(bits(a), bits(b))
