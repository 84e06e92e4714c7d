"""The operators of networks with normalized inputs against the reference in float64, for every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from l2l_fast.kernels.state import num_tiles
from tests.helpers import assert_close, phi_of, random_network, random_state
from tests.normalized_helpers import (
    IDS,
    NORMALIZED,
    common_of,
    drifting_gradients,
    exact_step,
    normalized_network,
    run_step,
    warm_states,
)
from tests.ops_helpers import valid_lanes

SIZES = [0, 1, 63, 64, 65, 1003]
TOLERANCE = 2e-5
EVERY = pytest.mark.parametrize("options", NORMALIZED, ids=IDS)


def row(rows, k=0):
    return None if rows is None else rows[k]


# ---- step ----


@pytest.mark.parametrize("numel", SIZES)
@EVERY
def test_functional_step(isa, options, numel):
    net = normalized_network(**options)
    g = drifting_gradients(6, numel)
    state, common = warm_states(net, g[:5]), common_of(net, 1)
    out, new = ops.step(g[5].float(), None, state.data, phi_of(net), net.config, ages=[6], **common)
    expected, exact = exact_step(net, g[5].float(), state, row(common["tensor_inputs"]), row(common["nominal"]))
    assert out.shape == (1, numel)
    assert_close(out[0], expected, TOLERANCE, "update")
    actual, exact = valid_lanes(new, numel), valid_lanes(exact.data, numel)
    assert_close(actual[:, :-4], exact[:, :-4], TOLERANCE, "h and c")
    scale = exact[:, -4:].abs().amax(dim=1, keepdim=True).clamp_min(1e-300)  # each coordinate's own
    assert ((actual - exact)[:, -4:] / scale).abs().le(1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EVERY
def test_in_place_step_of_tensors_of_different_ages(isa, options, dtype):
    net = normalized_network(**options)
    sizes, ages = [(3, 50), (), (0, 4), (64,), (65,), (1003,)], [1, 2, 3, 40, 5, 1000]
    g = [drifting_gradients(6, math.prod(shape), decades=2, seed=k)[5].reshape(shape) for k, shape in enumerate(sizes)]
    grads = [each.to(dtype) for each in g]
    grads[0] = grads[0].t().contiguous().t()
    states = [random_state(net, each.numel(), seed=k) for k, each in enumerate(grads)]
    common = common_of(net, len(sizes))
    params = [torch.randn(shape) for shape in sizes]
    before, data = [p.clone() for p in params], [state.data.clone() for state in states]
    record = torch.full((64 * (2 + sum(num_tiles(p.numel()) for p in params)),), math.nan)
    places, place = [], 1
    for p in params:
        places.append(place)
        place += num_tiles(p.numel())
    run_step(
        net, params, grads, data, common, ages,
        lr=0.7, weight_decay=0.1, maximize=True, record=record, record_tiles=places,
    )  # fmt: skip
    for k, state in enumerate(states):
        state = l2l.State(state.data, state.numel, state.hidden_size, state.num_layers, 4, ages[k] - 1)
        out, new = exact_step(net, -grads[k], state, row(common["tensor_inputs"], k), row(common["nominal"], k))
        assert_close(params[k], before[k].double() * (1 - 0.07) + 0.7 * out, 1e-6, f"param {k}")
        assert_close(valid_lanes(data[k], state.numel), valid_lanes(new.data, state.numel), TOLERANCE, f"state {k}")
        assert torch.equal(record[64 * places[k] :][: state.numel], -grads[k].reshape(-1).float())


def test_without_nominal_it_is_the_default(isa):
    net = normalized_network()
    g = drifting_gradients(2, 70).float()
    state, inputs = warm_states(net, g[:1].double()), common_of(net, 1)["tensor_inputs"]
    given = torch.tensor([reference.normalized.NOMINAL])
    results = [
        ops.step(g[1], None, state.data, phi_of(net), net.config, ages=[2], tensor_inputs=inputs, nominal=nominal)
        for nominal in (None, given)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # The module makes nominal of its inputs; of a weight_nominal of zero that is the default.
    told = ops.step(
        *(g[1], None, state.data, phi_of(net), net.config),
        ages=[2],
        tensor_inputs=inputs,
        nominal=net.nominal_of(inputs),
    )
    for expected in (told, results[0]):
        update, new = net(g[1], state, tensor_inputs=inputs[0])
        assert torch.equal(update, expected[0][0]) and torch.equal(new.data, expected[1]) and new.age == 2
        torch.nn.init.zeros_(net.weight_nominal)


def test_inputs_of_a_tensor_are_a_bias(isa):
    """Of either path: the same network with the product in its bias."""
    net, plain = normalized_network(), normalized_network(tensor_inputs=0)
    x = torch.tensor([0.3, -1.0, 2.0])
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(net.get_parameter(name))
        plain.bias_l0 += net.weight_tensor @ x
    g = drifting_gradients(1, 70)[0]
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-6)):
        state = net.init_state(70, dtype=dtype)
        actual, new = net(g.to(dtype), state, tensor_inputs=x)
        expected, exact = plain(g.to(dtype), state, nominal=net.nominal_of(x.unsqueeze(0))[0])
        assert_close(actual, expected, tolerance)
        assert_close(new.data, exact.data, tolerance)


def test_a_zero_head_is_adam(isa):
    """To 1e-6 of a learning rate in each of hundreds of steps; gradients from 1e-18 to 1e18, and sparse ones."""
    net = l2l.CoordinatewiseLSTM(8, 2, "normalized", output_scale=1.0)
    g = drifting_gradients(400, 60, decades=18).float()
    g[:, ::7] *= torch.rand(400, 1) < 0.02
    param = torch.nn.Parameter(torch.zeros(60, dtype=torch.float64))
    adam = torch.optim.Adam([param], lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    data = net.init_state(60).data
    for t, grad in enumerate(g):
        before = param.detach().clone()
        param.grad = grad.double()
        adam.step()
        update = torch.zeros(60)
        run_step(net, [update], [grad], [data], {}, [t + 1])
        assert (update - (param.detach() - before)).abs().max() < 1e-6, t


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_inputs_have_no_scale(isa, scale):
    net = normalized_network()
    g = drifting_gradients(20, 100, decades=2)
    data, scaled = net.init_state(100).data, net.init_state(100).data
    common = common_of(net, 1)
    for t, each in enumerate(g):
        run_step(net, [torch.zeros(100)], [each.float()], [data], common, [t + 1])
        run_step(net, [torch.zeros(100)], [(scale * each).float()], [scaled], common, [t + 1])
    assert_close(scaled[:, :-4], data[:, :-4], 1e-5)
    assert_close(scaled[:, -4:].double() / scale, data[:, -4:], 1e-6)


def test_extreme_gradients(isa):
    """Zeros from the start, denormals, the largest numbers and infinities are finite; a NaN stays where it is."""
    net = normalized_network()
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    g = torch.tensor([0.0, -0.0, tiny / 8, -tiny, huge, -huge, math.inf, -math.inf, math.nan, 1.0])
    common = common_of(net, 1)
    state, data = net.init_state(10, dtype=torch.float64), net.init_state(10).data
    for t in range(30):
        grad = g if t % 3 < 2 else torch.where(g.isnan(), g, 0.0)
        update = torch.zeros(10)
        run_step(net, [update], [grad], [data], common, [t + 1])
        expected, state = exact_step(net, grad, state, common["tensor_inputs"][0], common["nominal"][0])
        assert update.isnan().tolist() == [False] * 8 + [True, False]
        kept = valid_lanes(data, 10)
        assert kept[[*range(8), 9]].isfinite().all() and kept[8].isnan().all()
        assert_close(update[[*range(8), 9]], expected[[*range(8), 9]], TOLERANCE)


def test_a_nan_reaches_no_other_coordinate(isa):
    net = normalized_network(hidden_size=20)
    g = drifting_gradients(3, 200).float()
    common = common_of(net, 1)
    clean, spoilt = (net.init_state(200).data for _ in range(2))
    others = torch.arange(200) != 77
    for t, grad in enumerate(g):
        bad = grad.clone()
        bad[77] = math.nan
        updates = [torch.zeros(200), torch.zeros(200)]
        for update, each, data in zip(updates, (grad, bad), (clean, spoilt), strict=True):
            run_step(net, [update], [each], [data], common, [t + 1])
        assert torch.equal(updates[0][others], updates[1][others]) and updates[1][77].isnan()
    assert torch.equal(valid_lanes(clean, 200)[others], valid_lanes(spoilt, 200)[others])


# ---- backward ----


@pytest.mark.parametrize("numel", SIZES)
@EVERY
def test_step_backward(isa, options, numel):
    net = normalized_network(**options)
    g = drifting_gradients(4, numel)
    state, common = warm_states(net, g[:3]), common_of(net, 1)
    grad_out, grad_state = torch.randn(1, numel), random_state(net, numel, seed=9).data
    if num_tiles(numel):
        state.data[-1, :, numel - 64 * (num_tiles(numel) - 1) :] = math.nan  # what padding holds reaches nothing
        grad_state[-1, :, numel - 64 * (num_tiles(numel) - 1) :] = math.nan
    actual = ops.step_backward(
        grad_out, grad_state, g[3].float(), None, state.data, phi_of(net), net.config, ages=[4], **common
    )
    phi = phi_of(net).double().requires_grad_()
    logical = state.to(torch.float64).to_logical()
    pairs = [(h.requires_grad_(), c.requires_grad_()) for h, c in logical[:-1]]
    out, new = reference.lstm_step(
        g[3].float().double(), [*pairs, logical[-1]], phi, net.config, 1, None,
        row(common["tensor_inputs"]), row(common["nominal"]),
    )  # fmt: skip
    upstream = l2l.State(grad_state, numel, net.hidden_size, net.num_layers, 4).to_logical()[:-1]
    leaves = [part for pair in pairs for part in pair]
    d_phi, *d_state = torch.autograd.grad(
        [out, *(part for pair in new[:-1] for part in pair)],
        [phi, *leaves],
        [grad_out[0].double(), *(part.double() for pair in upstream for part in pair)],
    )
    d_grad, d_extra, d_data, actual_phi = actual
    assert d_grad.eq(0).all() and d_grad.shape == g[3].shape and d_extra.numel() == 0
    kept = valid_lanes(d_data, numel)
    assert kept[:, -4:].eq(0).all()
    assert_close(kept[:, :-4], torch.cat(d_state, dim=1), 5e-5, "d state")
    assert_close(actual_phi, d_phi, 5e-5, "d phi")


def test_the_gain_has_no_gradient_beyond_its_bounds(isa):
    """At 20 times the head, most gains are cut: a wrong mask would show."""
    net = normalized_network(hidden_size=20)
    with torch.no_grad():
        net.weight_out[0] *= 20
    g = drifting_gradients(4, 300)
    state, common = warm_states(net, g[:3]), common_of(net, 1)
    d_phi = []
    for dtype in (torch.float32, torch.float64):
        phi = phi_of(net).to(dtype).requires_grad_()
        if dtype is torch.float32:
            out, _ = ops.step(g[3].float(), None, state.data, phi, net.config, ages=[4], **common)
        else:
            out, _ = exact_step(net, g[3].float(), state, common["tensor_inputs"][0], common["nominal"][0], phi)
        d_phi += torch.autograd.grad((out.reshape(-1) * torch.linspace(-1, 1, 300)).sum(), phi)
    assert_close(d_phi[0], d_phi[1], 1e-4)


def segment_of(net, steps, sizes, ages, decades=3.0):
    places, place = [], 1
    for n in sizes:
        places.append(place)
        place += num_tiles(n)
    grads = [drifting_gradients(steps + 1, n, decades, seed=k).float() for k, n in enumerate(sizes)]
    records = []
    for t in range(steps + 1):
        record = torch.full((64 * (place + 1),), math.nan)
        for k, n in enumerate(sizes):
            record[64 * places[k] :][:n] = grads[k][t]
        records.append(record)
    random = torch.Generator().manual_seed(1)
    coefficients = [(torch.rand(steps, generator=random) + 0.5).tolist() for _ in range(3)]
    starts = [random_state(net, n, seed=k) for k, n in enumerate(sizes)]
    starts = [l2l.State(s.data, s.numel, s.hidden_size, s.num_layers, 4, age - 1) for s, age in zip(starts, ages)]
    return places, grads, records, coefficients, starts


@pytest.mark.parametrize("steps", [1, 3, 40])
@EVERY
def test_segment_backward(isa, options, steps):
    net = normalized_network(**options)
    if steps > 3 and net.hidden_size != 20:
        pytest.skip("one size is enough for a segment of several chunks")
    sizes, ages = [70, 1, 64, 200], [1, 5, 300, 2]
    places, grads, records, coefficients, starts = segment_of(net, steps, sizes, ages)
    common, ends = common_of(net, steps, len(sizes)), [random_state(net, n, seed=9) for n in sizes]
    grad_phi, grad_starts = ops.segment_backward(
        [s.data for s in starts], sizes, places, records, [], *coefficients, phi_of(net), net.config, 1,
        [end.data for end in ends], True, ages=ages, **common,
    )  # fmt: skip
    expected, expected_starts = reference.segment_backward(
        [s.to(torch.float64).to_logical() for s in starts],
        [[grads[k][t].double() for k in range(len(sizes))] for t in range(steps + 1)],
        *coefficients,
        phi_of(net).double(),
        net.config,
        [end.to(torch.float64).to_logical() for end in ends],
        **common,
    )
    assert_close(grad_phi, expected, 1e-4, "d phi")
    if net.tensor_inputs:
        inputs = 4 * net.hidden_size * net.tensor_inputs
        assert_close(grad_phi[-inputs:], expected[-inputs:], 1e-4, "d weight_tensor")
    for k, n in enumerate(sizes):
        actual = valid_lanes(grad_starts[k], n)
        assert_close(actual, valid_lanes(l2l.State.from_logical(expected_starts[k]).data, n), 1e-4, f"d start {k}")
        assert actual[:, -4:].eq(0).all()


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_threads(threads):
    net, sizes, ages = normalized_network(hidden_size=20), [5000, 1, 3001], [1, 5, 9]
    common, steps = common_of(net, 6, 3), 6
    places, grads, records, coefficients, starts = segment_of(net, steps, sizes, ages)

    def results():
        params, states = [torch.zeros(n) for n in sizes], [s.data.clone() for s in starts]
        first = {name: rows[0].contiguous() for name, rows in common.items()}
        run_step(net, params, [g[0] for g in grads], states, first, ages)
        grad_phi, _ = ops.segment_backward(
            [s.data for s in starts], sizes, places, records, [], *coefficients, phi_of(net), net.config,
            ages=ages, **common,
        )  # fmt: skip
        return [*params, *(valid_lanes(state, n) for state, n in zip(states, sizes, strict=True)), grad_phi]

    torch.set_num_threads(1)
    expected = results()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


# ---- autograd ----


def test_autograd_through_the_network():
    """Two steps of the module in float32 and in float64, and a second derivative."""
    net = normalized_network()
    g, common = drifting_gradients(2, 9, decades=1), common_of(net, 1)
    given = {name: rows[0] for name, rows in common.items()}
    results = []
    for dtype in (torch.float32, torch.float64):
        state, total = net.init_state(9, dtype=dtype), 0.0
        for t in range(2):
            update, state = net(g[t].to(dtype).requires_grad_(), state, **given)
            total = total + (update * torch.linspace(-1, 2, 9)).sum()
        weights = [p for name, p in net.named_parameters() if name != "weight_nominal"]  # that is a constant
        first = torch.autograd.grad(total, weights, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), weights)
        results.append([*first, *second])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-4)


def test_fake_tensors_and_the_meta_device():
    net = normalized_network()
    grad, state = torch.randn(7), net.init_state(7)
    compiled = torch.compile(
        lambda grad, data, phi, inputs: ops.step(
            grad, None, data, phi, net.config, ages=[1], tensor_inputs=inputs, nominal=None
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    inputs = torch.randn(1, 3)
    actual = compiled(grad, state.data, net.phi(), inputs)
    expected = ops.step(grad, None, state.data, net.phi(), net.config, ages=[1], tensor_inputs=inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    out, new = ops.step(
        grad.to("meta"), None, state.data.to("meta"), net.phi().to("meta"), net.config, ages=[1],
        tensor_inputs=inputs.to("meta"),
    )  # fmt: skip
    assert out.shape == (1, 7) and new.shape == state.data.shape


def test_a_compiled_step_serves_every_age():
    import torch._dynamo.testing  # not a part of torch before something asks for it

    net, counter = normalized_network(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    states = [net.init_state(70), net.init_state(70)]
    for t, g in enumerate(drifting_gradients(12, 70).float()):
        actual, states[0] = compiled(g, states[0].detach(), tensor_inputs=[0.1, 0.2, 0.3])
        expected, states[1] = net(g, states[1].detach(), tensor_inputs=[0.1, 0.2, 0.3])
        assert torch.equal(actual, expected) and states[0].age == t + 1
    assert counter.frame_count <= 4


def test_opcheck():
    net = normalized_network()
    common, phi = common_of(net, 1), net.phi().detach().requires_grad_()
    arguments = (torch.randn(7), None, net.init_state(7).data, phi, *net.config.arguments, 1)
    torch.library.opcheck(torch.ops.l2l_fast.step.default, arguments, {"ages": [3], **common})


# ---- refusals, before anything is written ----


def good_arguments(net):
    return {
        "params": [torch.ones(4), torch.ones(6)],
        "grads": [torch.ones(4), torch.ones(6)],
        "states": [net.init_state(4).data, net.init_state(6).data],
        "common": common_of(net, 2),
        "ages": [1, 2],
    }


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ages": [1]}, ValueError, r"ages: expected 2 numbers \(one a tensor.*got 1"),
        ({"ages": []}, ValueError, "ages: expected 2 numbers"),
        ({"ages": [1, 0]}, ValueError, r"ages\[1\]: expected a number of steps >= 1, got 0"),
        ({"num_problems": 2}, ValueError, "num_problems: expected 1 for a network with averages"),
        ({"tensor_inputs": None}, ValueError, r"tensor_inputs: expected a tensor of shape \[2, 3\], got None"),
        ({"tensor_inputs": torch.ones(2, 4)}, ValueError, r"tensor_inputs: expected shape \[2, 3\], got \[2, 4\]"),
        ({"tensor_inputs": torch.ones(1, 2, 3)}, ValueError, r"tensor_inputs: expected shape \[2, 3\]"),
        ({"tensor_inputs": torch.ones(3, 2).t()}, ValueError, "tensor_inputs: expected a contiguous tensor"),
        ({"tensor_inputs": torch.ones(2, 3).double()}, TypeError, "tensor_inputs: expected dtype float32"),
        ({"nominal": torch.ones(2, 4)}, ValueError, r"nominal: expected shape \[2, 5\], got \[2, 4\]"),
        ({"nominal": torch.ones(2, 5, device="meta")}, ValueError, "nominal: expected device cpu"),
        ({"states": [torch.zeros(1, 32, 64)] * 2}, ValueError, r"states\[0\]: expected shape \[1, 36, 64\]"),
    ],
)
def test_the_step_refuses(changed, error, message):
    net = normalized_network()
    given = good_arguments(net)
    common = {**given.pop("common"), **{k: v for k, v in changed.items() if k in ("tensor_inputs", "nominal")}}
    options = {k: v for k, v in changed.items() if k == "num_problems"}
    given.update({k: v for k, v in changed.items() if k in given})
    before = [[x.clone() for x in given[name]] for name in ("params", "states")]
    with pytest.raises(error, match=message):
        run_step(net, given["params"], given["grads"], given["states"], common, given["ages"], **options)
    for name, tensors in zip(("params", "states"), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(given[name], tensors, strict=True))


@pytest.mark.parametrize("name", ["tensor_inputs", "nominal"])
def test_what_is_written_may_not_be_shared_with_what_is_read(name):
    net = normalized_network()
    given = good_arguments(net)
    common = given.pop("common")
    shared = torch.zeros(common[name].numel())
    common[name] = shared.view(common[name].shape)
    given["params"][0] = shared[:4]
    with pytest.raises(ValueError, match=f"{name}: expected memory of its own, .*shared with params"):
        run_step(net, given["params"], given["grads"], given["states"], common, given["ages"])


def test_the_segment_refuses():
    net, sizes, ages = normalized_network(), [5, 6], [1, 1]
    places, _, records, coefficients, starts = segment_of(net, 2, sizes, ages)

    def run(ages=(1, 1), **changed):
        common = {**common_of(net, 2, 2), **changed}
        ops.segment_backward(
            [s.data for s in starts], sizes, places, records, [], *coefficients, phi_of(net), net.config, ages=ages,
            **common,
        )  # fmt: skip

    run()
    with pytest.raises(ValueError, match=r"tensor_inputs: expected shape \[2, 2, 3\], got \[2, 3\]"):
        run(tensor_inputs=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"nominal: expected shape \[2, 2, 5\]"):
        run(nominal=torch.ones(3, 2, 5))
    with pytest.raises(ValueError, match="ages: expected 2"):
        run(ages=(1,))


def test_other_kinds_refuse_what_is_not_theirs():
    net = random_network(hidden_size=8)
    data, grad, phi = net.init_state(3).data, torch.ones(3), phi_of(net)
    for given, message in (
        ({"ages": [1]}, "ages: expected 0 numbers"),
        ({"tensor_inputs": torch.ones(1, 3)}, r"tensor_inputs: expected None for this network, got .* \[1, 3\]"),
        ({"nominal": torch.ones(1, 5)}, "nominal: expected None for this network"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.step(grad, None, data, phi, net.config, **given)


GOOD = (10.0, 0.1, 0.9, 0.9, 0.9, 0.9)


@pytest.mark.parametrize(
    ("sizes", "constants", "message"),
    [
        ((8, 2, 1, 0, 1), GOOD, "gac_cells: expected 0 for preprocess='normalized', got 1"),
        ((8, 2, 0, 2, 1), GOOD, "extra_inputs: expected 0 for preprocess='normalized', got 2"),
        ((8, 2, 0, 0, 2), GOOD, "num_outputs: expected 1 for preprocess='normalized', got 2"),
        ((8, 2, 0, 0, 1, 17), GOOD, "tensor_inputs: expected 0..16, got 17"),
        ((8, 2, 0, 0, 1, 1, 1), GOOD, "sizes: expected .* got 7 numbers"),
        ((8, 2, 0, 0, 1), (10.0, 0.1), "constants: expected p and output_scale and four betas, got 2 numbers"),
        ((8, 2, 0, 0, 1), (10.0, 0.1, 0.9, 1.0, 0.9, 0.9), r"betas\[1\]: expected a number in \[0.5, .*\], got 1"),
        ((8, 2, 0, 0, 1), (10.0, 0.1, 0.9, 0.9, 0.9, 0.1), r"betas\[3\]: expected a number in \[0.5, .*\], got 0.1"),
    ],
)
def test_configurations_that_do_not_go_together(sizes, constants, message):
    data = torch.zeros(1, 36, 64)
    with pytest.raises(ValueError, match=message):
        torch.ops.l2l_fast.step(torch.ones(3), None, data, torch.zeros(9), sizes, "normalized", constants, 1, [1])
