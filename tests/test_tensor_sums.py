"""What networks are told of a tensor as a whole: sums over its coordinates, and the inputs that are made of them."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import normalized
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels.state import Averages
from l2l_fast.kernels.tensor_inputs import DEFAULT_INPUTS, aligned, default_inputs, fan_ins_of, progress
from l2l_fast.optim.tensor_sums import sums_of
from tests import sharded_inputs_worker
from tests.helpers import assert_close, run_processes
from tests.normalized_helpers import drifting_gradients, normalized_network, warm_states

NUMELS = (0, 1, 63, 64, 65, 70_001)


def network(**options) -> l2l.CoordinatewiseLSTM:
    return normalized_network(**{"tensor_inputs": len(DEFAULT_INPUTS), "output_scale": 0.1, **options})


def reference_sums(param, grad, state, net, age, maximize):
    averages = state.to(torch.float64).to_logical()[-1]
    return normalized.tensor_sums(param, -grad if maximize else grad, Averages(averages.rows, age - 1), net.betas)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums(isa, dtype, maximize):
    """Of all sizes, with badly scaled gradients, and the same to the bit for any number of threads."""
    net, warm = network(), 4
    params, grads, states = [], [], []
    for k, numel in enumerate(NUMELS):
        seen = drifting_gradients(warm + 1, numel, decades=2.0, seed=k)
        params.append((torch.randn(numel) * 3).to(dtype))
        grads.append(seen[-1].to(dtype))
        states.append(warm_states(net, seen[:-1]))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        ages = [warm + 1] * len(NUMELS)
        results.append(ops.tensor_sums(params, grads, [s.data for s in states], net.config, maximize, ages))
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].dtype == torch.float64
    for k, row in enumerate(results[0]):
        expected = reference_sums(params[k], grads[k], states[k], net, warm + 1, maximize)
        assert_close(row[:4], expected[:4], 1e-5, f"{NUMELS[k]} coordinates")
        scale = (expected[1] * expected[3]).sqrt().clamp_min(1e-300)
        assert abs(row[4] - expected[4]) <= 1e-5 * scale


def test_sums_of_any_strides_and_without_what_is_not_finite(isa):
    net = network()
    base, slope = torch.randn(40, 30), torch.randn(30, 40)
    state = net.init_state(1200).data
    plain = ops.tensor_sums([base.t().contiguous()], [slope], [state], net.config, False, [1])
    strided = ops.tensor_sums([base.t()], [slope], [state], net.config, False, [1])
    assert torch.equal(plain, strided)
    spoilt_param, spoilt_grad = base.t().clone(), slope.clone()
    spoilt_param[0, 0], spoilt_grad[0, 1], spoilt_grad[0, 2] = math.nan, math.inf, math.nan
    zeroed_param, zeroed_grad = base.t().clone(), slope.clone()
    zeroed_param[0, 0] = zeroed_grad[0, 1] = zeroed_grad[0, 2] = 0.0
    spoilt = ops.tensor_sums([spoilt_param], [spoilt_grad], [state], net.config, False, [1])
    assert torch.equal(spoilt, ops.tensor_sums([zeroed_param], [zeroed_grad], [state], net.config, False, [1]))


def test_the_first_step_has_no_direction_and_q_is_the_gradient():
    net, grad = network(), torch.randn(500)
    row = ops.tensor_sums([torch.ones(500)], [grad], [net.init_state(500).data], net.config, False, [1])[0]
    assert row[0] == 500 and row[3] == row[4] == 0
    assert_close(row[2], grad.double().square().sum(), 1e-6)


def test_padding_of_a_state_never_counts(isa):
    net = network()
    state = warm_states(net, drifting_gradients(3, 70)).data
    dirty = state.clone()
    dirty[1, :, 6:] = 1e5
    arguments = [torch.ones(70)], [torch.ones(70)]
    assert torch.equal(*(ops.tensor_sums(*arguments, [each], net.config, False, [4]) for each in (state, dirty)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grads": [torch.ones(4)]}, "grads"),
        ({"grads": [torch.ones(5, dtype=torch.int32)]}, "grads"),
        ({"states": [torch.ones(3)]}, "states"),
        ({"ages": [0]}, "ages"),
        ({"ages": []}, "ages"),
        ({"config": l2l.CoordinatewiseLSTM().config}, "preprocess"),
    ],
)
def test_refusals(change, message):
    net = network()
    given = {"params": [torch.ones(5)], "grads": [torch.ones(5)], "states": [net.init_state(5).data]}
    given.update({"config": net.config, "maximize": False, "ages": [1]}, **change)
    with pytest.raises((ValueError, TypeError), match=message):
        ops.tensor_sums(**given)


# ---- inputs ----


def inputs_of(shapes, sums, ages, total_steps, alignments=None, optimizees=1):
    alignments = torch.zeros(len(shapes)).double() if alignments is None else alignments
    return default_inputs(fan_ins_of(shapes), ages, total_steps, sums, alignments, optimizees).double()


def test_inputs_of_time_and_kind():
    shapes, ages, total = [(4, 3, 5), (7,), (), (32, 32)], [1, 50, 101, 3], 100
    x = inputs_of(shapes, torch.ones(4, 6).double(), ages, total)
    p = torch.tensor([0.0, 0.49, 1.0, 0.02]).double()
    assert x.shape == (4, len(DEFAULT_INPUTS))
    assert_close(x[:, 1], p - 0.5, 1e-6)
    assert_close(x[:, 2], p**3 - 0.25, 1e-6)
    assert x[1, 3].item() == pytest.approx(math.exp(-50 / 30), rel=1e-6)
    assert_close(x[:, 4], (1.02 - p).log() / 2, 1e-6)
    assert x[2, 5].item() == pytest.approx(math.log(0.002) / 3, rel=1e-6)
    assert x[0, 6].item() == pytest.approx(math.log(0.1) / 2, rel=1e-6)
    assert x[:, 7].tolist() == [0, 1, 1, 0]
    assert_close(x[:, 8], x[:, 7] * (p - 0.5), 1e-6)
    assert x[:, 9].tolist() == pytest.approx([math.log(15 / 32) / 2, 0, 0, 0], rel=1e-6)


def test_inputs_of_sizes():
    """RMS theta by kind, alignment, Adam's direction, and RMS q beside that of all tensors of the optimizee."""
    sums = torch.tensor([[4.0, 1.0, 8.0, 1.0, 0.0, 4.0], [0.0, 1.0, 2.0, 8.0, 0.0, 2.0]]).double()
    x = inputs_of([(2, 2), (2,)], sums, [5, 5], 100, torch.tensor([0.5, -0.5]).double())
    size = [math.log(10.001), -4.0]
    assert x[:, 10].tolist() == pytest.approx([size[0] / 2, 0.0], rel=1e-5)
    assert x[:, 11].tolist() == pytest.approx([0.0, size[1] / 3], rel=1e-5)
    assert x[:, 12].tolist() == [1.5, -1.5]
    directions, ratios = (0.25, 4.0), (2 / (10 / 6), 1 / (10 / 6))
    assert x[:, 13].tolist() == pytest.approx([math.log(each + 1e-4) / 4 + 0.5 for each in directions], rel=1e-5)
    assert x[:, 14].tolist() == pytest.approx([math.log(each) / 2 / 3 for each in ratios], rel=1e-5)
    apart = inputs_of([(2, 2), (2,)], sums, [1, 1], 100, optimizees=2)
    assert apart[:, 14].abs().max() == 0  # each alone is all there is
    assert apart[0, 13].item() == pytest.approx(math.log(1 + 1e-4) / 4 + 0.5)  # the first step's directions are signs


def test_progress():
    assert progress(1, 10) == (0.0, 10.0) and progress(11, 10) == (1.0, 10.0) and progress(500, 10) == (1.0, 10.0)
    p, steps = zip(*(progress(age, None) for age in (1, 251, 2500)), strict=True)
    assert p[0] == 0.0 and p[1] == pytest.approx(0.25, abs=1e-2) and p[2] == pytest.approx(0.25, abs=1e-2)
    assert steps == (1000.0, 1004.0, 10000.0)


def test_alignment_is_negative_while_the_way_goes_on():
    """A constant gradient: g and the uphill direction agree, so the cosine to the way downhill is -1."""
    param = nn.Parameter(torch.zeros(200))
    optimizer = l2l.LearnedOptimizer([param], network(), total_steps=50)
    param.grad = torch.linspace(-1, 1, 200)
    found = []
    for _ in range(4):
        optimizer.step()
        found.append(float(optimizer.state[param]["lstm_alignment"]))
    assert found[0] == 0.0 and found[1] < -0.08 and found == sorted(found, reverse=True)
    param.grad = -param.grad
    optimizer.step()
    assert float(optimizer.state[param]["lstm_alignment"]) > found[-1]


def test_alignment_of_nothing():
    sums = torch.zeros(3, 6).double()
    assert aligned(sums, torch.tensor([0.0, 1.0, -1.0]).double()).tolist() == pytest.approx([0.0, 0.9, -0.9])


# ---- in the optimizer ----


def test_alignment_travels_with_checkpoints():
    net, params = network(), [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(6))]
    optimizer = l2l.LearnedOptimizer(params, net, total_steps=9)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
        optimizer.step()
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = l2l.LearnedOptimizer(twins, net, total_steps=9)
    saved = copy.deepcopy(optimizer.state_dict())
    assert all("lstm_alignment" in entry for entry in saved["state"].values())
    other.load_state_dict(saved)
    for twin, param in zip(twins, params, strict=True):
        twin.grad = param.grad
    optimizer.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    saved["state"][0]["lstm_alignment"] = "much"
    with pytest.raises(ValueError, match="lstm_alignment"):
        other.load_state_dict(saved)


def test_nominal_of():
    net, x = network(), torch.randn(3, len(DEFAULT_INPUTS))
    with torch.no_grad():
        net.weight_nominal.zero_()
        assert torch.equal(net.nominal_of(x), normalized.default_nominal(3, x.device))
        net.weight_nominal[0, 0], net.weight_nominal[1, 0] = 100.0, -100.0
        net.weight_nominal[2, 0], net.weight_nominal[3, 0] = 100.0, 100.0
    x[:, 0] = 1.0
    gain, mu, nu, lam, correction = net.nominal_of(x)[0].tolist()
    assert (gain, mu, nu, lam) == pytest.approx((100.0, -0.8, 0.8, 1.0))
    assert correction == pytest.approx(0.5 * math.e**3)
    with pytest.raises(ValueError, match="tensor_inputs"):
        l2l.CoordinatewiseLSTM(preprocess="normalized").nominal_of(x)


def test_shards_are_told_of_the_whole_tensor():
    """Two processes with half of every tensor each, one half empty, see the sums of all; in a function's stead here."""
    net = network()
    whole = [torch.randn(100), torch.randn(64)]
    cuts = [(37, 100), (0, 64)]
    grads = [torch.randn_like(each) for each in whole]

    def moving(low, high):
        found = []
        for each, grad, cut in zip(whole, grads, cuts, strict=True):
            a, b = (0, cut[0]) if (low, high) == (0, 1) else cut
            found.append((each[a:b], grad[a:b], net.init_state(b - a).data))
        return found

    parts = [moving(0, 1), moving(1, 2)]
    alone = [sums_of([p for p, _, _ in part], part, net.config, False, [1, 1], None) for part in parts]

    def add_other(tensor):
        tensor.add_(alone[1])

    together = sums_of([p for p, _, _ in parts[0]], parts[0], net.config, False, [1, 1], add_other)
    complete = [(p, g, net.init_state(p.numel()).data) for p, g in zip(whole, grads, strict=True)]
    assert_close(together, sums_of(whole, complete, net.config, False, [1, 1], None), 1e-12)
    assert together[:, 5].tolist() == [100, 64]


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_step_as_the_whole_tensors(ranks, tmp_path):
    """torch.distributed with gloo: some shards are empty, and with three processes the last has nothing at all."""
    options = ("-W", "error::UserWarning")
    run_processes("sharded_inputs_worker.py", tmp_path, ranks, count=ranks, options=options)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    params = [nn.Parameter(whole) for whole in sharded_inputs_worker.wholes()]
    optimizer = l2l.LearnedOptimizer(params, l2l.load_pretrained("general"), total_steps=9)
    for t in range(6):
        for param, grad in zip(params, sharded_inputs_worker.gradients(t), strict=True):
            param.grad = grad
        optimizer.step()
    for k, param in enumerate(params):
        assert_close(torch.cat([part[k] for part in parts]), param, 1e-6, f"tensor {k}")


def test_a_process_group_that_was_lost_is_missed():
    optimizer = l2l.LearnedOptimizer([nn.Parameter(torch.ones(3))], network(), process_group=lambda tensor: None)
    with pytest.warns(UserWarning, match="process_group"):
        twin = pickle.loads(pickle.dumps(optimizer))
    twin.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="process_group: lost"):
        twin.step()


def test_another_weight_nominal_is_another_network():
    """It stands beside phi, and a checkpoint that was saved with another one is noticed."""
    net, param = network(), nn.Parameter(torch.ones(3))
    optimizer = l2l.LearnedOptimizer([param], net, total_steps=5)
    param.grad = torch.ones(3)
    optimizer.step()
    saved = optimizer.state_dict()
    twin = copy.deepcopy(net)
    other = l2l.LearnedOptimizer([nn.Parameter(torch.ones(3))], twin, total_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(copy.deepcopy(saved))
    with torch.no_grad():
        twin.weight_nominal[2, 3] += 0.01
    with pytest.warns(UserWarning, match="other weights"):
        other.load_state_dict(saved)
