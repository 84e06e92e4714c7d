"""LearnedOptimizer with networks of normalized inputs: steps, ages, inputs per tensor, segments, checkpoints."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import normalized, reference
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels.tensor_inputs import DEFAULT_INPUTS, aligned, default_inputs, fan_ins_of
from tests.helpers import assert_close, structured_gradient
from tests.normalized_helpers import normalized_network
from tests.segment_helpers import Optimizee, net_gradient, record_run

SHAPES = [(9, 4), (9,), (3, 9), (), (0, 2), (130,)]


def network(**options):
    return normalized_network(**{"tensor_inputs": len(DEFAULT_INPUTS), "output_scale": 0.1, **options})


def parameters(dtype=torch.float32, seed: int = 4) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def numbers(state) -> torch.Tensor:
    *pairs, averages = state.to_logical()
    return torch.cat([*(part for pair in pairs for part in pair), averages.rows], dim=1)


def give_gradients(params, t: int, missing: tuple[int, ...] = ()) -> None:
    for k, param in enumerate(params):
        grad = structured_gradient(tuple(param.shape), seed=100 * t + k).to(param.dtype)
        param.grad = None if k in missing else grad


def logical_state(optimizer, net, param):
    state = optimizer.state_of(param) or net.init_state(param.numel())
    return state.to(torch.float64).to_logical()


def expected_inputs(optimizer, net, params, total_steps, sign=1.0):
    """Inputs and nominal of the parameters that are about to move, from the optimizer's state, by the reference."""
    rows, ages, before = [], [], []
    for param in params:
        *_, averages = logical_state(optimizer, net, param)
        rows.append(normalized.tensor_sums(param, sign * param.grad, averages, net.betas))
        ages.append(averages.age + 1)
        before.append(float(optimizer.state.get(param, {}).get("lstm_alignment", 0.0)))
    sums = torch.stack(rows)
    alignments = aligned(sums, torch.tensor(before).double())
    inputs = default_inputs(fan_ins_of(param.shape for param in params), ages, total_steps, sums, alignments)
    return inputs, net.nominal_of(inputs)


def reference_step(net, param, state, inputs, nominal, sign=1.0):
    """One step of one parameter by the reference in float64: the update and the new state."""
    phi = net.phi().detach().double()
    return reference.lstm_step(sign * param.grad.double(), state, phi, net.config, 1, None, inputs, nominal)


# ---- steps ----


@pytest.mark.parametrize("total_steps", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, None])
def test_steps(dtype, total_steps):
    """Against the reference step by step, from the optimizer's own state; one tensor rests in a step and ages less.
    None: float64 and float32 by turns, which go different ways and are told of each other."""
    net, params = network(), parameters(dtype or torch.float64)
    if dtype is None:
        params = [param if k % 2 == 0 else nn.Parameter(param.detach().float()) for k, param in enumerate(params)]
    optimizer = l2l.LearnedOptimizer(params, net, lr=0.7, weight_decay=0.1, maximize=True, total_steps=total_steps)
    for t in range(7):
        missing = (2,) if t == 3 else ()
        give_gradients(params, t, missing)
        expected = {}
        moving = [param for param in params if param.grad is not None]
        common = iter(zip(*expected_inputs(optimizer, net, moving, total_steps, -1.0), strict=True))
        for k, param in enumerate(params):
            if k not in missing:
                update, new = reference_step(net, param, logical_state(optimizer, net, param), *next(common), -1.0)
                value = param.detach().double() * (1 - 0.07) + 0.7 * update
                expected[k] = value, l2l.State.from_logical(new)
        optimizer.step()
        for k, (value, state) in expected.items():
            tolerance = {torch.float32: 2e-6, torch.float64: 1e-7, None: 2e-6}.get(dtype, 4e-3)  # inputs are float32
            assert_close(params[k], value, tolerance, f"param {k}, step {t}")
            actual = optimizer.state_of(params[k])
            assert actual.age == state.age == t + 1 - (k == 2 and t >= 3)
            assert_close(numbers(actual), numbers(state), 2e-5, f"state {k}, step {t}")
    assert optimizer.state[params[2]]["lstm_age"] == 6 and optimizer.state[params[0]]["lstm_age"] == 7


def test_a_new_network_trains_as_adam():
    optimizees = Optimizee(), Optimizee()
    net = l2l.CoordinatewiseLSTM(8, 2, "normalized", output_scale=3e-3, tensor_inputs=len(DEFAULT_INPUTS))
    learned = l2l.LearnedOptimizer(optimizees[0].theta, net)
    adam = torch.optim.Adam(optimizees[1].theta, lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
    for t in range(300):
        for optimizee, optimizer in zip(optimizees, (learned, adam), strict=True):
            optimizer.zero_grad()
            optimizee.loss(t % 30).backward()
            optimizer.step()
    for a, b in zip(*(optimizee.theta for optimizee in optimizees), strict=True):
        assert (a - b).abs().max() < 1e-5  # 300 steps of 3e-3, that each depend on those before


def test_the_hook_is_asked_for_every_step_of_every_tensor():
    net, params, asked = network(tensor_inputs=2), parameters()[:2], []

    def features(param, age, total_steps):
        asked.append((param is params[1], age, total_steps))
        return [0.1 * age, -1.0], None if age == 1 else torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])

    optimizer = l2l.LearnedOptimizer(params, net, total_steps=9, tensor_features=features)
    for t in range(2):
        give_gradients(params, t)
        states = [(optimizer.state_of(p) or net.init_state(p.numel())).data.clone() for p in params]
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for k, param in enumerate(params):
            inputs = torch.tensor([[0.1 * (t + 1), -1.0]])
            nominal = net.nominal_of(inputs) if t == 0 else torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
            out, _ = ops.step(
                param.grad, None, states[k], net.phi(), net.config, ages=[t + 1], tensor_inputs=inputs, nominal=nominal
            )
            assert torch.equal(param, before[k] + out[0])
    assert asked == [(False, 1, 9), (True, 1, 9), (False, 2, 9), (True, 2, 9)]


# ---- inputs per tensor ----


def test_a_nan_in_a_parameter_stays_there():
    net, params = network(), [nn.Parameter(torch.randn(200))]
    with torch.no_grad():
        params[0][7] = math.nan
    optimizer = l2l.LearnedOptimizer(params, net)
    params[0].grad = torch.randn(200)
    params[0].grad[9] = math.nan
    optimizer.step()
    assert params[0].isnan().nonzero().flatten().tolist() == [7, 9]


# ---- segments ----


@pytest.mark.parametrize("options", [{}, {"tensor_inputs": 0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_is_the_unrolled_network(dtype, options):
    """Two segments, so that the second begins with old averages; a tensor that rests in a step, and a float64 one that
    goes through the reference. With a hook, so that nominal vectors are recorded as well."""
    net, optimizee = network(hidden_size=8, **options), Optimizee(dtype=dtype)
    asked = {}

    def features(param, age, total_steps):
        inputs = torch.linspace(-1, 1, net.tensor_inputs) * math.sin(age) if net.tensor_inputs else None
        nominal = None if age % 2 else torch.tensor([0.1, 0.2, 0.1, 0.3, 0.4]) + 0.01 * age
        own = nominal is None and inputs is not None
        asked[id(param), age] = inputs, net.nominal_of(inputs.unsqueeze(0))[0] if own else nominal
        return inputs, nominal

    optimizer = l2l.LearnedOptimizer(optimizee.theta, net, lr=0.5, total_steps=20, tensor_features=features)

    def edit(t):
        if t in (2, 7):
            optimizee.theta[1].grad = None

    for first, steps in ((0, 4), (4, 5)):
        starts = [optimizer.state_of(p) or net.init_state(p.numel(), dtype=dtype) for p in optimizee.theta]
        starts = [start.clone().to(torch.float64).to_logical() for start in starts]
        optimizer.start_segment()
        seen = record_run(optimizer, optimizee, steps, first=first, edit=edit)
        weights = [1.0 + 0.2 * t for t in range(steps)]
        net.zero_grad()
        optimizer.backward_segment(weights)
        phi, total = net.phi().detach().double().requires_grad_(), 0.0
        for k, param in enumerate(optimizee.theta):
            theta, state = torch.zeros(param.shape, dtype=torch.float64), starts[k]
            for t in range(steps):
                if seen[t][k] is not None:
                    common = asked[id(param), state[-1].age + 1]
                    update, state = reference.lstm_step(seen[t][k].double(), state, phi, net.config, 1, None, *common)
                    theta = theta + 0.5 * update
                if seen[t + 1][k] is not None:
                    total = total + weights[t] * (seen[t + 1][k].double() * theta).sum()
        total.backward()
        assert_close(net_gradient(net), phi.grad, 1e-4 if dtype == torch.float32 else 1e-6, f"from {first}")


def test_sampled_segment_knows_ages_and_inputs():
    """Every tile chosen is the exact segment."""
    gradients = []
    for sampled in (False, True):
        net, param = network(), nn.Parameter(torch.linspace(-1, 1, 64 * 40))
        optimizer = l2l.LearnedOptimizer([param], net, total_steps=5)
        sampling = l2l.optim.segment_sampling.Sampling(1.0, torch.Generator()) if sampled else None
        optimizer.start_segment(sampling)
        for t in range(4):
            param.grad = structured_gradient((64 * 40,), seed=t)
            if t < 3:
                optimizer.step()
        optimizer.backward_segment()
        gradients.append(net_gradient(net))
    assert_close(gradients[1], gradients[0], 1e-6)


def test_segment_returns_gradients_of_start_states():
    net, optimizee = network(), Optimizee()
    optimizer = l2l.LearnedOptimizer(optimizee.theta, net)
    record_run(optimizer, optimizee, 2)
    optimizer.start_segment()
    record_run(optimizer, optimizee, 3, first=2)
    ends = {p: optimizer.state_of(p).clone() for p in optimizee.theta}
    starts = optimizer.backward_segment(None, ends, True)
    for param in optimizee.theta:
        *pairs, averages = starts[param].to_logical()
        assert averages.rows.eq(0).all() and all(part.abs().sum() > 0 for pair in pairs for part in pair)


# ---- checkpoints ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checkpoints_go_on_bit_for_bit(dtype):
    net, params = network(), parameters(dtype)
    optimizer = l2l.LearnedOptimizer(params, net, total_steps=50)
    for t in range(3):
        give_gradients(params, t, missing=(1,) if t == 0 else ())
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["state"][0]["lstm_state"].shape == (9, 4, 2 * 2 * 8 + 4)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = l2l.LearnedOptimizer(others, net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["total_steps"] == 50
    copies = copy.deepcopy((optimizer, params)), pickle.loads(pickle.dumps((optimizer, params)))
    runs = [(optimizer, params), (loaded, others), *copies]
    for each, own in runs:
        assert [each.state_of(p).age for p in own] == [3, 2, 3, 3, 3, 3]
        for t in range(3, 6):
            give_gradients(own, t)
            each.step()
    for each, own in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(own, params, strict=True))
        for a, b in zip(own, params, strict=True):
            pairs = zip(each.state_of(a).to_logical(), optimizer.state_of(b).to_logical(), strict=True)
            assert all(torch.equal(x[0], y[0]) for x, y in pairs)


def test_the_saved_age_survives_what_tools_do_to_states():
    net, params = network(), parameters()
    optimizer = l2l.LearnedOptimizer(params, net)
    give_gradients(params, 0)
    optimizer.step()
    for param in params:
        optimizer.state[param]["lstm_age"] = 123_457
    saved = optimizer.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in saved["state"][0].values())
    for entry in saved["state"].values():
        entry["lstm_age"] = entry["lstm_age"].bfloat16()
    optimizer.load_state_dict(saved)
    assert optimizer.state_of(params[0]).age == 123_457


def test_other_betas_are_warned_of():
    net, params = network(), parameters()
    optimizer, other = (l2l.LearnedOptimizer(params, each) for each in (net, network(betas=(0.8, 0.9, 0.9, 0.99))))
    give_gradients(params, 0)
    optimizer.step()
    with pytest.warns(UserWarning, match="saved with a network of betas="):
        other.load_state_dict(optimizer.state_dict())


def test_a_state_without_its_age_is_refused():
    net, params = network(), parameters()
    optimizer = l2l.LearnedOptimizer(params, net)
    give_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["state"][0]["lstm_age"]
    with pytest.raises(ValueError, match="expected a number of steps >= 0 as 'lstm_age' beside 'lstm_state', got None"):
        optimizer.load_state_dict(saved)
    del optimizer.state[params[0]]["lstm_age"]
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="lstm_age"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_step_that_only_makes_state_does_not_age():
    net, params = network(), parameters()
    optimizer = l2l.LearnedOptimizer(params, net, lr=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert [optimizer.state[p]["lstm_age"] for p in params] == [0] * len(params)
    assert optimizer.state_of(params[0]).age == 0


def test_networks_without_averages_keep_their_form():
    params = parameters()
    optimizer = l2l.LearnedOptimizer(params, l2l.CoordinatewiseLSTM())
    give_gradients(params, 0)
    optimizer.step()
    assert set(optimizer.state[params[0]]) == {"lstm_state", "numel"}
    saved = optimizer.state_dict()
    assert set(saved["state"][0]) == {"lstm_state"}
    for group in saved["param_groups"]:
        del group["total_steps"]  # as earlier releases wrote it
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["total_steps"] is None


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps: expected an int >= 1, got 0"),
        ({"total_steps": "many"}, TypeError, "total_steps: expected an int >= 1"),
        ({"num_problems": 2}, ValueError, 'num_problems: expected 1 for a network with preprocess="normalized"'),
        ({"tensor_features": 3}, TypeError, "tensor_features: expected a function, got int"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        l2l.LearnedOptimizer(parameters(), network(), **options)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (([1.0], None), r"tensor_features: expected 2 numbers as tensor_inputs, got shape \(1,\)"),
        ((None, None), "tensor_features: expected 2 numbers as tensor_inputs"),
        (([1.0, 2.0], [1.0]), "tensor_features: expected 5 numbers as nominal"),
    ],
)
def test_answers_of_the_hook(answer, message):
    params = parameters()
    optimizer = l2l.LearnedOptimizer(params, network(tensor_inputs=2), tensor_features=lambda *_: answer)
    give_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True)) and not optimizer.state


def test_the_default_needs_its_number_of_inputs():
    params = parameters()
    optimizer = l2l.LearnedOptimizer(params, network(tensor_inputs=2))
    give_gradients(params, 0)
    with pytest.raises(ValueError, match="tensor_features: expected a function for a network with tensor_inputs=2"):
        optimizer.step()
