"""NTMBFGS.from_bfgs: untrained it is the BFGS of scipy and of torch; trained, saved and deployed as any other."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast.networks import quasi_newton
from l2l_fast.problems import MNIST, Quadratic
from tests.helpers import structured_gradient

N, PROBLEMS, STEPS = 8, 5, 30


def quadratics(condition: float = 100.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hessians ``[PROBLEMS, N, N]`` with eigenvalues 1 to 1 / condition, linear terms and starts ``[PROBLEMS, N]``."""
    generator = torch.Generator().manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(PROBLEMS, N, N, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -math.log10(condition), N, dtype=torch.float64)
    vectors = torch.randn(2, PROBLEMS, N, generator=generator, dtype=torch.float64)
    return (q * eigenvalues) @ q.mT, vectors[0], vectors[1]


def rosenbrock(x: Tensor) -> Tensor:
    """Of every problem, in pairs of coordinates; minimum 0 at ones."""
    a, b = x[..., ::2], x[..., 1::2]
    return (5.0 * (b - a.square()).square() + (1.0 - a).square()).sum(-1)


def objective(name: str):
    """f of ``[..., PROBLEMS, N]`` by problem, and its starts."""
    hessian, linear, start = quadratics()
    if name == "quadratic":
        return lambda x: (x * (0.5 * (hessian.to(x) @ x[..., None]).squeeze(-1) - linear.to(x))).sum(-1), start
    return rosenbrock, 1.0 + 0.3 * start


def iterates(net: l2l.NTMBFGS, f, start: Tensor, steps: int = STEPS, lr: float = 1.0, together: bool = True) -> Tensor:
    """theta_0 ... theta_steps ``[steps + 1, PROBLEMS, N]`` of the network in LearnedOptimizer."""
    theta = nn.Parameter(start.clone())
    opt = l2l.LearnedOptimizer([theta], net, lr=lr, num_problems=PROBLEMS)
    path = [start.clone()]
    for _ in range(steps):
        opt.zero_grad()
        f(theta).sum().backward()
        opt.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def scipy_path(monkeypatch, f, start: Tensor, problem: int, lr: float, steps: int) -> Tensor:
    """scipy's BFGS with steps of a fixed length in the place of its line search."""
    optimize = pytest.importorskip("scipy.optimize")
    from scipy.optimize import _optimize

    def value(x) -> float:
        return f(torch.from_numpy(x).expand(PROBLEMS, N))[problem].item()

    def gradient(x):
        point = torch.from_numpy(x.copy()).requires_grad_()
        (found,) = torch.autograd.grad(f(point.expand(PROBLEMS, N))[problem], point)
        return found.numpy()

    def fixed(fun, grad, x, direction, old_gradient, old_value, older_value, **options):
        return lr, 0, 0, fun(x + lr * direction), old_value, grad(x + lr * direction)

    monkeypatch.setattr(_optimize, "_line_search_wolfe12", fixed)
    path = [start[problem].clone()]
    optimize.minimize(
        value,
        start[problem].numpy(),
        jac=gradient,
        method="BFGS",
        callback=lambda x: path.append(torch.from_numpy(x.copy())),
        options={"gtol": 0.0, "maxiter": steps, "xrtol": 0.0},
    )
    return torch.stack(path)


@pytest.mark.parametrize(("name", "lr"), [("quadratic", 1.0), ("quadratic", 0.5), ("rosenbrock", 0.02)])
def test_untrained_it_is_the_bfgs_of_scipy(monkeypatch, name, lr):
    f, start = objective(name)
    net = l2l.NTMBFGS.from_bfgs(initial="identity", first_step=None, growth=None, dtype=torch.float64)
    path = iterates(net, f, start, lr=lr)
    for problem in range(PROBLEMS):
        expected = scipy_path(monkeypatch, f, start, problem, lr, STEPS)
        count = min(len(expected), 20)  # scipy stops where nothing changes any more
        assert count > 10
        torch.testing.assert_close(path[:count, problem], expected[:count], rtol=1e-9, atol=1e-9)
    assert (f(path[-1]) < f(path[0])).all()


@pytest.mark.parametrize("history", [1, 3, 10])
@pytest.mark.parametrize(("name", "lr"), [("quadratic", 1.0), ("quadratic", 0.5), ("rosenbrock", 0.5)])
def test_untrained_it_is_the_lbfgs_of_torch(name, lr, history):
    f, start = objective(name)
    net = l2l.NTMBFGS.from_bfgs("low_rank", history, growth=None, dtype=torch.float64)
    path = iterates(net, f, start, lr=lr)
    for problem in range(PROBLEMS):
        theta = start[problem].clone().requires_grad_()
        opt = torch.optim.LBFGS(
            [theta], lr=lr, max_iter=1, history_size=history, tolerance_grad=0.0, tolerance_change=0.0
        )

        def closure(theta=theta, opt=opt, problem=problem) -> Tensor:
            opt.zero_grad()
            loss = f(theta.expand(PROBLEMS, N))[problem]
            loss.backward()
            return loss

        for t in range(1, 21):
            opt.step(closure)
            torch.testing.assert_close(path[t, problem], theta.detach(), rtol=1e-9, atol=1e-9)
    assert (f(path[-1]) < f(path[0])).all()


def test_the_first_pair_scales_a_memory_that_starts_at_zero():
    """Nocedal and Wright, equation 6.20, then the textbook's update 6.17."""
    f, start = objective("quadratic")
    path = iterates(l2l.NTMBFGS.from_bfgs(growth=None, dtype=torch.float64), f, start, 12)
    hessian, linear, _ = quadratics()
    for problem in range(PROBLEMS):
        theta, inverse, last = start[problem], None, None
        for t in range(12):
            g = hessian[problem] @ theta - linear[problem]
            if last is None:
                step = -g * min(1.0, 1.0 / g.abs().sum().item())
            else:
                s, y = last[0], g - last[1]
                rho, eye = 1.0 / (s @ y), torch.eye(N, dtype=torch.float64)
                inverse = (s @ y) / (y @ y) * eye if inverse is None else inverse
                left = eye - rho * torch.outer(s, y)
                inverse = left @ inverse @ left.T + rho * torch.outer(s, s)
                step = -inverse @ g
            theta, last = theta + step, (step, g)
            torch.testing.assert_close(path[t + 1, problem], theta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_a_step_is_safe(kind):
    """Pairs without curvature are skipped, the first step and what a bad pair asks for are cut."""
    net = l2l.NTMBFGS.from_bfgs(kind, history=3, growth=2.0)
    theta = nn.Parameter(torch.zeros(2, 3))
    opt = l2l.LearnedOptimizer([theta], net, num_problems=2)
    theta.grad = torch.tensor([[100.0, -300.0, 0.0], [0.1, 0.2, 0.3]])
    opt.step()
    assert theta[0].abs().sum().item() == pytest.approx(1.0)  # cut to this 1-norm
    torch.testing.assert_close(theta[1].detach(), torch.tensor([-0.1, -0.2, -0.3]))  # short enough
    before = {name: value.clone() for name, value in opt.state[theta].items() if "matrix" in name or "left" in name}
    first = theta.detach().clone()
    theta.grad = torch.tensor([[200.0, -600.0, 0.0], [0.0999, 0.1998, 0.2997]])  # no curvature; hardly any
    opt.step()
    after = opt.state[theta]
    assert all(torch.equal(value[0], after[name][0]) for name, value in before.items())
    assert all(not torch.equal(value[1], after[name][1]) for name, value in before.items())
    moved = theta.detach() - first
    assert moved[1].norm().item() == pytest.approx(2.0 * first[1].norm().item(), rel=1e-5)  # not a thousand times


@pytest.mark.parametrize("lr", [0.05, 0.5])
@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_small_rates_do_not_freeze_it(kind, lr):
    """The bound is of steps, which are lr times the update: an lr below 1 / growth must not shrink them for ever."""
    scale = torch.logspace(0, 1, 10, dtype=torch.float64)
    param = nn.Parameter(torch.ones(10, dtype=torch.float64))
    opt = l2l.LearnedOptimizer([param], l2l.NTMBFGS.from_bfgs(kind, 10), lr=lr)
    losses = []
    for _ in range(200):
        opt.zero_grad()
        loss = (scale * param.square()).sum()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


def trained(net: l2l.NTMBFGS, seed: int = 0) -> l2l.NTMBFGS:
    """With a read-out that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (net.weight_out, net.bias_out):
            parameter.copy_((torch.rand(parameter.shape, generator=generator) - 0.5).to(parameter.dtype))
    return net


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_files_and_copies(kind, tmp_path):
    net = trained(l2l.NTMBFGS.from_bfgs(kind, 4, first_step=0.5, growth=None, hidden_size=8, gac_cells=2))
    net.save(tmp_path / "net.safetensors")
    loaded = l2l.load(tmp_path / "net.safetensors")
    f, start = objective("quadratic")
    for other in (loaded, copy.deepcopy(net)):
        assert type(other) is l2l.NTMBFGS and other.options() == net.options() and torch.equal(other.phi(), net.phi())
        assert torch.equal(iterates(other, f, start.float(), 5), iterates(net, f, start.float(), 5))


def test_other_networks_are_as_they_were():
    net = l2l.NTMBFGS()
    assert "heads" not in net.options() and not net.moves
    del net.heads_kind, net.safeguards  # a pickle of an earlier release has neither
    assert "heads" not in copy.deepcopy(net).options() and not net.moves
    net(torch.ones(4), net.init_state(4), net.init_memory(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_deployed_it_takes_the_steps_that_it_is_trained_with(kind, dtype):
    """LearnedOptimizer on several tensors, several problems; the functional step on all of them as one."""
    from l2l_fast.kernels import reference

    net = trained(l2l.NTMBFGS.from_bfgs(kind, 3, hidden_size=8, dtype=dtype))
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((4, 6), (2, 3), (2,))]
    numels = [param.numel() for param in params]
    opt = l2l.LearnedOptimizer(params, net, num_problems=2)
    state, memory = net.init_state(sum(numels), dtype=dtype), net.init_memory(sum(numels), 2, dtype=dtype)
    theta = torch.zeros(sum(numels), dtype=dtype)
    for t in range(6):
        for k, param in enumerate(params):
            param.grad = structured_gradient(param.shape, seed=10 * t + k).to(dtype) + 0.3 * param.detach()
        grad = reference.join([param.grad.flatten() for param in params], 2)
        update, state, memory = net(grad, state, memory)
        theta = theta + update.detach()
        opt.step()
        expected = reference.separate(theta, numels, 2)
        for param, value in zip(params, expected, strict=True):
            torch.testing.assert_close(param.detach(), value.view(param.shape), rtol=2e-4, atol=2e-5)


def test_rate_decay_and_maximize_reach_the_memory():
    """The step that a pair belongs to is the one that was taken: lr, weight decay and the sign included."""
    net = l2l.NTMBFGS.from_bfgs(growth=None, dtype=torch.float64)
    theta = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    opt = l2l.LearnedOptimizer([theta], net, lr=0.25, weight_decay=0.1, maximize=True)
    for _ in range(2):
        before = theta.detach().clone()
        theta.grad = -theta.detach() * torch.tensor([1.0, 3.0], dtype=torch.float64)
        opt.step()
        reads = opt.state[theta]["memory_reads"]
        torch.testing.assert_close(reads[1, 0], theta.detach() - before)
        torch.testing.assert_close(reads[2, 0], theta.detach() - before)
        torch.testing.assert_close(reads[0, 0], -theta.grad)
        if not opt.state[theta]["memory_matrix"].any():  # the first step: along the gradient, cut to a 1-norm of 1
            seen = -theta.grad
            torch.testing.assert_close(reads[1, 0], -0.25 * seen / seen.abs().sum() - 0.25 * 0.1 * before)
    assert opt.state[theta]["memory_matrix"].any()


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_a_checkpoint_continues_exactly(kind):
    net = trained(l2l.NTMBFGS.from_bfgs(kind, 3, hidden_size=8))
    params = [nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(2))]
    opt = l2l.LearnedOptimizer(params, net)

    def step(optimizer: l2l.LearnedOptimizer, its: list[nn.Parameter], t: int) -> None:
        for k, param in enumerate(its):
            param.grad = structured_gradient(param.shape, seed=10 * t + k) + param.detach()
        optimizer.step()

    for t in range(4):
        step(opt, params, t)
    copies = copy.deepcopy(params)
    other = l2l.LearnedOptimizer(copies, net)
    other.load_state_dict(opt.state_dict())
    for t in (4, 5):
        step(opt, params, t)
        step(other, copies, t)
    assert all(map(torch.equal, params, copies))
    free = l2l.NTMBFGS(memory=kind, history=3, hidden_size=8, read_heads=3, write_heads=net.write_heads)
    with pytest.raises(ValueError, match="heads='bfgs', now heads='free'"):
        l2l.LearnedOptimizer(copies, free).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_a_coordinate_that_is_not_finite_stays_alone(kind, dtype):
    param = nn.Parameter(torch.zeros(20, dtype=dtype))
    opt = l2l.LearnedOptimizer([param], trained(l2l.NTMBFGS.from_bfgs(kind, 3)), num_problems=2)
    for t in range(5):
        param.grad = structured_gradient((20,), seed=t).to(dtype)
        if t == 1:
            param.grad[3] = torch.nan
        opt.step()
    assert param.isnan().nonzero().flatten().tolist() == [3]
    assert all(v.isfinite().all() for name, v in opt.state[param].items() if name.startswith("memory_"))


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_the_gate_is_a_factor_on_the_pair(kind):
    """(I - w rho s y^T) M (I - w rho y s^T) + w rho s s^T, for a memory of one pair before."""
    generator = torch.Generator().manual_seed(1)
    first, s = (torch.randn(2, N, generator=generator, dtype=torch.float64) for _ in range(2))
    factor = torch.randn(N, N, generator=generator, dtype=torch.float64)
    hessian = factor @ factor.T / N + 0.5 * torch.eye(N, dtype=torch.float64)
    memory = l2l.NTMBFGS.from_bfgs(kind, 4).init_memory(2 * N, 2, dtype=torch.float64)
    one, gate = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[0.3], [1.7]], dtype=torch.float64)
    memory = quasi_newton._write(memory, first, first @ hessian, one, 0.0)
    memory = quasi_newton._write(memory, s, s @ hessian, gate, 0.0)
    eye, r = torch.eye(N, dtype=torch.float64), torch.randn(2, N, generator=generator, dtype=torch.float64)
    for k in range(2):
        newest = first[k] if kind == "dense" else s[k]  # of the pair that scales
        y = hessian @ newest
        matrix = (newest @ y) / (y @ y) * eye
        for x, w in ((first[k], 1.0), (s[k], gate[k].item())):
            y = hessian @ x
            left = eye - w / (x @ y) * torch.outer(x, y)
            matrix = left @ matrix @ left.T + w / (x @ y) * torch.outer(x, x)
        torch.testing.assert_close(quasi_newton._read(memory, r)[k], matrix @ r[k])


def test_the_lag_measures_pairs_from_an_average():
    """average = now + lag * (average - now), of theta and of gradients alike; on a quadratic a pair is a pair."""
    net = l2l.NTMBFGS.from_bfgs(hidden_size=8, growth=None, dtype=torch.float64)
    with torch.no_grad():
        net.bias_out[4] = 0.6
    lag = math.tanh(quasi_newton.SCALE * 0.6)
    hessian = torch.diag(torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64))
    theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    opt = l2l.LearnedOptimizer([theta], net)
    averages = None
    for _ in range(5):
        now = torch.stack([theta.detach(), hessian @ theta.detach()])
        averages = now if averages is None else now + lag * (averages - now)
        theta.grad = now[1].clone()
        opt.step()
        reads = opt.state[theta]["memory_reads"][:, 0]
        torch.testing.assert_close(reads[0], averages[1])
        torch.testing.assert_close(reads[1], theta.detach() - averages[0])


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_meta_training_goes_on_from_there(kind):
    torch.manual_seed(0)
    net = l2l.NTMBFGS.from_bfgs(kind, 4, hidden_size=8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    problem = Quadratic(dim=6, batch=16, family="ill_conditioned")
    trainer = l2l.MetaTrainer(
        net, problem, 10, 5, 1e-2, clip_norm=1.0, validate_every=0, meta_loss=lambda trace: trace.losses.log().mean()
    )
    first = trainer.evaluate(1, best=False)[0, -1]
    trainer.fit(15, progress=False)
    assert trainer.evaluate(1, best=False)[0, -1] < 0.97 * first
    assert all(not torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_logistic_regression_on_digits_in_low_rank():
    problem = MNIST(hidden=(), batch_size=64)
    net = l2l.NTMBFGS.from_bfgs("low_rank", 5, hidden_size=4, num_layers=1)
    trainer = l2l.MetaTrainer(net, problem, 6, 3, 1e-3, clip_norm=1.0, validate_every=0)
    curve = trainer.evaluate(1, best=False)[0]
    assert curve[-1] < 0.75 * curve[0]
    trainer.fit(1, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"memory": "sparse"}, ValueError, "memory"),
        ({"history": 0}, ValueError, "history"),
        ({"initial": "random"}, ValueError, "initial"),
        ({"memory": "low_rank", "initial": "identity"}, ValueError, "initial"),
        ({"first_step": 0.0}, ValueError, "first_step"),
        ({"first_step": "one"}, TypeError, "first_step"),
        ({"curvature": -1.0}, ValueError, "curvature"),
        ({"curvature": None}, TypeError, "curvature"),
        ({"growth": math.inf}, ValueError, "growth"),
        ({"growth": -2.0}, ValueError, "growth"),
        ({"hidden_size": 2}, ValueError, "hidden_size"),
    ],
)
def test_wrong_options_are_refused(options, error, name):
    with pytest.raises(error, match=name):
        l2l.NTMBFGS.from_bfgs(**options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"heads": "newton"}, "heads"),
        ({"growth": 2.0}, "growth"),
        ({"curvature": 1e-3}, "curvature"),
        ({"heads": "bfgs", "read_heads": 1}, "read_heads"),
        ({"heads": "bfgs", "read_heads": 3, "write_heads": 2}, "write_heads"),
        ({"heads": "bfgs", "read_heads": 3, "add_read": True}, "add_read"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        l2l.NTMBFGS(**options)


@pytest.mark.parametrize("memory", ["dense", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_empty_tensors_alone(memory, dtype):
    param = torch.nn.Parameter(torch.zeros(0, 3, dtype=dtype))
    optimizer = l2l.LearnedOptimizer([param], l2l.NTMBFGS.from_bfgs(memory))
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
