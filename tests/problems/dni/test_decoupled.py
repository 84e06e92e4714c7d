"""Gradients of decoupled chains: against back-propagation, against the equations, and where nothing may leak."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast import dni


class TrueGradient(nn.Module):
    """Runs the modules above and gives dL / d activity, exactly; ``of`` holds them as a list, so that they are no
    submodules."""

    def __init__(self, above: list[nn.Module], loss):
        super().__init__()
        self.of = [above, loss]

    def forward(self, activity: Tensor) -> Tensor:
        above, loss = self.of
        leaf = activity.detach().requires_grad_()
        out = leaf
        for module in above:
            out = module(out)
        return torch.autograd.grad(loss(out), leaf)[0]


class Fixed(nn.Module):
    """Always the same prediction, which is a parameter."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, activity: Tensor) -> Tensor:
        return self.value


def chain(dtype=torch.float64, sizes=(5, 7, 6, 4, 3)) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(a, b), nn.Tanh()).to(dtype) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]


def batch(dtype=torch.float64, size=8, inputs=5, classes=3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, inputs, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (size,), generator=generator)


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters()]


def backprop(modules: list[nn.Module], x: Tensor, loss) -> list[Tensor]:
    """Gradients with respect to all parameters."""
    out = x
    for module in modules:
        out = module(out)
    return list(torch.autograd.grad(loss(out), [p for module in modules for p in module.parameters()]))


def test_with_the_true_gradient_it_is_back_propagation():
    modules = chain()
    x, y = batch()

    def loss(out):
        return F.cross_entropy(out, y)

    oracles = [TrueGradient(modules[i + 1 :], loss) for i in range(3)]
    net = dni.Decoupled(modules, predictors=oracles, gradient_scale=1.0)
    found = net.backward(x, loss)
    expected = backprop(modules, x, loss)
    for got, want in zip([p.grad for p in net.module_parameters()], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.loss, loss(net(x)).detach())
    # And the oracle's predictions are what it would be trained towards.
    assert found.predictor_losses.max() < 1e-24


@pytest.mark.parametrize("num_classes", [None, 3])
def test_at_first_only_the_last_module_moves(num_classes):
    modules = chain()
    x, y = batch()
    net = dni.Decoupled(modules, x, num_classes=num_classes)
    net.backward(x, F.cross_entropy, y)
    for module in modules[:-1]:
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(module))
    last = modules[-1]
    want = backprop([last], nn.Sequential(*modules[:-1])(x).detach(), lambda out: F.cross_entropy(out, y))
    assert all(torch.equal(got, g) for got, g in zip(grads(last), want, strict=True))
    # The topmost predictor is told something, those below it that nothing is known.
    told = [stage.predictor.out.bias.grad.abs().sum().item() for stage in net.stages[:-1]]
    assert told[0] == told[1] == 0.0 and told[2] > 0.0


@pytest.mark.parametrize("scale", [1.0, "batch", 3.5])
def test_predictors_are_trained_towards_the_next_prediction_carried_back(scale):
    modules = chain(sizes=(5, 4, 6, 3))
    x, y = batch()
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (4, 6)]
    net = dni.Decoupled(modules, predictors=[Fixed(v) for v in values], gradient_scale=scale)
    found = net.backward(x, F.cross_entropy, y)

    factor = 8.0 if scale == "batch" else scale
    h0 = modules[0](x).detach().requires_grad_()
    h1 = modules[1](h0)
    first = torch.autograd.grad(h1, h0, values[1] / factor)[0]  # M_1(h_1) dh_1 / dh_0
    h1 = h1.detach().requires_grad_()
    second = torch.autograd.grad(F.cross_entropy(modules[2](h1), y), h1)[0]  # the true gradient
    for stage, value, target, error in zip(net.stages, values, (first, second), found.predictor_losses, strict=False):
        # of sum (value - factor target)^2 / 8
        want = 2 * (value - factor * target) / 8
        torch.testing.assert_close(stage.predictor.value.grad, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(error, (value - factor * target).square().sum() / 8, rtol=1e-12, atol=1e-12)
    # Modules follow the predictions: dL / d theta_0 = M_0(h_0) dh_0 / d theta_0.
    weight = modules[0][0].weight
    want = torch.autograd.grad(modules[0](x), weight, values[0] / factor)[0]
    torch.testing.assert_close(weight.grad, want, rtol=1e-12, atol=1e-12)


def test_nothing_but_its_own_error_moves_a_predictor_and_nothing_but_predictions_move_a_module():
    # A target that was not detached would reach the modules above and the predictor there; a prediction that was not
    # would be trained by what it does.
    modules = chain()
    x, y = batch()
    net = dni.Decoupled(modules, x)
    for stage in net.stages[:-1]:
        nn.init.normal_(stage.predictor.out.weight)
    net.backward(x, F.cross_entropy, y)
    first = [p.grad.clone() for p in net.parameters()]
    alone = copy.deepcopy(net)
    alone.zero_grad()
    local = alone.stages[0].advance(x, first=True)
    assert all(p.grad is None for p in alone.stages[0].predictor.parameters())
    above = alone.stages[1].advance(local.output)
    assert not local.output.requires_grad and not above.input_gradient.requires_grad
    module_before = [g.clone() for stage in alone.stages[:2] for g in grads(stage.module)]
    alone.stages[0].fit(local.prediction, above.input_gradient)
    assert all(p.grad is None for p in alone.stages[1].predictor.parameters())
    after = [g for stage in alone.stages[:2] for g in grads(stage.module)]
    assert all(torch.equal(a, b) for a, b in zip(module_before, after, strict=True))
    for got, want in zip(grads(alone.stages[0]), grads(net.stages[0]), strict=True):
        assert torch.equal(got, want)
    assert len(first) == sum(1 for _ in net.parameters())


def test_one_module_is_back_propagation_bit_for_bit():
    module = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    plain = copy.deepcopy(module)
    x, y = batch(torch.float32)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    net = dni.Decoupled([module], num_classes=3)
    found = net.backward(mine * 1.0, F.cross_entropy, y)
    loss = F.cross_entropy(plain(theirs * 1.0), y)
    loss.backward()
    assert torch.equal(found.loss, loss) and found.predictor_losses.shape == (0,)
    assert torch.equal(mine.grad, theirs.grad)
    assert all(torch.equal(a, b) for a, b in zip(grads(module), grads(plain), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), plain.buffers(), strict=True))


def test_gradients_add_up_as_those_of_backward_do():
    x, y = batch()
    net = dni.Decoupled(chain(), x, num_classes=3)
    for stage in net.stages[:-1]:
        nn.init.normal_(stage.predictor.out.weight)
    net.backward(x, F.cross_entropy, y)
    once = [p.grad.clone() for p in net.parameters()]
    net.backward(x, F.cross_entropy, y)
    for p, g in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_a_linear_predictor_of_a_linear_network_learns_the_true_gradient():
    # L = mean |W1 W0 x - t|^2 / 2 with t = A x: dL / dh is linear in h if W0 can be inverted.
    generator = torch.Generator().manual_seed(3)
    modules = [nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()]
    teacher = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    for module in modules:
        nn.init.orthogonal_(module.weight)
        module.requires_grad_(False)
    predictor = dni.Predictor(4, hidden=()).double()
    net = dni.Decoupled(modules, predictors=[predictor])
    opt = torch.optim.SGD(net.predictor_parameters(), lr=0.1)

    def loss_fn(out, target):
        return (out - target).square().sum() / (2 * len(out))

    for _ in range(300):
        x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
        opt.zero_grad()
        error = net.backward(x, loss_fn, x @ teacher.T).predictor_losses
        opt.step()
    w0, w1 = (module.weight for module in modules)
    want = w1.T @ (w1 - teacher @ torch.linalg.inv(w0))  # of the loss's sum, as a map of h
    torch.testing.assert_close(predictor.out.weight.detach(), want, rtol=1e-6, atol=1e-6)
    assert error < 1e-10


def test_a_module_is_updated_before_the_next_one_is_called():
    x, y = batch()
    modules = chain()
    net = dni.Decoupled(modules, x, num_classes=3)
    for stage in net.stages[:-1]:
        nn.init.normal_(stage.predictor.out.weight, std=0.1)
    whole = copy.deepcopy(net)
    whole.backward(x, F.cross_entropy, y)
    events = []
    for index, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, index=index: events.append(f"call {index}"))
    units = net.units()
    assert {id(p) for unit in units for p in unit} == {id(p) for p in net.parameters()}
    before = [unit[0].clone() for unit in units]
    optimizers = [torch.optim.SGD(unit, lr=0.1) for unit in units]
    for update in net.updates(x, F.cross_entropy, y):
        optimizers[update.index].step()
        assert not torch.equal(units[update.index][0], before[update.index])
        events.append(f"update {update.index}")
    assert events == [f"{what} {index}" for index in range(4) for what in ("call", "update")]
    # What came out is what one pass without updates gives: the update of a module changes nothing above it.
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("make", ["adam", "learned"])
def test_training_works_in_one_step_over_everything(make):
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(256, 5, generator=generator)
    y = (x @ torch.randn(5, 3, generator=generator)).argmax(1)
    modules = [nn.Sequential(nn.Linear(n, 32), nn.ReLU()) for n in (5, 32)] + [nn.Linear(32, 3)]
    net = dni.Decoupled(modules, x, num_classes=3, predictor=lambda shape, n: dni.Predictor(shape[0], n, (64,)))
    if make == "adam":
        opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    else:
        opt = l2l.LearnedOptimizer(net.parameters(), l2l.load_pretrained("general"), total_steps=150)
    start = [p.detach().clone() for p in net.parameters()]
    losses = []
    for _ in range(150):
        opt.zero_grad()
        losses.append(net.backward(x, F.cross_entropy, y).loss.item())
        opt.step()
    assert losses[-1] < 0.2 * losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(start, net.parameters(), strict=True))


def test_it_can_be_copied_pickled_and_loaded_after_a_pass(tmp_path):
    x, y = batch(torch.float32)
    net = dni.Decoupled(chain(torch.float32), x, num_classes=3)
    net.backward(x, F.cross_entropy, y)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other.zero_grad()
        other.backward(x, F.cross_entropy, y)
        assert all(torch.equal(a, b) for a, b in zip(grads(net), grads(other), strict=True))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    fresh = dni.Decoupled(chain(torch.float32), x, num_classes=3)
    fresh.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    net.eval(), fresh.eval()
    assert torch.equal(net(x), fresh(x))


def test_what_modules_share_is_one_parameter_of_the_last_unit_that_completes_it():
    torch.manual_seed(0)
    tied, head, predictor = nn.Linear(4, 4), nn.Linear(4, 3), dni.predictor_for((4,), hidden=(5,))
    net = dni.Decoupled([tied, nn.Tanh(), tied, head], predictors=[predictor, dni.predictor_for((4,)), predictor])
    every = [id(each) for each in net.parameters()]
    for found in ([*net.module_parameters(), *net.predictor_parameters()], [each for u in net.units() for each in u]):
        assert sorted(map(id, found)) == sorted(every)
    units = [[id(each) for each in unit] for unit in net.units()]
    assert not units[0] and {id(each) for each in tied.parameters()} <= {*units[2]}
    assert {id(each) for each in predictor.parameters()} <= {*units[3]}
    optimizer = torch.optim.SGD(net.module_parameters(), lr=0.1)  # warns of a parameter that comes twice
    net.backward(torch.randn(6, 4), F.cross_entropy, torch.randint(3, (6,)))
    optimizer.step()


def test_a_single_sample_cannot_be_normalized():
    net = dni.Decoupled([nn.Linear(4, 4), nn.Linear(4, 3)], torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"activity: expected at least two samples, .* got shape \(1, 4\);"):
        net.backward(torch.randn(1, 4), F.cross_entropy, torch.tensor([0]))
    assert all(each.grad is None for each in net.parameters())
    dni.Predictor(4, hidden=(), batch_norm=True)(torch.randn(1, 4))
    dni.Predictor(4).eval()(torch.randn(1, 4))
    dni.ConvPredictor(2)(torch.randn(1, 2, 3, 3))
    with pytest.raises(ValueError, match="activity: expected at least two"):
        dni.ConvPredictor(2)(torch.randn(1, 2, 1, 1))


def test_labels_that_nobody_would_read_are_refused():
    batch = (torch.randn(6, 4), F.cross_entropy, torch.randint(3, (6,)))
    net = dni.Decoupled([nn.Linear(4, 4), nn.Linear(4, 3)], torch.randn(2, 4))
    with pytest.raises(TypeError, match="labels: expected none, as predictors were made without num_classes"):
        net.backward(*batch, labels=batch[2])
    alone = dni.Decoupled([nn.Linear(4, 3)], num_classes=3)
    with pytest.raises(TypeError, match="labels: expected a tensor of classes"):
        alone.backward(*batch, labels="nonsense")
    alone.backward(*batch)
