"""Networks whose coordinates communicate, as modules: two steps against the float64 reference, compile, errors."""

from __future__ import annotations

import pytest
import torch

import l2l_fast as l2l
from tests.gac_helpers import GAC_CONFIGS, GAC_IDS, extra_for, gac_network, shared_state
from tests.helpers import assert_close, double, random_network, random_state, structured_gradient


def run(net, grad, state, groups, extra):
    """Two functional steps and the gradients of everything, flat."""
    grad = grad.clone().requires_grad_()
    leaf = l2l.State(state.data.clone().requires_grad_(), state.numel, state.hidden_size, state.num_layers)
    extra = None if extra is None else extra.clone().requires_grad_()
    _, state = net(grad, leaf, groups, extra)
    out, state = net(grad * 0.5, state, groups, extra)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    logical = state.to_logical()
    loss = (out * weight).sum() + sum(((h - 0.3 * c) ** 2).sum() for h, c in logical)
    net.zero_grad()
    loss.backward()
    start = l2l.State(leaf.data.grad, state.numel, state.hidden_size, state.num_layers).to_logical()
    phi = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    parts = {"out": out, "d grad": grad.grad, "d phi": phi}
    parts |= {f"new {k}": torch.cat(pair) for k, pair in enumerate(logical)}
    parts |= {f"d state {k}": torch.cat(pair) for k, pair in enumerate(start)}
    return parts if extra is None else {**parts, "d extra": extra.grad}


@pytest.mark.parametrize(("shape", "groups"), [((7, 9), 1), ((4, 50), 2), ((130,), 1), ((4, 33), 4), ((1,), 1)])
@pytest.mark.parametrize("options", GAC_CONFIGS, ids=GAC_IDS)
def test_functional_step_matches_the_reference(options, shape, groups):
    net = random_network(**options)
    grad = structured_gradient(shape)
    state = shared_state(net, grad.numel(), groups)
    extra = extra_for(net, shape)
    actual = run(net, grad, state, groups, extra)
    expected = run(
        double(net), grad.double(), state.to(torch.float64), groups, None if extra is None else extra.double()
    )
    for name, value in actual.items():
        assert_close(value, expected[name], 2e-5, name)


def test_states_that_no_step_wrote_count_per_coordinate():
    net = gac_network()
    state = random_state(net, 100)
    actual = run(net, structured_gradient((100,)), state, 1, None)
    expected = run(double(net), structured_gradient((100,)).double(), state.to(torch.float64), 1, None)
    for name, value in actual.items():
        assert_close(value, expected[name], 2e-5, name)


def test_problems_do_not_mix():
    net = gac_network()
    grad = structured_gradient((3, 40))
    alone, _ = net(grad[1], net.init_state(40))
    together, _ = net(grad, net.init_state(120), num_problems=3)
    assert_close(together[1], alone, 1e-6)
    mixed, _ = net(grad, net.init_state(120))
    assert (mixed[1] - alone).abs().max() > 1e-4


def test_padding_never_reaches_a_mean():
    net = gac_network()
    state = shared_state(net, 70, 1)
    dirty = state.clone()
    dirty.data[1, :, 6:] = torch.nan
    grad = structured_gradient((70,))
    clean, dirtied = net(grad, state)[0], net(grad, dirty)[0]
    assert torch.equal(clean, dirtied)


def test_bit_identical_for_any_number_of_threads():
    net = gac_network(extra_inputs=1, num_outputs=4)
    state, grad, extra = shared_state(net, 3000, 2), structured_gradient((2, 1500)), extra_for(net, (2, 1500))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(net, grad, state, 2, extra))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_strided_gradients(dtype):
    net = gac_network()
    grad = structured_gradient((6, 5)).to(dtype).T
    update, _ = net(grad, net.init_state(30))
    expected, _ = net(grad.float().contiguous(), net.init_state(30))
    assert update.dtype == dtype and update.shape == grad.shape
    assert torch.equal(update, expected.to(dtype))


def test_second_derivatives():
    net = gac_network(hidden_size=5, num_layers=1)
    results = []
    for network in (net, double(net)):
        dtype = network.weight_out.dtype
        grad = structured_gradient((2, 8)).to(dtype).requires_grad_()
        state = shared_state(net, 16, 2).to(dtype)
        update, new = network(grad, state, 2)
        (first,) = torch.autograd.grad((update**2).sum() + new.data.sum(), grad, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), [grad, *network.parameters()]))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-4)


def test_compiles_without_graph_breaks():
    net = gac_network(extra_inputs=1, num_outputs=2)
    grad, extra = structured_gradient((2, 20)), torch.randn(1, 2, 20)

    def function(grad, extra, state):
        out, state = net(grad, state, 2, extra)
        return out.sum() + state.data.sum()

    state = net.init_state(40)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    extra_a, extra_b = extra.clone().requires_grad_(), extra.clone().requires_grad_()
    compiled(grad, extra_a, state).backward()
    function(grad, extra_b, state).backward()
    assert_close(extra_a.grad, extra_b.grad, 1e-6)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"num_problems": 3}, ValueError, "num_problems"),
        ({"num_problems": 0}, ValueError, "num_problems"),
        ({"num_problems": 2.0}, TypeError, "num_problems"),
        ({"extra": None}, TypeError, "extra"),
        ({"extra": torch.ones(1, 9)}, ValueError, "extra"),
        ({"extra": torch.ones(1, 10, dtype=torch.int64)}, TypeError, "extra"),
    ],
)
def test_forward_refuses(change, error, name):
    net = gac_network(extra_inputs=1)
    arguments = {"grad": torch.ones(10), "state": net.init_state(10), "extra": torch.ones(1, 10), **change}
    with pytest.raises(error, match=name):
        net(**arguments)


def test_superfluous_extra_is_refused():
    net = gac_network()
    with pytest.raises(ValueError, match="extra"):
        net(torch.ones(4), net.init_state(4), extra=torch.ones(1, 4))
