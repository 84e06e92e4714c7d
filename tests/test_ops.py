"""The operators against the float64 reference: values and every gradient, for every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from l2l_fast.kernels.state import TILE, num_tiles
from tests.helpers import (
    CONFIG_IDS,
    CONFIGS,
    assert_close,
    double,
    random_network,
    random_state,
    structured_gradient,
)

TOLERANCE = 2e-5
SIZES = [1, 63, 64, 65, 1000]
LOW_PRECISION = {torch.float32: TOLERANCE, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def phi_of(net: l2l.CoordinatewiseLSTM) -> Tensor:
    return net.phi().detach()


def reference_vjp(net, grad, state, grad_update, grad_new_state):
    """Update, new state and the gradients of <grad_update, update> + <grad_new_state, new state>, in float64."""
    phi = phi_of(net).double().requires_grad_()
    grad = grad.double().requires_grad_()
    data = state.data.double().requires_grad_()
    logical = l2l.State(data, grad.numel(), net.hidden_size, net.num_layers).to_logical()
    update, new = reference.lstm_step(grad, logical, phi, net.config)
    new_data = l2l.State.from_logical(new).data
    grads = torch.autograd.grad([update, new_data], [grad, data, phi], [grad_update.double(), grad_new_state.double()])
    return update, new_data, *grads


def valid_lanes(data: Tensor, numel: int) -> Tensor:
    """The coordinates of a blocked state without its padding."""
    return data.transpose(1, 2).reshape(-1, data.shape[1])[:numel]


# ---- functional step ----


@pytest.mark.parametrize("options", CONFIGS, ids=CONFIG_IDS)
@pytest.mark.parametrize("numel", SIZES)
def test_step_and_its_gradients(options, numel, isa):
    if numel == 1000 and options["hidden_size"] > 20:
        numel = 195  # the float64 reference of a wide network takes its time
    net = random_network(**options)
    shape = (numel // 5, 5) if numel % 5 == 0 else (numel,)
    grad, state = structured_gradient(shape), random_state(net, numel)
    state.data[-1, :, (numel - 1) % TILE + 1 :] = 100.0  # padding may hold anything
    grad_update = structured_gradient(shape, seed=5)
    grad_new = random_state(net, numel, seed=6).data
    grad_new[-1, :, (numel - 1) % TILE + 1 :] = 100.0
    expected = reference_vjp(net, grad, state, grad_update, grad_new)

    update, new_state = ops.lstm_step(grad, state.data, phi_of(net), *net.config)
    grads = ops.lstm_step_backward(grad_update, grad_new, grad, state.data, phi_of(net), *net.config)
    assert update.dtype == grad.dtype and update.shape == grad.shape and new_state.shape == state.data.shape
    assert_close(update, expected[0], TOLERANCE, "update")
    assert_close(valid_lanes(new_state, numel), valid_lanes(expected[1], numel), TOLERANCE, "new state")
    assert_close(grads[0], expected[2], TOLERANCE, "d grad")
    assert_close(valid_lanes(grads[1], numel), valid_lanes(expected[3], numel), TOLERANCE, "d state")
    assert_close(grads[2], expected[4], TOLERANCE, "d phi")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_low_precision(dtype, isa):
    net = random_network()
    grad, state = structured_gradient((13, 11), dtype=dtype), random_state(net, 143)
    grad_update = torch.randn(13, 11).to(dtype)
    zeros = torch.zeros_like(state.data)
    expected = reference_vjp(net, grad, state, grad_update, zeros)
    update, new_state = ops.lstm_step(grad, state.data, phi_of(net), *net.config)
    grads = ops.lstm_step_backward(grad_update, zeros, grad, state.data, phi_of(net), *net.config)
    assert update.dtype == grads[0].dtype == dtype
    assert_close(update, expected[0], LOW_PRECISION[dtype], "update")
    assert_close(valid_lanes(new_state, 143), valid_lanes(expected[1], 143), TOLERANCE, "new state")  # float32 inside
    finite = expected[2].abs() < torch.finfo(dtype).max  # e^p times a gradient may leave the range of float16
    assert_close(grads[0][finite], expected[2][finite], LOW_PRECISION[dtype], "d grad")
    assert_close(grads[2], expected[4], TOLERANCE, "d phi")


def layouts() -> dict[str, Tensor]:
    base = structured_gradient((4, 6, 5, 7))
    return {
        "scalar": structured_gradient(()),
        "transposed": structured_gradient((30, 41)).t(),
        "permuted": base.permute(2, 0, 3, 1),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "channels_last_3d": structured_gradient((2, 3, 4, 5, 3)).contiguous(memory_format=torch.channels_last_3d),
        "sliced": base[::2, 1:, ::3, 2:],
        "unaligned": structured_gradient((201,))[1:],
        "expanded": structured_gradient((5, 1, 7)).expand(5, 30, 7),
        "expanded scalar": structured_gradient(()).expand(70, 3),
        "flipped": structured_gradient((9, 31)).flip(1),
        "rank 5": structured_gradient((2, 3, 4, 3, 2)).transpose(0, 4),
        "one column": structured_gradient((130, 3))[:, 1],
        "negated view": torch._neg_view(structured_gradient((70,))),
    }


@pytest.mark.parametrize("name", list(layouts()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(name, dtype, isa):
    net = random_network()
    grad = layouts()[name]
    if dtype != torch.float32:
        grad = grad.to(dtype)
    plain = grad.resolve_neg().clone(memory_format=torch.contiguous_format)
    state = random_state(net, grad.numel())
    update, new_state = ops.lstm_step(grad, state.data, phi_of(net), *net.config)
    expected, expected_state = ops.lstm_step(plain, state.data, phi_of(net), *net.config)
    assert update.is_contiguous()
    assert torch.equal(update, expected) and torch.equal(new_state, expected_state)
    upstream = grad if name != "negated view" else grad * 0.5
    zeros = torch.zeros_like(state.data)
    grads = ops.lstm_step_backward(upstream, zeros, grad, state.data, phi_of(net), *net.config)
    plain_upstream = upstream.resolve_neg().clone(memory_format=torch.contiguous_format)
    expected_grads = ops.lstm_step_backward(plain_upstream, zeros, plain, state.data, phi_of(net), *net.config)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("preprocess", ["log_sign", "identity"])
def test_special_values_of_the_gradient(preprocess, isa):
    net = random_network(preprocess=preprocess)
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    threshold = math.exp(-10.0)
    values = [0.0, -0.0, tiny / 4, -tiny / 4, tiny, threshold * 0.999999, threshold, threshold * 1.000001, 1.0, -1.0]
    values += [1e10, -1e10, huge, -huge, math.inf, -math.inf]
    grad = torch.tensor(values)
    state = random_state(net, len(values))
    update, new_state = ops.lstm_step(grad, state.data, phi_of(net), *net.config)
    expected, expected_state = reference.step(double(net), grad.double(), state.to(torch.float64).to_logical())
    assert expected.isfinite().all()  # saturated gates, even at infinity
    torch.testing.assert_close(update.double(), expected, rtol=2e-5, atol=2e-7)
    new_state = l2l.State(new_state, len(values), 20, 2).to_logical()
    for pair, pair_expected in zip(new_state, expected_state, strict=True):
        for part, part_expected in zip(pair, pair_expected, strict=True):
            torch.testing.assert_close(part.double(), part_expected, rtol=2e-5, atol=2e-6)
    zeros = torch.zeros_like(state.data)
    finite = grad[: len(values) - 2]
    grads = ops.lstm_step_backward(
        torch.ones_like(finite), zeros, finite, random_state(net, len(finite)).data, phi_of(net), *net.config
    )
    assert all(g.isfinite().all() for g in grads)


def test_a_nan_stays_in_its_coordinate(isa):
    net = random_network()
    grad = structured_gradient((200,))
    state = random_state(net, 200)
    clean, clean_state = ops.lstm_step(grad, state.data, phi_of(net), *net.config)
    grad[77] = math.nan
    update, new_state = ops.lstm_step(grad, state.data, phi_of(net), *net.config)
    others = torch.arange(200) != 77
    assert update[77].isnan()
    assert torch.equal(update[others], clean[others])
    lanes, clean_lanes = valid_lanes(new_state, 200), valid_lanes(clean_state, 200)
    assert torch.equal(lanes[others], clean_lanes[others])


# ---- in-place step ----


def step_inputs(net: l2l.CoordinatewiseLSTM):
    """Parameters, gradients and states of many shapes, strides and dtypes, a zero-size and a 0-dim one among them."""
    shapes = [(3, 50), (), (0, 4), (64,), (2, 3, 4, 5), (65,), (1,), (129, 2)]
    params = [torch.randn(shape) for shape in shapes]
    grads = [structured_gradient(shape, seed=k) for k, shape in enumerate(shapes)]
    params[0] = torch.randn(50, 3).t()
    grads[4] = grads[4].contiguous(memory_format=torch.channels_last)
    params[3], grads[5] = params[3].bfloat16(), grads[5].half()
    params[7] = params[7].half()
    grads[7] = grads[7].bfloat16()
    states = [random_state(net, p.numel(), seed=20 + k) for k, p in enumerate(params)]
    return params, grads, states


@pytest.mark.parametrize("options", CONFIGS, ids=CONFIG_IDS)
@pytest.mark.parametrize(("maximize", "recorded"), [(False, False), (False, True), (True, True)])
def test_step_in_place(options, maximize, recorded, isa):
    net = random_network(**options)
    params, grads, states = step_inputs(net)
    before = [param.clone() for param in params]
    old_grads = [grad.clone() for grad in grads]
    expected = [
        reference.step(double(net), (-g if maximize else g).double(), s.to(torch.float64).to_logical())
        for g, s in zip(grads, states, strict=True)
    ]
    record, tiles = None, []
    if recorded:  # places in another order than the tensors, with a gap
        sizes = [num_tiles(p.numel()) for p in params]
        tiles = [1 + sum(sizes[k + 1 :]) for k in range(len(sizes))]
        record = torch.full((64 * (sum(sizes) + 2),), 7.0)
    lr, weight_decay = 0.7, 0.05
    ops.lstm_step_(
        params,
        grads,
        [s.data for s in states],
        phi_of(net),
        *net.config,
        lr,
        weight_decay,
        maximize,
        record,
        tiles,
    )
    for k, (update, state) in enumerate(expected):
        theta = before[k].double() * (1 - lr * weight_decay) + lr * update.double()
        tolerance = LOW_PRECISION[params[k].dtype] if params[k].dtype != torch.float32 else 1e-6
        assert_close(params[k], theta, tolerance, f"param {k}")
        # The step alone, so that a large parameter hides nothing.
        if params[k].dtype == torch.float32:
            moved = params[k].double() - before[k].double() * (1 - lr * weight_decay)
            assert_close(moved, lr * update.double(), 1e-4, f"update {k}")
        for pair, pair_expected in zip(states[k].to_logical(), state, strict=True):
            for part, part_expected in zip(pair, pair_expected, strict=True):
                assert_close(part, part_expected, TOLERANCE, f"state {k}")
        assert torch.equal(grads[k], old_grads[k])
        if record is not None:
            chunk = record[64 * tiles[k] :][: 64 * num_tiles(params[k].numel())]
            g = (-grads[k] if maximize else grads[k]).float().reshape(-1)
            assert torch.equal(chunk[: g.numel()], g) and chunk[g.numel() :].eq(0).all()
    if record is not None:
        assert record[:64].eq(7).all() and record[-64:].eq(7).all()


def test_step_in_place_equals_the_functional_step_bit_for_bit(isa):
    net = random_network()
    grad, state = structured_gradient((300,)), random_state(net, 300)
    update, new_state = ops.lstm_step(grad, state.data, phi_of(net), *net.config)
    param = torch.zeros(300)
    ops.lstm_step_([param], [grad], [state.data], phi_of(net), *net.config, 1.0, 0.0, False)
    assert torch.equal(param, update)
    assert torch.equal(valid_lanes(state.data, 300), valid_lanes(new_state, 300))


def test_step_in_place_bumps_versions():
    net = random_network()
    param, grad, state = torch.zeros(5), torch.ones(5), net.init_state(5).data
    record = torch.empty(64)
    versions = [x._version for x in (param, grad, state, record)]
    ops.lstm_step_([param], [grad], [state], phi_of(net), *net.config, 1.0, 0.0, False, record, [0])
    assert [x._version for x in (param, grad, state, record)] == [
        versions[0] + 1,
        versions[1],
        versions[2] + 1,
        versions[3] + 1,
    ]


def test_step_in_place_protects_autograd():
    net = random_network()
    param = torch.zeros(5, requires_grad=True)
    arguments = ([param], [torch.ones(5)], [net.init_state(5).data], phi_of(net), *net.config, 1.0, 0.0, False)
    with pytest.raises(RuntimeError, match="no_grad"):
        ops.lstm_step_(*arguments)
    loss = (param.exp()).sum()  # saves its output, not param
    square = param.square().sum()  # saves param
    with torch.no_grad():
        ops.lstm_step_(*arguments)
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


# ---- segment backward ----


def segment_inputs(net: l2l.CoordinatewiseLSTM, steps: int, sizes: list[int]):
    generator = torch.Generator().manual_seed(11)
    tiles = [num_tiles(n) for n in sizes]
    places = [1 + sum(tiles[k + 1 :]) for k in range(len(sizes))]
    records = []
    for t in range(steps + 1):
        record = torch.full((64 * (sum(tiles) + 2),), math.nan)  # what belongs to no tensor must not be read
        for k, n in enumerate(sizes):
            record[64 * places[k] : 64 * (places[k] + tiles[k])] = 0
            record[64 * places[k] :][:n] = structured_gradient((n,), seed=100 * t + k)
        records.append(record)
    grads = [[record[64 * places[k] :][:n].double() for k, n in enumerate(sizes)] for record in records]
    weights = (torch.rand(steps, generator=generator) * 2).tolist()
    lrs = (torch.rand(steps, generator=generator) + 0.5).tolist()
    decays = (1 - 0.1 * torch.rand(steps, generator=generator)).tolist()
    starts = [random_state(net, n, seed=k) for k, n in enumerate(sizes)]
    ends = [random_state(net, n, seed=50 + k) for k, n in enumerate(sizes)]
    return places, records, grads, weights, lrs, decays, starts, ends


@pytest.mark.parametrize("options", CONFIGS, ids=CONFIG_IDS)
@pytest.mark.parametrize(("steps", "injected"), [(1, True), (6, False), (6, True)])
def test_segment_backward(options, steps, injected, isa):
    net = random_network(gain=1.0, **options)
    sizes = [65, 1, 0, 128, 30]
    places, records, grads, weights, lrs, decays, starts, ends = segment_inputs(net, steps, sizes)
    for state in starts:  # padding may hold anything
        if state.numel % 64:
            state.data[-1, :, state.numel % 64 :] = 3.0
    wide = [s.to(torch.float64).to_logical() for s in ends]
    expected_phi, expected_start = reference.segment_backward(
        [s.to(torch.float64).to_logical() for s in starts],
        grads,
        weights,
        lrs,
        decays,
        phi_of(net).double(),
        net.config,
        wide if injected else None,
    )
    arguments = (
        [s.data for s in starts],
        sizes,
        places,
        records,
        weights,
        lrs,
        decays,
        phi_of(net),
        *net.config,
        [s.data for s in ends] if injected else [],
    )
    grad_phi, grad_start = ops.lstm_segment_backward(*arguments, True)
    assert_close(grad_phi, expected_phi, 1e-4, "d phi")
    for k, n in enumerate(sizes):
        logical = l2l.State(grad_start[k], n, net.hidden_size, net.num_layers).to_logical()
        for pair, pair_expected in zip(logical, expected_start[k], strict=True):
            for part, part_expected in zip(pair, pair_expected, strict=True):
                assert_close(part, part_expected, 1e-4, f"d start {k}")
    again, nothing = ops.lstm_segment_backward(*arguments, False)
    assert torch.equal(again, grad_phi) and nothing == []


# ---- determinism ----


def test_bit_identical_for_any_number_of_threads(isa):
    net = random_network()
    numel = 64 * 150 + 17
    grad, state = structured_gradient((numel,)), random_state(net, numel)
    places, records, _, weights, lrs, decays, starts, ends = segment_inputs(net, 3, [numel // 2, 700])
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        out = [*ops.lstm_step(grad, state.data, phi_of(net), *net.config)]
        out += ops.lstm_step_backward(grad, state.data, grad, state.data, phi_of(net), *net.config)
        param, own = torch.zeros(numel), state.data.clone()
        ops.lstm_step_([param], [grad], [own], phi_of(net), *net.config, 1.0, 0.0, False)
        out += [param, own]
        grad_phi, grad_start = ops.lstm_segment_backward(
            [s.data for s in starts], [numel // 2, 700], places, records, weights, lrs, decays, phi_of(net),
            *net.config, [], True,
        )
        results.append([*out, grad_phi, *grad_start])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_coordinate_does_not_depend_on_its_place(isa):
    net = random_network()
    grad = structured_gradient((200,))
    pairs = random_state(net, 200).to_logical()
    permutation = torch.randperm(200)
    moved = l2l.State.from_logical([(h[permutation], c[permutation]) for h, c in pairs])
    update, _ = ops.lstm_step(grad, l2l.State.from_logical(pairs).data, phi_of(net), *net.config)
    update_moved, _ = ops.lstm_step(grad[permutation], moved.data, phi_of(net), *net.config)
    assert torch.equal(update[permutation], update_moved)


# ---- errors ----


def step_arguments():
    net = l2l.CoordinatewiseLSTM(hidden_size=4, num_layers=1)
    return {
        "params": [torch.zeros(5), torch.zeros(70)],
        "grads": [torch.ones(5), torch.ones(70)],
        "states": [net.init_state(5).data, net.init_state(70).data],
        "phi": phi_of(net),
        **net.config._asdict(),
        "lr": 1.0,
        "weight_decay": 0.0,
        "maximize": False,
        "record": torch.zeros(192),
        "record_tiles": [0, 1],
    }


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("grads", [torch.ones(5)], ValueError),
        ("grads", [torch.ones(5), torch.ones(71)], ValueError),
        ("grads", [torch.ones(5), torch.ones(70, dtype=torch.int32)], TypeError),
        ("grads", [torch.ones(5), torch.ones(70, dtype=torch.float64)], TypeError),
        ("grads", [torch.ones(5), torch.ones(70, dtype=torch.complex64)], TypeError),
        ("grads", [torch.ones(5), torch.ones(70).to_sparse()], TypeError),
        ("params", [torch.zeros(5), torch.zeros(70, dtype=torch.float64)], TypeError),
        ("params", [torch.zeros(5), torch.zeros(1).expand(70)], ValueError),
        ("states", [torch.zeros(1, 8, 64)], ValueError),
        ("states", [torch.zeros(1, 8, 64), torch.zeros(1, 8, 64)], ValueError),
        ("states", [torch.zeros(1, 8, 64), torch.zeros(2, 64, 8).transpose(1, 2)], ValueError),
        ("states", [torch.zeros(1, 8, 64), torch.zeros(2, 8, 64).double()], TypeError),
        ("phi", torch.zeros(3), ValueError),
        ("phi", torch.zeros(117).double(), TypeError),
        ("hidden_size", 100, ValueError),
        ("num_layers", 9, ValueError),
        ("preprocess", "sqrt", ValueError),
        ("p", -1.0, ValueError),
        ("output_scale", math.nan, ValueError),
        ("record", torch.zeros(191), ValueError),
        ("record", torch.zeros(192, dtype=torch.float64), TypeError),
        ("record_tiles", [0], ValueError),
        ("record_tiles", [0, 2], ValueError),
        ("record_tiles", [-1, 1], ValueError),
    ],
)
def test_step_in_place_rejects_before_writing(name, value, error):
    arguments = step_arguments()
    arguments[name] = value
    kept = [t.clone() for t in (*arguments["params"], *arguments["states"], arguments["record"])]
    # p is one letter: look for it at the start of the message.
    with pytest.raises(error, match=rf"^{name}|record_tiles" if name == "record" else rf"^{name}"):
        ops.lstm_step_(**arguments)
    for tensor, old in zip((*arguments["params"], *arguments["states"], arguments["record"]), kept, strict=True):
        assert tensor.is_sparse or torch.equal(tensor, old)


def test_unknown_device_is_named():
    with pytest.raises(NotImplementedError, match=r"no kernel for device 'xla'.*\['cpu'"):
        ops.require_kernel("lstm_step", torch.device("xla"))


# ---- elementary functions ----


@pytest.mark.parametrize(
    ("name", "low", "high", "function"),
    [
        ("exp2", -125.0, 127.0, torch.exp2),
        ("log", 1e-37, 3e38, torch.log),
        ("sigmoid_scaled", -100.0, 100.0, lambda a: torch.sigmoid(-a * math.log(2))),
        ("tanh_scaled", -60.0, 60.0, lambda a: torch.tanh(a * math.log(2) / 2)),
    ],
)
def test_elementary_functions(name, low, high, function, isa):
    if name == "log":
        x = torch.logspace(math.log10(low), math.log10(high), 50001)
    else:
        x = torch.cat([torch.linspace(low, high, 50001), torch.linspace(-1, 1, 20001), torch.logspace(-30, 0, 5001)])
    y = ops.vector_math(name, x)
    exact = function(x.double())
    # In units of the last place of the exact result.
    spacing = (torch.nextafter(exact.float().abs(), torch.tensor(math.inf)) - exact.float().abs()).double()
    ulps = (y.double() - exact).abs() / spacing
    assert ulps.max() <= 4.0, f"{float(ulps.max()):.1f} ulp at {float(x[ulps.argmax()])}"
    assert ops.vector_math(name, torch.tensor([math.nan])).isnan().all()
