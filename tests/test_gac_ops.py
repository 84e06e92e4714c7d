"""The operators of communicating coordinates against the float64 reference: values, gradients, compile, threads."""

from __future__ import annotations

import pytest
import torch

import l2l_fast as l2l
from l2l_fast import gac_ops
from l2l_fast.kernels import reference
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
    together, _ = net(grad, net.init_state(120), groups=3)
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


@pytest.mark.parametrize("extras", [(0, 1), (2, 3)])
def test_opcheck(extras):
    net = gac_network(hidden_size=4, num_layers=1, gac_cells=2, extra_inputs=extras[0], num_outputs=extras[1])
    grad, extra = torch.randn(2, 5, requires_grad=True), extra_for(net, (2, 5))
    if extra is not None:
        extra.requires_grad_()
    state = random_state(net, 10).data.requires_grad_()
    phi = net.phi().detach().requires_grad_()
    torch.library.opcheck(torch.ops.l2l_fast.gac_step.default, (grad, extra, state, phi, *net.config, 2))
    grad_out = torch.randn(extras[1], 2, 5, requires_grad=True)
    args = (grad_out, torch.randn_like(state).requires_grad_(), grad, extra, state, phi, *net.config, 2)
    torch.library.opcheck(torch.ops.l2l_fast.gac_step_backward.default, args)


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
        ({"groups": 3}, ValueError, "groups"),
        ({"groups": 0}, ValueError, "groups"),
        ({"groups": 2.0}, TypeError, "groups"),
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


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", GAC_CONFIGS[:4], ids=GAC_IDS[:4])
def test_in_place_step_and_segment_backward_match_the_reference(options, groups):
    """T steps of two tensors through the raw operators, then the meta-gradient, against float64."""
    net = random_network(**options)
    shapes, steps = [(2, 45), (4, 7)], 5
    numels = [90, 28]
    params = [torch.randn(shape) for shape in shapes]
    starts = [shared_state(net, n, groups) for n in numels]
    # Of averaging cells all tensors share h, too.
    starts[1] = reference_shared(starts, net, groups)
    states = [start.clone() for start in starts]
    phi = net.phi().detach()
    exact = [p.double() for p in params]
    exact_states = [s.to(torch.float64).to_logical() for s in starts]
    records, means, tiles = [], [], [0, 2]
    grads = [[structured_gradient(s, seed=9 * t + k) for k, s in enumerate(shapes)] for t in range(steps + 1)]
    for t in range(steps):
        record = torch.empty(64 * 3)
        mean = torch.empty(net.num_layers, groups, net.gac_cells)
        sums = torch.empty(2, groups, net.gac_cells, dtype=torch.float64)
        data = [state.data for state in states]
        gac_ops.gac_step_(
            params, grads[t], data, None, None, phi, *net.config, 0.5, 0.1, False, record, tiles, groups, mean, sums,
            0, net.num_layers + 1,
        )  # fmt: skip
        records.append(record)
        means.append(mean)
        g = reference.join([x.double().flatten() for x in grads[t]], groups)
        joint = reference.join_states(exact_states, groups)
        update, joint = reference.lstm_step(g, joint, phi.double(), net.config, groups)
        exact_states = reference.separate_states(joint, numels, groups)
        for k, u in enumerate(reference.separate(update, numels, groups)):
            exact[k] = exact[k] * 0.95 + 0.5 * u.view(shapes[k])
        for layer, (h, _) in enumerate(joint):
            expected = h.view(groups, -1, net.hidden_size)[:, 0, : net.gac_cells]
            assert_close(mean[layer], expected, 2e-5, f"means of layer {layer}")
    for param, value in zip(params, exact, strict=True):
        assert_close(param, value, 2e-5, "theta")
    last = torch.zeros(64 * 3)
    for k, place in enumerate((0, 128)):
        last[place : place + numels[k]] = grads[steps][k].flatten()
    ends = [random_state(net, n, seed=3 + k) for k, n in enumerate(numels)]
    w = [1.0, 0.5, 2.0, 1.0, 3.0]
    grad_phi, grad_starts = gac_ops.gac_segment_backward(
        [s.data for s in starts], numels, tiles, [*records, last], means, w, [0.5] * steps, [0.95] * steps, phi,
        *net.config, groups, [s.data for s in ends], True,
    )  # fmt: skip
    expected_phi, expected_starts = reference.segment_backward(
        [s.to(torch.float64).to_logical() for s in starts],
        [[g.double() for g in each] for each in grads],
        w,
        [0.5] * steps,
        [0.95] * steps,
        phi.double(),
        net.config,
        [s.to(torch.float64).to_logical() for s in ends],
        groups,
    )
    assert_close(grad_phi, expected_phi, 1e-4, "d phi")
    for data, start, expected in zip(grad_starts, starts, expected_starts, strict=True):
        for pair, pair_expected in zip(start._like(data).to_logical(), expected, strict=True):
            for part, part_expected in zip(pair, pair_expected, strict=True):
                assert_close(part, part_expected, 1e-4, "d start")


def reference_shared(states, net, groups):
    """The second state with the averaging cells' h of the first."""
    pairs = []
    for (h0, _), (h, c) in zip(states[0].to_logical(), states[1].to_logical(), strict=True):
        h = h.clone().view(groups, -1, net.hidden_size)
        h[:, :, : net.gac_cells] = h0.view(groups, -1, net.hidden_size)[:, :1, : net.gac_cells]
        pairs.append((h.flatten(0, 1), c))
    return l2l.State.from_logical(pairs)
