"""LearnedOptimizer with networks whose coordinates communicate: steps, segments, checkpoints, sharding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import reference
from tests.gac_helpers import gac_network
from tests.helpers import assert_close, double, run_processes, structured_gradient

SHAPES = [(6, 15), (2, 7), (4,), (2, 64)]


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params, t, skip=()):
    for k, param in enumerate(params):
        param.grad = None if k in skip else structured_gradient(param.shape, seed=100 * t + k).to(param.dtype)


def reference_run(net, params, groups, steps, lr=0.5, weight_decay=0.1, skip=lambda t: ()):
    """theta after the steps and the joint trajectory, all by the float64 reference."""
    theta = [param.detach().double() for param in params]
    states = [net.init_state(t.numel(), dtype=torch.float64).to_logical() for t in theta]
    phi = net.phi().detach().double()
    for t in range(steps):
        set_gradients(params, t, skip(t))
        moving = [k for k, param in enumerate(params) if param.grad is not None]
        numels = [theta[k].numel() for k in moving]
        g = reference.join([params[k].grad.double().flatten() for k in moving], groups)
        joint = reference.join_states([states[k] for k in moving], groups)
        update, joint = reference.lstm_step(g, joint, phi, net.config, groups)
        new = reference.separate_states(joint, numels, groups)
        for k, u, state in zip(moving, reference.separate(update, numels, groups), new, strict=True):
            theta[k] = theta[k] * (1 - lr * weight_decay) + lr * u.view_as(theta[k])
            states[k] = state
    return theta, states


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 among them", "float64 among them"])
@pytest.mark.parametrize("groups", [1, 2])
def test_steps_match_the_reference(groups, dtypes):
    net, params = gac_network(), parameters()
    if dtypes == "bfloat16 among them":
        params[1] = nn.Parameter(params[1].detach().bfloat16())
    if dtypes == "float64 among them":
        params[2] = nn.Parameter(params[2].detach().double())
    expected, _ = reference_run(net, [copy.deepcopy(p) for p in params], groups, 4)
    opt = l2l.LearnedOptimizer(params, net, lr=0.5, weight_decay=0.1, num_problems=groups)
    for t in range(4):
        set_gradients(params, t)
        opt.step()
    for param, value in zip(params, expected, strict=True):
        assert_close(param, value, 1e-2 if param.dtype == torch.bfloat16 else 2e-5)


def test_the_mean_runs_over_all_tensors_that_move():
    net, params = gac_network(), parameters()
    skip = lambda t: (0,) if t == 1 else (1, 3) if t == 2 else ()  # noqa: E731
    expected, _ = reference_run(net, [copy.deepcopy(p) for p in params], 1, 4, skip=skip)
    opt = l2l.LearnedOptimizer(params, net, lr=0.5, weight_decay=0.1)
    for t in range(4):
        set_gradients(params, t, skip(t))
        opt.step()
    for param, value in zip(params, expected, strict=True):
        assert_close(param, value, 2e-5)


@pytest.mark.parametrize("case", ["plain", "maximize", "float64", "idle"])
@pytest.mark.parametrize("groups", [1, 2])
def test_segment_backward_is_autograd_through_the_unrolled_steps(groups, case):
    dtype = torch.float64 if case == "float64" else torch.float32
    net, params = gac_network(), parameters(dtype)
    skip = lambda t: (1,) if case == "idle" and t == 2 else ()  # noqa: E731
    opt = l2l.LearnedOptimizer(params, net, lr=0.5, weight_decay=0.2, num_problems=groups, maximize=case == "maximize")
    set_gradients(params, 50)
    opt.step()  # so that the start states are not zero
    starts = [opt.state_of(p).to(torch.float64).to_logical() for p in params]
    opt.start_segment()
    grads, w = [], [0.5, 1.0, 2.0, 1.5]
    for t in range(4):
        set_gradients(params, t, skip(t))
        grads.append([None if p.grad is None else p.grad.double() for p in params])
        opt.step()
    set_gradients(params, 4)
    grads.append([p.grad.double() for p in params])
    start_grads = opt.backward_segment(w, return_grad_start_states=True)
    sign = -1.0 if case == "maximize" else 1.0
    seen = [[None if g is None else sign * g for g in each] for each in grads]
    expected, expected_starts = reference.segment_backward(
        starts, seen, [sign * x for x in w], [0.5] * 4, [0.9] * 4, net.phi().detach().double(), net.config, None, groups
    )
    actual = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert_close(actual, expected, 1e-4, "d phi")
    for param, pairs in zip(params, expected_starts, strict=True):
        for pair, pair_expected in zip(start_grads[param].to_logical(), pairs, strict=True):
            for part, part_expected in zip(pair, pair_expected, strict=True):
                assert_close(part, part_expected, 1e-4, "d start")


def test_checkpoint_continues_exactly():
    net, params = gac_network(), parameters()
    opt = l2l.LearnedOptimizer(params, net, num_problems=2)
    for t in range(3):
        set_gradients(params, t)
        opt.step()
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = l2l.LearnedOptimizer(copies, net)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["num_problems"] == 2
    for optimizer, its in ((opt, params), (other, copies)):
        set_gradients(its, 3)
        optimizer.step()
    for a, b in zip(params, copies, strict=True):
        assert torch.equal(a, b)


def test_state_dicts_from_before_there_were_groups_load():
    net, params = l2l.CoordinatewiseLSTM(), parameters()
    opt = l2l.LearnedOptimizer(params, net)
    state_dict = opt.state_dict()
    del state_dict["param_groups"][0]["num_problems"]
    opt.load_state_dict(state_dict)
    assert opt.param_groups[0]["num_problems"] == 1


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"num_problems": 4}, ValueError, "num_problems"),
        ({"num_problems": 0}, ValueError, "num_problems"),
        ({"num_problems": True}, TypeError, "num_problems"),
        ({"process_group": 3}, TypeError, "process_group"),
    ],
)
def test_wrong_options_are_refused(options, error, name):
    with pytest.raises(error, match=name):
        l2l.LearnedOptimizer(parameters(), gac_network(), **options)


def test_extra_inputs_without_a_memory_are_refused():
    with pytest.raises(ValueError, match="extra inputs"):
        l2l.LearnedOptimizer(parameters(), gac_network(extra_inputs=1))


def test_several_outputs_move_theta_by_the_first():
    net = gac_network(num_outputs=3)
    params, one = parameters(), gac_network()
    with torch.no_grad():
        for a, b in zip(one.parameters(), net.parameters(), strict=True):
            a.copy_(b[:1] if a.shape != b.shape else b)
    copies = copy.deepcopy(params)
    for its, network in ((params, net), (copies, one)):
        set_gradients(its, 0)
        l2l.LearnedOptimizer(its, network).step()
    for a, b in zip(params, copies, strict=True):
        assert_close(a, b, 1e-6)


def test_a_callable_sums_over_shards():
    """Two shards that hold the same coordinates: the sums double and the count doubles, so nothing changes."""
    net, calls = gac_network(), []

    def twice(tensor):
        calls.append(tensor.dtype)
        tensor.mul_(2)

    results = []
    for reduce in (None, twice):
        params = parameters()
        opt = l2l.LearnedOptimizer(params, net, process_group=reduce)
        set_gradients(params, 0)
        opt.step()
        results.append(params)
    assert calls == [torch.float64] * net.num_layers
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_over_processes_equals_unsharded(ranks, tmp_path):
    """torch.distributed with gloo and a file store; with three ranks the last has no coordinates in some steps."""
    run_processes("sharded_worker.py", tmp_path, ranks, count=ranks)
    sharded = {}
    for rank in range(ranks):
        sharded.update(torch.load(tmp_path / f"{rank}.pt"))

    net, params = gac_network(), parameters()
    opt = l2l.LearnedOptimizer(params, net, num_problems=2)
    for t in range(5):
        set_gradients(params, t, (2,) if t in (1, 3) else ())
        opt.step()
    assert set(sharded) == set(range(len(params)))
    for k, param in enumerate(params):
        assert_close(sharded[k][0], param, 1e-6, f"tensor {k}")
        assert_close(sharded[k][1], opt.state_dict()["state"][k]["lstm_state"], 1e-6, f"state {k}")


def test_segments_of_sharded_coordinates_are_refused():
    opt = l2l.LearnedOptimizer(parameters(), gac_network(), process_group=lambda tensor: None)
    with pytest.raises(NotImplementedError, match="sharded"):
        opt.start_segment()


def test_float64_network_and_parameters():
    net, params = double(gac_network()), parameters(torch.float64)
    expected, _ = reference_run(net, [copy.deepcopy(p) for p in params], 2, 3)
    opt = l2l.LearnedOptimizer(params, net, lr=0.5, weight_decay=0.1, num_problems=2)
    for t in range(3):
        set_gradients(params, t)
        opt.step()
    for param, value in zip(params, expected, strict=True):
        assert_close(param, value, 1e-12)
