"""Networks with normalized inputs through the reference: the mathematics, the state, the configuration, files."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.kernels import normalized, reference
from l2l_fast.kernels.state import Averages
from tests.helpers import assert_close, double, random_state, structured_gradient
from tests.normalized_helpers import drifting_gradients, normalized_network

COMMON = {"tensor_inputs": [0.3, -1.2, 0.5], "nominal": [0.2, 0.3, -0.1, 0.4, 0.7]}


def averaged(g: torch.Tensor, betas) -> Averages:
    averages = Averages(torch.zeros(g.shape[1], 4, dtype=g.dtype), 0)
    for row in g:
        averages = normalized.advance(row, averages, betas)
    return averages


# ---- the mathematics ----


def test_averages_are_the_sums_that_they_are_said_to_be():
    g, betas = drifting_gradients(30, 5), (0.9, 0.99, 0.95, 0.999)
    averages = averaged(g, betas)
    assert averages.age == 30
    for k, beta in enumerate(betas):
        weights = (1 - beta) * beta ** torch.arange(29, -1, -1, dtype=torch.float64)
        expected = weights @ (g if k < 2 else g.square())
        assert_close(averages.rows[:, k], expected if k < 2 else expected.sqrt(), 1e-13, str(k))


def test_features_by_hand():
    betas = (0.8, 0.9, 0.5, 0.75)
    g = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 1e-3]], dtype=torch.float64)
    x = normalized.features(g[1], averaged(g, betas), betas)
    m1, m2 = (0.2 * 0.8 + 0.2 * 3) / (1 - 0.64), (0.1 * 0.9 + 0.1 * 3) / (1 - 0.81)
    v1, v2 = (0.25 + 0.5 * 9) / 0.75, (0.25 * 0.75 + 0.25 * 9) / (1 - 0.5625)
    q = math.sqrt(v1)
    expected = [3 / q, m1 / q, m2 / q, m1 * m2 / v1 / 5, 0.5 * math.log(v1 / v2)]
    assert x[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert x[1].tolist() == [0.0] * 5  # zero from the start


def test_features_have_no_scale_and_are_bounded():
    g = drifting_gradients(40, 20)
    betas = normalized_network().betas
    x = normalized.features(g[-1], averaged(g, betas), betas)
    for scale in (1e-20, 1e20):
        assert_close(normalized.features(scale * g[-1], averaged(scale * g, betas), betas), x, 1e-9)
    spike = torch.zeros(400, 2, dtype=torch.float64)
    spike[0], spike[399, 1] = 1e30, 1e-35  # the mean of the first outlives its root mean square
    x = normalized.features(spike[-1], averaged(spike, betas), betas)
    assert x.isfinite().all() and x[:, :4].abs().max() <= 5 and x[:, 4].abs().max() <= 3
    assert x[:, 2].eq(5).all() and x[:, 4].eq(-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_extreme_gradients_are_finite_and_a_nan_stays_where_it_is(dtype):
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    g = torch.tensor([0.0, -0.0, tiny / 8, -tiny, huge, -huge, math.inf, -math.inf, math.nan, 1.0], dtype=dtype)
    betas, averages = normalized_network().betas, Averages(torch.zeros(10, 4, dtype=dtype), 0)
    for _ in range(3):
        averages = normalized.advance(g, averages, betas)
        x = normalized.features(g, averages, betas)
        n = normalized.direction(g, averages, betas, torch.tensor([0.1, 5.0, -5.0, 3.0, 0.5]))
        assert x.isfinite().all(1).tolist() == [True] * 8 + [False, True] == n.isfinite().tolist()
        assert x[:2].eq(0).all() and x[2].abs().max() < 1e-7 and averages.rows[4:8].isfinite().all()
    assert_close(x[4], x[9], 1e-6)


def test_the_update_by_hand_and_its_bound():
    net = double(normalized_network(output_scale=0.5))
    config = net.config
    g = drifting_gradients(7, 11, decades=1)
    averages = averaged(g, config.betas)
    hats = [row / (1 - beta**7) for row, beta in zip(averages.rows.unbind(1)[:2], config.betas)]
    roots = [row / (1 - beta**7) ** 0.5 for row, beta in zip(averages.rows.unbind(1)[2:], config.betas[2:])]
    gain, mu, nu, lam, correction = COMMON["nominal"]
    nominal = torch.tensor(COMMON["nominal"], dtype=torch.float64)
    direction = hats[0] + mu * (hats[1] - hats[0]) + nu * (g[-1] - hats[0])
    n = -direction / (roots[1] + 1e-8) * (roots[1] / roots[0]) ** lam
    assert_close(normalized.direction(g[-1], averages, config.betas, nominal), n, 1e-12)
    head = torch.randn(11, 2, dtype=torch.float64)
    expected = 0.5 * ((head[:, 0] + gain).exp() * n + correction * head[:, 1].tanh())
    assert_close(normalized.update(head, n, nominal, 0.5), expected, 1e-12)
    for a in (-1e9, 1e9):
        far = normalized.update(torch.full((11, 2), a, dtype=torch.float64), 1e9 * n.clamp(-1, 1) / 1e9, nominal, 0.5)
        assert far.abs().max() <= 0.5 * (math.exp(3) + 0.7)
    wild = normalized.direction(g[-1], averages, config.betas, torch.tensor([0.0, 1e9, -1e9, 9.0, 0.5]))
    assert wild.abs().max() == 20


def adam_and_network(net, g, **common):
    """The largest difference between updates of torch's Adam and of the network, over steps and coordinates."""
    param = torch.nn.Parameter(torch.zeros_like(g[0]))
    adam = torch.optim.Adam([param], lr=net.output_scale, betas=(net.betas[0], net.betas[3]), eps=1e-8)
    state, worst = net.init_state(g.shape[1], dtype=g.dtype), 0.0
    for row in g:
        before = param.detach().clone()
        param.grad = row.clone()
        adam.step()
        with torch.no_grad():
            update, state = net(row, state, **common)
            worst = max(worst, float((update - (param - before)).abs().max()))
    return worst


@pytest.mark.parametrize("betas", [None, (0.5, 0.8, 0.9, 0.95)])
def test_a_new_network_is_adam(betas):
    net = l2l.CoordinatewiseLSTM(8, 2, "normalized", output_scale=1.0, tensor_inputs=3, betas=betas)
    net = double(net)
    assert adam_and_network(net, drifting_gradients(400, 60, decades=12), tensor_inputs=COMMON["tensor_inputs"]) < 1e-12
    other = dict(COMMON, nominal=[0.0, 0.1, 0.0, 0.0, 0.5])
    assert adam_and_network(net, drifting_gradients(40, 60), **other) > 1e-2


# ---- derivatives ----


def test_no_gradient_goes_through_features_and_averages():
    net = double(normalized_network())
    state = random_state(net, 9, dtype=torch.float64)
    grad = structured_gradient((9,), dtype=torch.float64).requires_grad_()
    data = state.data.clone().requires_grad_()
    update, new = net(grad, state._like(data), **COMMON)
    update, new = net(2 * grad, new, **COMMON)
    from_grad, from_state = torch.autograd.grad(
        update.square().sum(), [grad, data], materialize_grads=True, allow_unused=True
    )
    assert from_grad.eq(0).all() and from_state[:, -4:].eq(0).all() and from_state[:, :-4].abs().sum() > 0


def test_derivatives_against_finite_differences():
    config = l2l.Config(4, 2, "normalized", 10.0, 0.7, tensor_inputs=2, betas=(0.8, 0.9, 0.9, 0.99))
    phi = torch.randn(reference.phi_size(config), dtype=torch.float64).mul_(0.5).requires_grad_()
    grad = torch.tensor([0.3, -2.0, 1e-2, 0.0, 4e3], dtype=torch.float64)
    averages = averaged(drifting_gradients(3, 5), config.betas)
    parts = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    common = [torch.tensor([0.5, -1.0]).double(), torch.tensor(COMMON["nominal"]).double()]

    def function(phi, h0, c0, h1, c1):
        state = [(h0, c0), (h1, c1), averages]
        for g in (grad, -0.5 * grad):
            update, state = reference.lstm_step(g, state, phi, config, 1, None, *common)
        return update, *state[0], *state[1]

    assert torch.autograd.gradcheck(function, (phi, *parts))


def test_segment_of_the_reference_is_the_unrolled_network():
    net, steps = double(normalized_network()), 4
    config, phi = net.config, net.phi().detach()
    sizes, ages = (5, 3), (0, 7)
    g = [[drifting_gradients(steps + 1, n)[t] for n in sizes] for t in range(steps + 1)]
    g[2][1] = None  # did not move: it does not age either
    starts = []
    for n, age in zip(sizes, ages):
        *pairs, averages = random_state(net, n, dtype=torch.float64).to_logical()
        starts.append([*pairs, averages._replace(age=age)])
    inputs = torch.randn(steps, 2, 3, dtype=torch.float64)
    nominal = torch.rand(steps, 2, 5, dtype=torch.float64)
    w, lrs, decays = [1.0, 2.0, 0.5, 3.0], [0.5, 0.6, 0.7, 0.8], [1.0, 0.9, 0.8, 0.95]
    leaf, loss = phi.clone().requires_grad_(), 0.0
    for k in range(2):
        theta, state = torch.zeros(sizes[k], dtype=torch.float64), starts[k]
        for t in range(steps):
            if g[t][k] is not None:
                update, state = reference.lstm_step(g[t][k], state, leaf, config, 1, None, inputs[t, k], nominal[t, k])
                theta = decays[t] * theta + lrs[t] * update
            if g[t + 1][k] is not None:
                loss = loss + w[t] * (g[t + 1][k] * theta).sum()
        assert state[-1].age == ages[k] + (steps if k == 0 else steps - 1)
    loss.backward()
    actual, grad_starts = reference.segment_backward(
        starts, g, w, lrs, decays, phi, config, tensor_inputs=inputs, nominal=nominal
    )
    assert_close(actual, leaf.grad, 1e-12)
    assert grad_starts[1][-1].rows.eq(0).all() and grad_starts[1][-1].age == 7


# ---- state ----


def test_state_keeps_averages_and_age():
    net = normalized_network()
    state = net.init_state(64)
    assert (state.averages, state.age, state.data.shape[1]) == (4, 0, 2 * 2 * 8 + 4)
    _, state = net(structured_gradient((64,)), state, **COMMON)
    state = state.detach()
    assert state.age == 1 and net(structured_gradient((64,)), state, **COMMON)[1].age == 2
    for other in (state.clone(), state.detach(), state.to(torch.float32), copy.deepcopy(state)):
        assert (other.averages, other.age) == (4, 1) and torch.equal(other.data, state.data)
    again = l2l.State.from_logical(state.to_logical())
    assert again.age == 1 and torch.equal(again.data, state.data)
    leaves, spec = torch.utils._pytree.tree_flatten(state)
    assert torch.utils._pytree.tree_unflatten(leaves, spec).age == 1
    assert "averages=4, age=1" in repr(state) and "age" not in repr(l2l.CoordinatewiseLSTM().init_state(3))
    with pytest.raises(ValueError, match="state: expected .*averages=4, got"):
        net(torch.zeros(64), l2l.State.zeros(64, 8, 2))
    with pytest.raises(ValueError, match="logical_state: expected averages"):
        reference.step(net, torch.zeros(64), state.to_logical()[:-1])
    with pytest.raises(ValueError, match="age: expected"):
        l2l.State(torch.zeros(1, 32, 64), 3, 8, 2, age=1)


# ---- configuration and files ----


def test_configuration_travels_whole():
    net = normalized_network(betas=[0.5, 0.9, 0.75, 0.875])
    config = net.config
    assert config.betas == (0.5, 0.9, 0.75, 0.875) and config.read_outs == 2 and config.num_outputs == 1
    assert config.is_plain and config.rows == net.init_state(1).data.shape[1]
    assert l2l.Config.from_arguments(*config.arguments) == config
    assert l2l.Config(**json.loads(json.dumps(config.asdict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(copy.deepcopy(config))
    assert l2l.CoordinatewiseLSTM(**json.loads(json.dumps(net.options()))).config == config
    weights = reference.unpack_phi(net.phi(), config)
    assert torch.equal(weights.weight_tensor, net.weight_tensor) and torch.equal(weights.weight_out, net.weight_out)
    assert net.phi().numel() == reference.phi_size(config)
    assert l2l.CoordinatewiseLSTM(preprocess="normalized").betas == (0.9, 0.99, 0.95, 0.999)
    assert "betas" not in l2l.CoordinatewiseLSTM(gac_cells=3).options()


@pytest.mark.parametrize("options", [{}, {"tensor_inputs": 0, "num_layers": 1}, {"betas": (0.5, 0.9, 0.75, 0.875)}])
def test_files_and_copies(tmp_path, options):
    net = normalized_network(**options)
    path = tmp_path / "net.safetensors"
    net.save(path)
    for other in (l2l.load(path), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.config == net.config and torch.equal(other.phi(), net.phi())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gac_cells": 2}, ValueError, 'gac_cells: expected 0 with preprocess="normalized", got 2'),
        ({"extra_inputs": 1}, ValueError, 'extra_inputs: expected 0 with preprocess="normalized", got 1'),
        ({"num_outputs": 2}, ValueError, 'num_outputs: expected 1 with preprocess="normalized", got 2'),
        ({"tensor_inputs": 17}, ValueError, "tensor_inputs: expected 0..16, got 17"),
        ({"tensor_inputs": 1.5}, TypeError, "tensor_inputs: expected an int"),
        ({"betas": (0.9, 0.9, 0.9)}, ValueError, "betas: expected four numbers"),
        ({"betas": 0.9}, TypeError, "betas: expected four numbers"),
        ({"betas": (0.9, 1.0, 0.9, 0.9)}, ValueError, r"betas\[1\]: expected"),
        ({"betas": (0.9, 0.9, 0.4, 0.9)}, ValueError, r"betas\[2\]: expected a finite number >= 0.5"),
        ({"betas": (0.9, 0.9, 0.9, 1 - 1e-7)}, ValueError, r"betas\[3\]: expected a finite number >= 0.5 and <= "),
        ({"preprocess": "log_sign"}, ValueError, 'tensor_inputs: only of a network with preprocess="normalized"'),
        ({"preprocess": "identity", "tensor_inputs": 0, "betas": (0.9,) * 4}, ValueError, "betas: only of a network"),
    ],
)
def test_what_does_not_go_together(options, error, message):
    with pytest.raises(error, match=message):
        normalized_network(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"tensor_inputs: expected shape \(3,\), got None"),
        ({"tensor_inputs": [1.0, 2.0]}, r"tensor_inputs: expected shape \(3,\), got \(2,\)"),
        ({**COMMON, "nominal": [0.0]}, r"nominal: expected shape \(5,\), got \(1,\)"),
        ({**COMMON, "num_problems": 2}, "num_problems: expected 1"),
    ],
)
def test_what_a_step_refuses(dtype, given, message):
    net = normalized_network()
    with pytest.raises(ValueError, match=message):
        net(torch.ones(4, dtype=dtype), net.init_state(4, dtype=dtype), **given)


def test_other_kinds_refuse_what_is_not_theirs():
    net = l2l.CoordinatewiseLSTM(hidden_size=4)
    for name in COMMON:
        with pytest.raises(ValueError, match=f"{name}: expected shape None"):
            net(torch.ones(3), net.init_state(3), **{name: COMMON[name]})


def test_cells_of_torch():
    net = normalized_network(tensor_inputs=0)
    cells, linear = net.to_lstm_cells()
    again = l2l.CoordinatewiseLSTM.from_lstm_cells(cells, linear, "normalized")
    assert torch.equal(again.phi(), net.phi())
    with pytest.raises(ValueError, match="tensor_inputs: torch.nn.LSTMCell has no inputs in common"):
        normalized_network().to_lstm_cells()
