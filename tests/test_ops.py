"""The operators against the float64 reference: values and every gradient, for every instruction set.

Of plain networks and of those with averaging cells, extra inputs or several outputs alike.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from l2l_fast.kernels.state import TILE, num_tiles
from tests.gac_helpers import KINDS, every_kind, extra_for, shared_state
from tests.helpers import (
    assert_close,
    double,
    phi_of,
    random_network,
    random_state,
    structured_gradient,
)
from tests.ops_helpers import (
    ALL_CONFIGS,
    ALL_IDS,
    LOW_PRECISION,
    TOLERANCE,
    averages_of,
    in_phases,
    reference_vjp,
    segment_inputs,
    states_of,
    step_inputs,
    valid_lanes,
)

# ---- functional step ----


@pytest.mark.parametrize("options", ALL_CONFIGS, ids=ALL_IDS)
@pytest.mark.parametrize(
    ("shape", "problems"),
    [((1,), 1), ((63,), 1), ((64,), 2), ((13, 5), 1), ((130,), 1), ((4, 33), 4), ((3, 65), 3), ((200, 5), 2)],
)
def test_step_and_its_gradients(options, shape, problems, isa):
    if shape == (200, 5) and options["hidden_size"] > 20:
        shape = (40, 5)  # the float64 reference of a wide network takes its time
    net, numel = random_network(**options), math.prod(shape)
    grad, state, extra = structured_gradient(shape), shared_state(net, numel, problems), extra_for(net, shape)
    grad_out = structured_gradient((net.num_outputs, *shape), seed=5)
    grad_new = random_state(net, numel, seed=6).data
    for data in (state.data, grad_new):  # padding may hold anything
        data[-1, :, (numel - 1) % TILE + 1 :] = 100.0
    expected = reference_vjp(net, grad, extra, state, grad_out, grad_new, problems)

    out, new_state = ops.step(grad, extra, state.data, phi_of(net), net.config, problems)
    grads = ops.step_backward(grad_out, grad_new, grad, extra, state.data, phi_of(net), net.config, problems)
    assert out.dtype == torch.float32 and out.shape == (net.num_outputs, *shape) and out.is_contiguous()
    assert new_state.shape == state.data.shape and grads[0].dtype == grad.dtype
    assert_close(out, expected[0], TOLERANCE, "out")
    assert_close(valid_lanes(new_state, numel), valid_lanes(expected[1], numel), TOLERANCE, "new state")
    assert_close(grads[0], expected[2], TOLERANCE, "d grad")
    assert_close(grads[1], expected[3], TOLERANCE, "d extra")
    assert_close(valid_lanes(grads[2], numel), valid_lanes(expected[4], numel), TOLERANCE, "d state")
    assert_close(grads[3], expected[5], TOLERANCE, "d phi")


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_low_precision(dtype, options, isa):
    net = random_network(**options)
    grad, state, extra = structured_gradient((13, 11), dtype=dtype), random_state(net, 143), extra_for(net, (13, 11))
    grad_out, zeros = torch.randn(net.num_outputs, 13, 11), torch.zeros_like(state.data)
    expected = reference_vjp(net, grad, extra, state, grad_out, zeros)
    out, new_state = ops.step(grad, extra, state.data, phi_of(net), net.config)
    grads = ops.step_backward(grad_out, zeros, grad, extra, state.data, phi_of(net), net.config)
    assert out.dtype == torch.float32 and grads[0].dtype == dtype
    assert_close(out, expected[0], TOLERANCE, "out")  # float32 inside
    assert_close(valid_lanes(new_state, 143), valid_lanes(expected[1], 143), TOLERANCE, "new state")
    finite = expected[2].abs() < torch.finfo(dtype).max  # e^p times a gradient may leave the range of float16
    assert_close(grads[0][finite], expected[2][finite], LOW_PRECISION[dtype], "d grad")
    assert_close(grads[3], expected[5], TOLERANCE, "d phi")


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


@every_kind
@pytest.mark.parametrize("name", list(layouts()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(name, dtype, options, isa):
    net = random_network(**options)
    grad = layouts()[name]
    if dtype != torch.float32:
        grad = grad.to(dtype)
    plain = grad.resolve_neg().clone(memory_format=torch.contiguous_format)
    state, extra = random_state(net, grad.numel()), extra_for(net, tuple(grad.shape))
    out, new_state = ops.step(grad, extra, state.data, phi_of(net), net.config)
    expected, expected_state = ops.step(plain, extra, state.data, phi_of(net), net.config)
    assert out.is_contiguous()
    assert torch.equal(out, expected) and torch.equal(new_state, expected_state)
    upstream = torch.randn(out.shape), torch.zeros_like(state.data)
    grads = ops.step_backward(*upstream, grad, extra, state.data, phi_of(net), net.config)
    expected_grads = ops.step_backward(*upstream, plain, extra, state.data, phi_of(net), net.config)
    assert all(g.is_contiguous() and g.dtype == e.dtype for g, e in zip(grads, expected_grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@every_kind
@pytest.mark.parametrize("name", list(layouts()))
def test_upstream_gradients_of_any_strides(name, options, isa):
    """Backward through the step makes them contiguous; the operator itself wants them so."""
    net, layout = random_network(**options), layouts()[name]
    grad, state = structured_gradient(tuple(layout.shape), seed=9), random_state(net, layout.numel())
    extra = extra_for(net, tuple(layout.shape))
    grad_out = layout.unsqueeze(0).expand(net.num_outputs, *layout.shape)
    grad_new = torch.tensor(0.3).expand_as(state.data)
    dense = grad_out.resolve_neg().clone(memory_format=torch.contiguous_format), grad_new.contiguous()
    leaves = [None if x is None else x.clone().requires_grad_() for x in (grad, extra, state.data, phi_of(net))]
    result = ops.step(*leaves, net.config)
    inputs = [x for x in leaves if x is not None]
    expected = ops.step_backward(*dense, grad, extra, state.data, phi_of(net), net.config)
    expected = [e for e, x in zip(expected, leaves, strict=True) if x is not None]
    actual = torch.autograd.grad(result, inputs, [grad_out, grad_new])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_kind
def test_backward_of_a_sum(options):
    """Whose gradient is one number, expanded; the other result's is none at all."""
    net = random_network(**options)
    grad, state, extra = structured_gradient((7, 11)), random_state(net, 77).data, extra_for(net, (7, 11))
    ones, zeros = torch.ones(net.num_outputs, 7, 11), torch.zeros_like(state)
    for which, upstream in enumerate(((ones, zeros), (torch.zeros_like(ones), torch.ones_like(state)))):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (grad, extra, state, phi_of(net))]
        ops.step(*leaves, net.config)[which].sum().backward()
        expected = ops.step_backward(*upstream, grad, extra, state, phi_of(net), net.config)
        for leaf, value in zip(leaves, expected, strict=True):
            assert leaf is None or torch.equal(leaf.grad, value)


@pytest.mark.parametrize("options", [KINDS["plain"], KINDS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("numel_shape", [(0,), (3, 0, 2)])
def test_step_of_no_coordinates(options, numel_shape, isa):
    net = random_network(**options)
    grad, state, extra = torch.zeros(numel_shape), net.init_state(0).data, extra_for(net, numel_shape)
    out, new_state = ops.step(grad, extra, state, phi_of(net), net.config, 2)
    assert out.shape == (net.num_outputs, *numel_shape) and new_state.shape == state.shape
    grads = ops.step_backward(out, state, grad, extra, state, phi_of(net), net.config, 2)
    assert [g.shape for g in grads[:3]] == [grad.shape, (net.extra_inputs, *numel_shape), state.shape]
    assert torch.equal(grads[3], torch.zeros_like(phi_of(net)))


@pytest.mark.parametrize("preprocess", ["log_sign", "identity"])
def test_special_values_of_the_gradient(preprocess, isa):
    net = random_network(preprocess=preprocess)
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    threshold = math.exp(-10.0)
    values = [0.0, -0.0, tiny / 4, -tiny / 4, tiny, threshold * 0.999999, threshold, threshold * 1.000001, 1.0, -1.0]
    values += [1e10, -1e10, huge, -huge, math.inf, -math.inf]
    grad = torch.tensor(values)
    state = random_state(net, len(values))
    (update,), new_state = ops.step(grad, None, state.data, phi_of(net), net.config)
    expected, expected_state = reference.step(double(net), grad.double(), state.to(torch.float64).to_logical())
    assert expected.isfinite().all()  # saturated gates, even at infinity
    torch.testing.assert_close(update.double(), expected, rtol=2e-5, atol=2e-7)
    new_state = l2l.State(new_state, len(values), 20, 2).to_logical()
    for pair, pair_expected in zip(new_state, expected_state, strict=True):
        for part, part_expected in zip(pair, pair_expected, strict=True):
            torch.testing.assert_close(part.double(), part_expected, rtol=2e-5, atol=2e-6)
    zeros = torch.zeros_like(state.data)
    finite = grad[: len(values) - 2]
    grads = ops.step_backward(
        torch.ones(1, len(finite)), zeros, finite, None, random_state(net, len(finite)).data, phi_of(net), net.config
    )
    assert all(g.isfinite().all() for g in grads)


def test_a_nan_stays_in_its_coordinate(isa):
    net = random_network()
    grad = structured_gradient((200,))
    state = random_state(net, 200)
    (clean,), clean_state = ops.step(grad, None, state.data, phi_of(net), net.config)
    grad[77] = math.nan
    (update,), new_state = ops.step(grad, None, state.data, phi_of(net), net.config)
    others = torch.arange(200) != 77
    assert update[77].isnan()
    assert torch.equal(update[others], clean[others])
    lanes, clean_lanes = valid_lanes(new_state, 200), valid_lanes(clean_state, 200)
    assert torch.equal(lanes[others], clean_lanes[others])


# ---- in-place step ----


@pytest.mark.parametrize("options", ALL_CONFIGS, ids=ALL_IDS)
@pytest.mark.parametrize(("maximize", "recorded"), [(False, False), (False, True), (True, True)])
def test_step_in_place(options, maximize, recorded, isa):
    """Of all tensors at once: the averages run over all of them."""
    net = random_network(**options)
    params, grads, states = step_inputs(net)
    numels = [param.numel() for param in params]
    before = [param.clone() for param in params]
    old_grads = [grad.clone() for grad in grads]
    extra, total = extra_for(net, (sum(numels),)), sum(numels)
    joint = reference.join_states([s.to(torch.float64).to_logical() for s in states])
    outputs, new_joint = reference.lstm_step(
        reference.join([(-g if maximize else g).double().reshape(-1) for g in grads]),
        joint,
        phi_of(net).double(),
        net.config,
        1,
        None if extra is None else extra.double(),
    )
    outputs = outputs.view(net.num_outputs, total)
    expected = zip(reference.separate(outputs[0], numels), reference.separate_states(new_joint, numels), strict=True)
    record, tiles = None, []
    if recorded:  # places in another order than the tensors, with a gap
        sizes = [num_tiles(numel) for numel in numels]
        tiles = [1 + sum(sizes[k + 1 :]) for k in range(len(sizes))]
        record = torch.full((64 * (sum(sizes) + 2),), 7.0)
    out = torch.full((net.num_outputs, total), 7.0) if recorded or net.num_outputs > 1 else None
    averages = averages_of(net) if recorded or net.gac_cells else {}
    lr, weight_decay = 0.7, 0.05
    ops.step_(
        params,
        grads,
        [s.data for s in states],
        phi_of(net),
        net.config,
        lr,
        weight_decay,
        maximize,
        record=record,
        record_tiles=tiles,
        extra=extra,
        out=out,
        **averages,
    )
    for k, (update, state) in enumerate(expected):
        update = update.view(params[k].shape)
        theta = before[k].double() * (1 - lr * weight_decay) + lr * update
        tolerance = LOW_PRECISION[params[k].dtype] if params[k].dtype != torch.float32 else 1e-6
        assert_close(params[k], theta, tolerance, f"param {k}")
        # The step alone, so that a large parameter hides nothing.
        if params[k].dtype == torch.float32:
            moved = params[k].double() - before[k].double() * (1 - lr * weight_decay)
            assert_close(moved, lr * update, 1e-4, f"update {k}")
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
    if out is not None:
        assert_close(out, outputs, TOLERANCE, "out")
    if averages:
        for layer, (h, _) in enumerate(new_joint):
            assert_close(averages["means"][layer, 0], h[0, : net.gac_cells], TOLERANCE, f"means of layer {layer}")
        assert averages["sums"][1].eq(total).all()
        quotient = (averages["sums"][0] / total).float()
        assert torch.equal(quotient, averages["means"][-1])


@every_kind
def test_step_in_place_equals_the_functional_step_bit_for_bit(options, isa):
    """The last tile of 300 coordinates is not full, and none of its lanes is left out."""
    net = random_network(**options)
    # Of a state whose averages differ: else the in-place step may take them together, which rounds otherwise.
    grad, state, extra = structured_gradient((300,)), random_state(net, 300), extra_for(net, (300,))
    expected, new_state = ops.step(grad, extra, state.data, phi_of(net), net.config)
    param, out = torch.zeros(300), torch.empty(net.num_outputs, 300)
    ops.step_(
        [param], [grad], [state.data], phi_of(net), net.config, 1.0, 0.0, False, extra=extra, out=out,
        **averages_of(net),
    )  # fmt: skip
    assert torch.equal(param, expected[0]) and torch.equal(out, expected)
    assert torch.equal(valid_lanes(state.data, 300), valid_lanes(new_state, 300))


@every_kind
@pytest.mark.parametrize("num_layers", [1, 3])
def test_phases_of_a_step_give_the_bits_of_the_whole(options, num_layers, isa):
    """Also where nothing is exchanged between them, and the whole goes tile by tile."""
    net = random_network(num_layers=num_layers, **options)
    shapes, numels = [(2, 50), (130,), ()], [100, 130, 1]
    params, grads = [torch.randn(s) for s in shapes], [structured_gradient(s, seed=k) for k, s in enumerate(shapes)]
    states = [s.data for s in states_of(net, numels)]
    tensors = {"record": torch.zeros(64 * 6), "out": torch.zeros(net.num_outputs, 231)}
    if net.extra_inputs:
        tensors["extra"] = extra_for(net, (231,))
    if net.gac_cells:
        tensors |= averages_of(net)
    layers = net.num_layers
    whole = in_phases(net, (params, grads, states), [0, layers + 1], **tensors)
    # The last of them ends with an empty phase, which must write nothing a second time.
    for places in ([0, layers, layers + 1], [*range(layers + 2)], [0, 0, layers + 1], [0, layers + 1, layers + 1]):
        for a, b in zip(whole, in_phases(net, (params, grads, states), places, **tensors), strict=True):
            assert torch.equal(a, b), places


@pytest.mark.parametrize("problems", [1, 2])
@pytest.mark.parametrize(
    "options", [{"extra_inputs": 3}, {"num_outputs": 4}, KINDS["extra inputs and outputs"]], ids=str
)
def test_extra_inputs_and_outputs_without_averages(options, problems, isa):
    """Equal to the reference, with no means or sums given; and every tile by itself: bit for bit what it is alone."""
    net = random_network(hidden_size=9, num_layers=3, **options)
    params, grads, states = [torch.zeros(200)], [structured_gradient((200,))], random_state(net, 200)
    extra, out = extra_for(net, (200,)), torch.empty(net.num_outputs, 200)
    before = states.clone()
    options = {"extra": extra, "out": out, "num_problems": problems}
    ops.step_(params, grads, [states.data], phi_of(net), net.config, 1.0, 0.0, False, **options)
    expected, new = reference.lstm_step(
        grads[0].double(), before.to(torch.float64).to_logical(), phi_of(net).double(), net.config, 1,
        None if extra is None else extra.double(),
    )  # fmt: skip
    expected = expected.view(net.num_outputs, 200)
    assert_close(out, expected, TOLERANCE, "out")
    assert torch.equal(params[0], out[0])
    assert_close(valid_lanes(states.data, 200), torch.cat([x for pair in new for x in pair], 1), TOLERANCE, "state")
    for tile in range(4):
        part = slice(64 * tile, min(64 * tile + 64, 200))
        alone = None if extra is None else extra[:, part].contiguous()
        result, data = ops.step(grads[0][part], alone, before.data[tile : tile + 1], phi_of(net), net.config)
        assert torch.equal(result, out[:, part])
        numel = part.stop - part.start
        assert torch.equal(valid_lanes(data, numel), valid_lanes(states.data[tile : tile + 1], numel))


@every_kind
def test_step_in_place_bumps_versions(options):
    net = random_network(**options)
    tensors = {
        "param": torch.zeros(5), "state": net.init_state(5).data, "record": torch.empty(64),
        "out": torch.empty(net.num_outputs, 5), **averages_of(net), "grad": torch.ones(5), "phi": phi_of(net),
        "extra": extra_for(net, (5,)),
    }  # fmt: skip
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for check_only in (True, False):
        versions = {name: tensor._version for name, tensor in tensors.items()}
        ops.step_(
            [tensors["param"]], [tensors["grad"]], [tensors["state"]], tensors["phi"], net.config, 1.0, 0.0, False,
            record_tiles=[0], check_only=check_only,
            **{name: tensors[name] for name in ("record", "out", "means", "sums", "extra") if name in tensors},
        )  # fmt: skip
        for name, tensor in tensors.items():
            written = not check_only and name not in ("grad", "phi", "extra")
            assert tensor._version == versions[name] + written, name


@every_kind
def test_step_in_place_protects_autograd(options):
    net = random_network(**options)
    param = torch.zeros(5, requires_grad=True)
    arguments = ([param], [torch.ones(5)], [net.init_state(5).data], phi_of(net), net.config, 1.0, 0.0, False)
    tensors = {"extra": extra_for(net, (5,)), "out": torch.empty(net.num_outputs, 5), **averages_of(net)}
    with pytest.raises(RuntimeError, match="no_grad"):
        ops.step_(*arguments, **tensors)
    loss = (param.exp()).sum()  # saves its output, not param
    square = param.square().sum()  # saves param
    with torch.no_grad():
        ops.step_(*arguments, **tensors)
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@every_kind
@pytest.mark.parametrize("empty", ["no tensors", "no coordinates"])
def test_step_in_place_of_nothing(options, empty):
    """The sums over no coordinates are zero, for a process that has none of them takes part in adding them up."""
    net = random_network(**options)
    count = 0 if empty == "no tensors" else 2
    tensors = ([torch.zeros(0, 3)] * count, [torch.zeros(0, 3)] * count, [net.init_state(0).data] * count)
    averages, extra = averages_of(net), extra_for(net, (0,))
    out = torch.empty(net.num_outputs, 0)
    ops.step_(*tensors, phi_of(net), net.config, 1.0, 0.0, False, extra=extra, out=out, **averages)
    assert averages["sums"].eq(0).all()


# ---- determinism ----


@every_kind
def test_bit_identical_for_any_number_of_threads(options, isa):
    net = random_network(**options)
    numel, problems = 64 * 150 + 18, 2
    grad, state, extra = structured_gradient((numel,)), random_state(net, numel), extra_for(net, (numel,))
    sizes = [numel // 3 // 2 * 2, 700]
    places, records, _, weights, lrs, decays, starts, ends = segment_inputs(net, 3, sizes)
    means = [torch.rand(net.num_layers, problems, net.gac_cells) for _ in range(3)]
    upstream = torch.randn(net.num_outputs, numel), random_state(net, numel, 4).data
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        written = [*ops.step(grad, extra, state.data, phi_of(net), net.config, problems)]
        written += ops.step_backward(*upstream, grad, extra, state.data, phi_of(net), net.config, problems)
        param, own, out = torch.zeros(numel), state.data.clone(), torch.empty(net.num_outputs, numel)
        averages = averages_of(net, problems)
        ops.step_(
            [param], [grad], [own], phi_of(net), net.config, 1.0, 0.0, False, extra=extra, out=out,
            num_problems=problems, **averages,
        )  # fmt: skip
        written += [param, own, out, *averages.values()]
        if not net.extra_inputs:
            grad_phi, grad_start = ops.segment_backward(
                [s.data for s in starts], sizes, places, records, means, weights, lrs, decays, phi_of(net), net.config,
                problems, [s.data for s in ends], True,
            )  # fmt: skip
            written += [grad_phi, *grad_start]
        results.append(written)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_coordinate_does_not_depend_on_its_place(isa):
    net = random_network()
    grad = structured_gradient((200,))
    pairs = random_state(net, 200).to_logical()
    permutation = torch.randperm(200)
    moved = l2l.State.from_logical([(h[permutation], c[permutation]) for h, c in pairs])
    (update,), _ = ops.step(grad, None, l2l.State.from_logical(pairs).data, phi_of(net), net.config)
    (update_moved,), _ = ops.step(grad[permutation], None, moved.data, phi_of(net), net.config)
    assert torch.equal(update[permutation], update_moved)


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
