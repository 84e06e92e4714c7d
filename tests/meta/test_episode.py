"""The meta-gradients of an episode: fused against autograd, both against float64 and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta import Protocol, SegmentTrace
from l2l_fast.meta.estimators import AutogradBPTT, FusedBPTT, weighted_sum
from l2l_fast.problems import MNIST, ModuleProblem, Quadratic
from tests.helpers import assert_close, random_network

HORIZON, UNROLL = 7, 3
fused_episode, autograd_episode = FusedBPTT().episode, AutogradBPTT().episode


def small_quadratic() -> Quadratic:
    return Quadratic(dim=3, batch=5, init_std=0.3)


def gradients(run, task, net, protocol):
    """The meta-gradient of every segment (phi held still), and the losses."""
    collected = []

    def meta_step():
        collected.append(torch.cat([parameter.grad.reshape(-1).clone() for parameter in net.parameters()]))
        net.zero_grad()

    losses = run(task, net, protocol, meta_step)
    return collected, torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, "final", lambda t: 0.5 * t, [0, 0, 0, 1, 0, 0, 2]])
@pytest.mark.parametrize("preprocess", ["identity", "log_sign"])
@pytest.mark.parametrize("problem", [small_quadratic(), MNIST(hidden=(3,), batch_size=8)], ids=lambda p: p.name)
def test_fused_and_autograd_give_the_same_meta_gradients(problem, preprocess, weights):
    net = random_network(hidden_size=6, preprocess=preprocess, output_scale=0.1)
    protocol = Protocol.make(HORIZON, UNROLL, weights)
    fused, fused_losses = gradients(fused_episode, problem.sample(1), net, protocol)
    unrolled, unrolled_losses = gradients(autograd_episode, problem.sample(1), net, protocol)
    assert len(fused) == len(unrolled) == (2 if isinstance(weights, list) else 3)
    torch.testing.assert_close(fused_losses, unrolled_losses, rtol=1e-5, atol=1e-6)
    for one, other in zip(fused, unrolled):
        assert one.abs().max() > 0
        assert_close(one, other, 1e-4)


def test_float64_optimizees_agree_with_float32():
    net = random_network(hidden_size=6, preprocess="identity", output_scale=0.1)
    protocol = Protocol.make(HORIZON, UNROLL)
    single, _ = gradients(fused_episode, small_quadratic().sample(1), net, protocol)
    double, _ = gradients(fused_episode, small_quadratic().sample(1).double(), copy.deepcopy(net).double(), protocol)
    unrolled, _ = gradients(autograd_episode, small_quadratic().sample(1).double(), net.double(), protocol)
    for one, two, three in zip(single, double, unrolled):
        assert_close(one, two, 1e-4)
        assert_close(three, two, 1e-10)


def numerical_gradient(net, protocol, epsilon=1e-6):
    """Central differences of the true mean loss of one segment, all dependencies included."""

    def objective():
        _, losses = gradients(fused_episode, small_quadratic().sample(1).double(), net, protocol)
        return (losses[1:] * torch.tensor(protocol.weights, dtype=torch.float64)).sum()

    result = []
    for parameter in net.parameters():
        flat = parameter.data.view(-1)
        for k in range(flat.numel()):
            value = flat[k].item()
            flat[k] = value + epsilon
            above = objective()
            flat[k] = value - epsilon
            below = objective()
            flat[k] = value
            result.append((above - below) / (2 * epsilon))
    return torch.stack(result)


def test_second_derivatives_make_the_meta_gradient_exact():
    net = random_network(hidden_size=4, num_layers=1, preprocess="identity", output_scale=0.1).double()
    task = small_quadratic().sample(1).double()
    exact, _ = gradients(autograd_episode, task, net, Protocol.make(3, 3, second_derivatives=True))
    dropped, _ = gradients(autograd_episode, task, net, Protocol.make(3, 3))
    numerical = numerical_gradient(net, Protocol.make(3, 3))
    assert_close(exact[0], numerical, 1e-6)
    assert (dropped[0] - numerical).norm() > 0.01 * numerical.norm()


def test_second_derivatives_run_through_the_kernel_too():
    net = random_network(hidden_size=4, preprocess="log_sign", output_scale=0.1)
    protocol = Protocol.make(4, 2, second_derivatives=True)
    single, _ = gradients(autograd_episode, small_quadratic().sample(1), net, protocol)
    double, _ = gradients(autograd_episode, small_quadratic().sample(1).double(), net.double(), protocol)
    for one, two in zip(single, double):
        assert_close(one, two, 1e-3)


def test_a_custom_meta_loss_sees_the_segment():
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.1)
    protocol = Protocol.make(HORIZON, UNROLL, lambda t: t / 10)
    seen = []

    def log_loss(trace: SegmentTrace) -> torch.Tensor:
        seen.append((trace.start, trace.end, trace.losses.detach(), trace.weights))
        again = torch.func.functional_call(trace.task, trace.parameters, ()) / trace.task.num_problems
        torch.testing.assert_close(again, trace.losses[-1])  # quadratics have no minibatches
        return trace.losses[1:].log().mean()

    custom, losses = gradients(AutogradBPTT(log_loss).episode, small_quadratic().sample(1), net, protocol)
    assert [(start, end) for start, end, _, _ in seen] == [(0, 3), (3, 6), (6, 7)]
    torch.testing.assert_close(torch.cat([seen[0][2], seen[1][2][1:], seen[2][2][1:]]).double(), losses)
    torch.testing.assert_close(torch.cat([item[3] for item in seen]), torch.arange(1, 8) / 10)
    # The same gradient by the chain rule: weights 1 / (T f(theta_t)), frozen.
    frozen = [1 / (3 * losses[t].item()) for t in range(1, 7)] + [1 / losses[7].item()]
    expected, _ = gradients(autograd_episode, small_quadratic().sample(1), net, Protocol.make(HORIZON, UNROLL, frozen))
    for one, other in zip(custom, expected):
        assert_close(one, other, 1e-4)


def test_the_default_meta_loss_can_be_given_as_a_custom_one():
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.1)
    protocol = Protocol.make(HORIZON, UNROLL, "final")
    one, _ = gradients(autograd_episode, small_quadratic().sample(1), net, protocol)
    other, _ = gradients(AutogradBPTT(weighted_sum).episode, small_quadratic().sample(1), net, protocol)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize(
    ("meta_loss", "message"), [(lambda trace: 1.0, "scalar"), (lambda trace: trace.losses, "scalar")]
)
def test_a_meta_loss_must_return_a_scalar_tensor(meta_loss, message):
    net = random_network(hidden_size=4, preprocess="identity")
    with pytest.raises(ValueError, match=f"meta_loss.*{message}"):
        AutogradBPTT(meta_loss).episode(small_quadratic().sample(1), net, Protocol.make(2, 2), lambda: None)


def test_a_meta_loss_must_depend_on_phi():
    net = random_network(hidden_size=4, preprocess="identity")
    constant = torch.tensor(1.0)
    with pytest.raises(ValueError, match="does not depend"):
        AutogradBPTT(lambda trace: constant).episode(
            small_quadratic().sample(1), net, Protocol.make(2, 2), lambda: None
        )


@pytest.mark.parametrize("run", [fused_episode, autograd_episode])
def test_each_point_is_evaluated_once(run):
    calls = []

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        calls.append(1)
        return module.weight.square().sum()

    task = ModuleProblem(lambda generator: nn.Linear(3, 1, bias=False), loss).sample(0)
    run(task, random_network(hidden_size=4), Protocol.make(HORIZON, UNROLL), lambda: None)
    assert len(calls) == HORIZON + 1


@pytest.mark.parametrize("run", [fused_episode, autograd_episode])
def test_any_module_trains_even_with_unused_parameters_and_batch_norm(run):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
            )
            self.unused = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return self.features(x)

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        images = torch.randn(4, 1, 8, 8, generator=generator)
        return F.cross_entropy(module(images), torch.arange(4) % 3)

    net = random_network(hidden_size=4)
    problem = ModuleProblem(lambda generator: Net(), loss)
    collected, losses = gradients(run, problem.sample(0), net, Protocol.make(4, 2))
    expected, _ = gradients(fused_episode, problem.sample(0), net, Protocol.make(4, 2))
    assert losses.isfinite().all()
    for one, other in zip(collected, expected):
        assert_close(one, other, 1e-3)


def test_losses_after_a_divergence_count_as_infinite():
    net = random_network(hidden_size=4, preprocess="identity", output_scale=1e30)
    _, losses = gradients(fused_episode, small_quadratic().sample(1), net, Protocol.make(6, 3))
    assert losses[0].isfinite()
    assert (losses[2:] == torch.inf).all()


def test_protocol_cuts_and_weights():
    assert Protocol.make(7, 3).segments() == [(0, 3), (3, 6), (6, 7)]
    assert Protocol.make(7, 3, "final").weights == (0, 0, 1, 0, 0, 1, 1)
    assert Protocol.make(3, 3, torch.tensor([0.0, 1.0, 2.0])).weights == (0, 1, 2)
    assert Protocol.make(3, 1, lambda t: t).weights == (1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1), ValueError, "horizon"),
        ((10.0, 1), TypeError, "horizon"),
        ((10, 11), ValueError, "unroll"),
        ((10, True), TypeError, "unroll"),
        ((2, 1, "last"), ValueError, "weights"),
        ((2, 1, [1.0]), ValueError, "weights: expected 2 values"),
        ((2, 1, [1.0, -1.0]), ValueError, "weights"),
        ((2, 1, [0.0, 0.0]), ValueError, "weights"),
        ((2, 1, [float("nan"), 1.0]), ValueError, "weights"),
        ((2, 1, 3), TypeError, "weights"),
        ((2, 1, None, 1), TypeError, "second_derivatives"),
    ],
)
def test_protocol_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        Protocol.make(*arguments)


def test_evaluation_is_the_training_loop_with_phi_frozen():
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.1)
    losses = l2l.meta.evaluate(net, small_quadratic(), [3, 4], 6, split="train")
    for seed, row in zip([3, 4], losses):
        _, expected = gradients(fused_episode, small_quadratic().sample(seed), net, Protocol.make(6, 6))
        torch.testing.assert_close(row, expected)
    with pytest.raises(ValueError, match="seeds"):
        l2l.meta.evaluate(net, small_quadratic(), [], 6)
    with pytest.raises(ValueError, match="horizon"):
        l2l.meta.evaluate(net, small_quadratic(), [1], 0)
