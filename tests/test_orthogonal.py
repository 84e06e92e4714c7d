"""Networks that orthogonalize their updates of matrices: the network, its steps in the optimizer, what is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import operators
from l2l_fast.kernels.tensor_inputs import DEFAULT_INPUTS
from l2l_fast.meta.crowd import Crowd
from l2l_fast.networks import effective
from l2l_fast.networks.orthogonal import matrix_shape
from l2l_fast.optim import orthogonal
from l2l_fast.problems import Quadratic
from l2l_fast.problems.zoo import Zoo

SHAPES = ((), (5,), (1,), (4, 3), (3, 70), (70, 3), (1, 6), (6, 1), (3, 2, 2), (4, 1, 3, 3), (2, 2, 2, 1, 2), (0, 4))


def network(seed: int = 0, **options) -> l2l.OrthogonalLSTM:
    """With weights that matter, and no larger than what is trained."""
    net = l2l.OrthogonalLSTM(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def plain(net: l2l.OrthogonalLSTM) -> l2l.CoordinatewiseLSTM:
    """The network without what is orthogonalized."""
    options = {**net.options(), "preprocess": "normalized"}
    del options["type"]
    other = l2l.CoordinatewiseLSTM(**options)
    state = net.state_dict()
    del state["weight_orthogonal"]
    other.load_state_dict(state)
    return other


def parameters(dtype=torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for k, param in enumerate(params):
        param.grad = (10.0 ** (k % 3) * torch.randn(param.shape, generator=generator)).to(param.dtype)


def take(params, optimizer, steps: range = range(4)) -> list[torch.Tensor]:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


def expected(net, params, steps: int, lr: float = 1.0, decay: float = 0.0, sign: float = 1.0, total_steps=20):
    """In float64, from the definition: the update of the plain network, and of matrices the polar factor's stand-in."""
    double, recorded = plain(net).double(), []
    thetas = [nn.Parameter(param.detach().double().clone()) for param in params]
    before = operators.tensor_inputs

    def record(*args, **options):
        recorded.append(before(*args, **options))
        return recorded[-1]

    optimizer = l2l.LearnedOptimizer(thetas, plain(net), lr=lr, total_steps=total_steps, maximize=sign < 0)
    states = [double.init_state(param.numel(), dtype=torch.float64) for param in params]
    for step in range(steps):
        set_gradients(params, step)
        for theta, param in zip(thetas, params, strict=True):
            theta.grad = param.grad.double()
        operators.tensor_inputs = record
        try:
            kept = [theta.detach().clone() for theta in thetas]
            optimizer.step()  # for its inputs, which depend on theta
        finally:
            operators.tensor_inputs = before
        inputs = recorded[-1][0]
        for k, (theta, old) in enumerate(zip(thetas, kept, strict=True)):
            update, states[k] = double(sign * theta.grad, states[k], tensor_inputs=inputs[k])
            shape = matrix_shape(theta.shape)
            if shape is not None:
                x = update.reshape(shape)
                x = x / x.norm().clamp_min(1e-30)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                gain = (net.weight_orthogonal.detach().double() @ inputs[k].double()).clamp(-8, 3).exp()
                update = update + net.output_scale * gain * 0.2 * max(shape) ** 0.5 * x.view(theta.shape)
            theta.data = (1 - lr * decay) * old + lr * update
    return [theta.detach() for theta in thetas]


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.3, "decay": 0.1}, {"sign": -1.0}, {"total_steps": None}],
    ids=["usual", "lr and decay", "maximize", "no total_steps"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_those_of_the_definition(dtype, options):
    net, params = network(), parameters(dtype)
    theirs = expected(net, params, 4 if dtype in (torch.float32, torch.float64) else 1, **options)
    given = {"lr": options.get("lr", 1.0), "weight_decay": options.get("decay", 0.0)}
    given |= {"maximize": "sign" in options, "total_steps": options.get("total_steps", 20)}
    start = [param.detach().clone() for param in params]
    ours = take(params, l2l.LearnedOptimizer(params, net, **given), range(4 if dtype.itemsize > 2 else 1))
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for a, b, old in zip(ours, theirs, start, strict=True):
        assert a.dtype is dtype and torch.allclose(a.double(), b, rtol=bound, atol=bound)
        assert a.numel() < 5 or not torch.equal(a, old)  # one may not move by as much as rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_network_is_a_function_of_one_tensor(dtype):
    """What an optimizer does to a parameter, step by step."""
    net, param = network(), nn.Parameter(torch.randn(4, 2, 3, dtype=dtype))
    told = torch.linspace(-0.5, 0.5, len(DEFAULT_INPUTS))
    optimizer = l2l.LearnedOptimizer([param], net, tensor_features=lambda *_: (told, None))
    state, theta = net.init_state(24, dtype=dtype), param.detach().clone()
    for step in range(3):
        set_gradients([param], step)
        optimizer.step()
        update, state = net(param.grad, state, tensor_inputs=told)
        assert update.dtype is dtype and update.shape == theta.shape
        theta += update
        assert torch.allclose(theta, param, atol=1e-6 if dtype is torch.float32 else 1e-14)


def test_what_is_no_matrix_moves_as_without():
    net = network()
    both = [parameters() for _ in range(2)]
    ours = take(both[0], l2l.LearnedOptimizer(both[0], net, total_steps=20))
    theirs = take(both[1], l2l.LearnedOptimizer(both[1], plain(net), total_steps=20))
    for a, b, shape in zip(ours, theirs, SHAPES, strict=True):
        # Not bit for bit: what tensors are told of all tensors depends on the matrices from the second step on.
        assert torch.allclose(a, b, atol=1e-5) == (matrix_shape(shape) is None or 0 in shape)
    assert [matrix_shape(shape) for shape in ((4, 2, 3), (1, 6), (6, 1), (7,), (), (0, 4))] == [(4, 6), *5 * [None]]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])  # which draw, by seeds of each tensor
def test_parts_make_no_difference(monkeypatch, state_dtype):
    net, both = network(), [parameters() for _ in range(2)]
    options = {"total_steps": 20, "state_dtype": state_dtype}
    whole = take(both[0], l2l.LearnedOptimizer(both[0], net, **options))
    launches, launch = [], operators.step_
    monkeypatch.setattr(operators, "step_", lambda *args, **options: (launches.append(1), launch(*args, **options)))
    monkeypatch.setattr(orthogonal, "PART", 60)  # matrices of 12; 210; 210; 12 and 36; 16 coordinates
    assert all(map(torch.equal, whole, take(both[1], l2l.LearnedOptimizer(both[1], net, **options))))
    assert len(launches) == 4 * (1 + 5)  # what is refused is found before the first


@pytest.mark.parametrize("order", [1, -1])
def test_beside_groups_of_other_networks(order):
    """Of as many parameters as the others have, too."""
    net, params = network(), [nn.Parameter(torch.ones(3, 4)) for _ in range(4)]
    groups = [{"params": params[:2], "network": net}, {"params": params[2:], "network": plain(net)}][::order]
    optimizer = l2l.LearnedOptimizer(groups, total_steps=20)
    take(params, optimizer, range(2))
    alone = [nn.Parameter(torch.ones(3, 4)) for _ in range(4)]
    for own, each in ((alone[:2], net), (alone[2:], plain(net))):
        other = l2l.LearnedOptimizer(own, each, total_steps=20)
        for step in range(2):
            set_gradients(alone, step)
            other.step()
    assert all(map(torch.equal, params, alone))


def test_the_scale_of_the_loss_makes_no_difference():
    net, both = network(), [parameters() for _ in range(2)]
    a = take(both[0], l2l.LearnedOptimizer(both[0], net, total_steps=20))
    optimizer = l2l.LearnedOptimizer(both[1], net, total_steps=20)
    for step in range(4):
        set_gradients(both[1], step)
        for param in both[1]:
            param.grad *= 2.0**40
        optimizer.step()
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, both[1], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_moves_nothing_else(bad):
    net, both = network(), [nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    for param in both:
        torch.manual_seed(0)
        optimizer = l2l.LearnedOptimizer([param], net, total_steps=20)
        param.grad = torch.randn(4, 6)
        if param is both[1]:
            param.grad[1, 2] = bad
        optimizer.step()
    others = torch.ones(4, 6, dtype=torch.bool)
    others[1, 2] = False
    assert both[1][others].isfinite().all()
    assert torch.allclose(both[0][others], both[1][others], atol=0.1)


def test_strides_make_no_difference():
    net = network()
    tensor = torch.randn(4, 3, 5, 5)
    forms = [tensor.clone(), tensor.contiguous(memory_format=torch.channels_last), tensor.mT.contiguous().mT]
    found = []
    for form in forms:
        param = nn.Parameter(form)
        found += take([param], l2l.LearnedOptimizer([param], net, total_steps=20))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
def test_surroundings_make_no_difference(mode):
    net, both = network(), [parameters() for _ in range(2)]
    a = take(both[0], l2l.LearnedOptimizer(both[0], net, total_steps=20))
    with MODES[mode]():
        b = take(both[1], l2l.LearnedOptimizer(both[1], net, total_steps=20))
    assert all(map(torch.equal, a, b))


def test_parameters_made_in_inference_mode_move_in_it():
    optimizer = l2l.LearnedOptimizer([nn.Parameter(torch.ones(3, 4))], network(), total_steps=20)
    with torch.inference_mode():
        param = nn.Parameter(torch.ones(3, 4), requires_grad=False)
        param.grad = torch.randn(3, 4)
        optimizer.add_param_group({"params": [param]})
        optimizer.step()
    assert not torch.equal(param, torch.ones(3, 4))
    before = param.clone()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_step_in_inference_mode_is_known_to_autograd():
    param = nn.Parameter(torch.ones(3, 4))
    loss = param.square().sum()
    param.grad = torch.ones(3, 4)
    with torch.inference_mode():
        l2l.LearnedOptimizer([param], network(), total_steps=20).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_resuming_goes_on_as_before(state_dtype):
    net, options = network(), {"total_steps": 20, "state_dtype": state_dtype}
    whole = parameters()
    expect = take(whole, l2l.LearnedOptimizer(whole, net, **options), range(6))
    half = parameters()
    optimizer = l2l.LearnedOptimizer(half, net, **options)
    take(half, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = l2l.LearnedOptimizer(half, net, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy((half, optimizer))
    sent = pickle.loads(pickle.dumps((half, optimizer)))
    for params, own in ((half, resumed), copied, sent):
        assert all(map(torch.equal, expect, take(params, own, range(3, 6))))


def test_states_of_other_networks_are_told_apart():
    net, params = network(), parameters()
    optimizer = l2l.LearnedOptimizer(params, net, total_steps=20)
    take(params, optimizer)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="type='OrthogonalLSTM'"):
        l2l.LearnedOptimizer(params, plain(net), total_steps=20).load_state_dict(saved)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.weight_orthogonal[0] += 0.1
    with pytest.warns(UserWarning, match="other weights"):
        l2l.LearnedOptimizer(params, other, total_steps=20).load_state_dict(saved)


def test_files_hold_it(tmp_path):
    net = network(output_scale=0.02, betas=(0.8, 0.95, 0.9, 0.99))
    net.save(tmp_path / "net.safetensors")
    again = l2l.load(tmp_path / "net.safetensors")
    assert type(again) is l2l.OrthogonalLSTM and again.options() == net.options()
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))


def test_it_begins_with_both_terms():
    net = l2l.OrthogonalLSTM()
    assert not any(parameter.any() for parameter in net.parameters())
    assert torch.equal(net.orthogonal_gains(torch.ones(2, 15)), torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        net.weight_orthogonal[0] = 100.0
    assert net.orthogonal_gains(torch.ones(1, 15)).log() == pytest.approx(3.0)


def test_an_interrupt_between_launch_and_end_is_noticed(monkeypatch):
    net, params = network(), parameters()
    optimizer = l2l.LearnedOptimizer(params, net, total_steps=20)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(operators, "orthogonalized", interrupt)
    set_gradients(params, 0)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="failed half-way"):
        optimizer.step()


def test_what_a_launch_would_refuse_is_refused_before_any(monkeypatch):
    """Parameters that share memory, of which the kernel would see zeros of their own instead."""
    base = torch.zeros(6, 4)
    params = [nn.Parameter(base[:4]), nn.Parameter(base[2:])]
    for param in params:
        param.grad = torch.ones(4, 4)
    optimizer = l2l.LearnedOptimizer(params, network(), total_steps=20)
    with pytest.raises(ValueError, match=r"params\[1\]|overlap|share"):
        optimizer.step()
    assert not base.any() and not optimizer.state


def test_segments_are_refused():
    params = parameters()
    optimizer = l2l.LearnedOptimizer(params, network(), total_steps=20)
    with pytest.raises(NotImplementedError, match="orthogonalizes its updates has no backward"):
        optimizer.start_segment()


@pytest.mark.parametrize("options", [{}, {"autograd": True}, {"estimator": "pes"}, {"synthetic_gradients": True}])
def test_only_evolution_trains_it(options):
    problem = Zoo("noisy-quadratic", problems=1, data="mnist-10k-embedded")
    with pytest.raises(ValueError, match="estimator: expected 'evolution' for a network that orthogonalizes"):
        l2l.MetaTrainer(network(), problem, **options)


def test_shards_by_hand_are_refused():
    param = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(NotImplementedError, match="process_group: .* whole matrices"):
        l2l.LearnedOptimizer([param], network(), total_steps=20, process_group=lambda total: None)
    optimizer = l2l.LearnedOptimizer([param], network(), total_steps=20)
    optimizer.process_group = lambda total: None
    param.grad = torch.ones(4, 3)
    with pytest.raises(NotImplementedError, match="process_group: .* whole matrices"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_inputs": 0}, "tensor_inputs: expected 1..16"),
        ({"hidden_size": 4}, "hidden_size: expected 0 with num_layers=0"),
        ({"betas": (0.9,)}, "betas: expected four"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        l2l.OrthogonalLSTM(**options)


def test_problems_side_by_side_are_matrices_of_their_own(monkeypatch):
    """An evaluation goes the way of training, whose members have no dimension of problems."""
    net, problem = network(), Zoo("teacher-regression", problems=1, rescale=False, data="mnist-10k-embedded")
    crowd = Crowd(problem.sample(3, "test"), 1, net.config, 20)
    weights = [each.detach()[None] for each in (net.phi(), *net.beside_phi())]
    curve = []
    for _ in range(20):
        crowd.theta.grad = None
        losses = crowd.losses()
        losses.sum().backward()
        curve.append(losses.item())
        crowd.step(crowd.theta.grad, *weights)
    assert l2l.meta.evaluate(net, problem, [3], 20)[0, :20].tolist() == pytest.approx(curve, rel=1e-3)
    monkeypatch.setattr(operators, "orthogonalized", None)
    assert Quadratic().sample(0, "test").side_by_side > 1  # vectors, of which there is nothing to orthogonalize
    assert l2l.meta.evaluate(net, Quadratic(), [0], 5).isfinite().all()


def test_weights_that_do_not_fit_are_refused_before_anything_is_written():
    net, params = network(), parameters()
    optimizer = l2l.LearnedOptimizer(params, net, total_steps=20)
    before = [param.detach().clone() for param in params]
    set_gradients(params, 0)
    for wrong in (torch.zeros(7), torch.zeros(1), torch.zeros(15, device="meta")):
        net.weight_orthogonal = nn.Parameter(wrong)
        with pytest.raises(ValueError, match=r"weight_orthogonal: expected shape \(15,\)"):
            optimizer.step()
    assert all(map(torch.equal, before, params)) and not optimizer.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_function_rounds_once(dtype):
    net, told = network(output_scale=1e-4), torch.linspace(-0.5, 0.5, 15)
    grad = torch.randn(9, 7).to(dtype)
    ours, _ = net(grad, net.init_state(63), tensor_inputs=told)
    wide, _ = net(grad.float(), net.init_state(63), tensor_inputs=told)
    assert ours.dtype is dtype and torch.equal(ours, wide.to(dtype))


def test_forward_derivatives():
    net, told = network(hidden_size=4, num_layers=1), torch.linspace(-0.5, 0.5, 15)
    grad = torch.randn(3, 4)

    def update(bias, net, grad, state):
        return torch.func.functional_call(net, {"bias_out": bias}, (grad, state, 1, None, told))[0]

    found = []
    for kind in (torch.float32, torch.float64):
        own = copy.deepcopy(net).to(kind)
        bias = own.bias_out.detach()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(bias, torch.ones(2, dtype=kind))
            result = update(dual, own, grad.to(kind), own.init_state(12, dtype=kind))
            found.append(torch.autograd.forward_ad.unpack_dual(result).tangent)
    assert torch.allclose(found[0].double(), found[1], rtol=1e-4, atol=1e-7) and found[1].any()


def test_it_steps_on_the_meta_device():
    net = network().to("meta")
    param = nn.Parameter(torch.empty(3, 4, device="meta"))
    param.grad = torch.empty(3, 4, device="meta")
    l2l.LearnedOptimizer([param], net, total_steps=20).step()


def test_a_noisy_weight_is_noticed():
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)

    net = network()
    assert not effective.changes_by_itself(net)
    nn.utils.parametrize.register_parametrization(net, "weight_orthogonal", Noise())
    assert effective.changes_by_itself(net)


def test_with_an_lstm_it_is_differentiable():
    """In the LSTM's weights, through what is orthogonalized; against finite differences, in float64."""
    net = network(hidden_size=4, num_layers=1, output_scale=0.5).double()
    grad, told = torch.randn(3, 4, dtype=torch.float64), torch.linspace(-1, 1, 15)

    def loss() -> torch.Tensor:
        update, _ = net(grad, net.init_state(12, dtype=torch.float64), tensor_inputs=told)
        return (update * torch.arange(12.0).view(3, 4)).sum()

    loss().backward()
    weight = net.weight_out
    found = weight.grad[1, 2].item()
    with torch.no_grad():
        weight[1, 2] += 1e-5
        above = loss()
        weight[1, 2] -= 2e-5
        assert found == pytest.approx(((above - loss()) / 2e-5).item(), rel=1e-5) and found != 0
