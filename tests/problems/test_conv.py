"""The convolutional optimizee, and problems in other units."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import l2l_fast as l2l
from l2l_fast.meta import MetaTrainer
from l2l_fast.problems import MNIST, ConvNet, Quadratic
from l2l_fast.problems.scaled import Scaled

SMALL = {"data": "mnist", "folder": "mnist-10k-embedded", "channels": (3, 4), "hidden": 5, "batch_size": 16}


def test_the_size_of_the_papers_network_on_28_pixels():
    task = ConvNet(data="mnist", folder="mnist-10k-embedded").sample(0)
    sizes = {name: value.numel() for name, value in task.named_parameters()}
    assert [sizes[f"conv{k}"] for k in range(3)] == [400, 6400, 6400]
    # Pools 28 -> 14 -> 7 -> 4; 22,682 parameters with CIFAR's three colours, of which 800 more are in the first layer.
    assert sizes["hidden"] == 32 * 16 * 4 * 4 and sum(sizes.values()) == 22_682 - 800
    groups = task.parameter_groups()
    assert groups["conv"] == ["conv0", "conv1", "conv2"]
    assert sorted(groups["conv"] + groups["fc"]) == sorted(sizes)


def test_the_loss_is_that_of_the_same_network_in_torch():
    task = ConvNet(**SMALL).sample(3)
    state = task.generator.get_state()
    x, labels = task.minibatch()
    task.generator.set_state(state)
    for k in range(2):
        name = f"conv{k}"
        x = F.conv2d(x, getattr(task, name), getattr(task, name + "_bias"), padding=2)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = ((x - mean) / (variance + 1e-3).sqrt() + getattr(task, name + "_offset").view(1, -1, 1, 1)).relu()
        x = F.max_pool2d(x, 2, ceil_mode=True)
    x = x.flatten(1) @ task.hidden.T + task.hidden_bias
    x = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-3).sqrt() + task.hidden_offset).relu()
    expected = F.cross_entropy(x @ task.out.T + task.out_bias, labels)
    torch.testing.assert_close(task(), expected, rtol=1e-4, atol=1e-5)


def test_two_networks_are_trained_each_on_its_own_parameters():
    nets = {"conv": l2l.CoordinatewiseLSTM(hidden_size=8), "fc": l2l.CoordinatewiseLSTM(hidden_size=4)}
    before = {kind: net.phi().detach().clone() for kind, net in nets.items()}
    settings = {"horizon": 4, "unroll": 2, "lr": 1e-2, "validate_every": 1, "validation_episodes": 1}
    fused = MetaTrainer(nets, ConvNet(**SMALL), **settings).fit(1, progress=False)
    assert not any(torch.equal(before[kind], fused.net[kind].phi()) for kind in before)
    again = {"conv": l2l.CoordinatewiseLSTM(hidden_size=8), "fc": l2l.CoordinatewiseLSTM(hidden_size=4)}
    with torch.no_grad():
        for kind, net in again.items():
            torch.nn.utils.vector_to_parameters(before[kind], net.parameters())
    unrolled = MetaTrainer(again, ConvNet(**SMALL), autograd=True, **settings).fit(1, progress=False)
    for kind in before:
        torch.testing.assert_close(fused.net[kind].phi(), unrolled.net[kind].phi(), rtol=1e-3, atol=1e-4)


def test_networks_for_other_kinds_are_refused():
    trainer = MetaTrainer({"conv": l2l.CoordinatewiseLSTM()}, ConvNet(**SMALL), horizon=2, unroll=2)
    with pytest.raises(ValueError, match=r"\['conv', 'fc'\]"):
        trainer.fit(1, progress=False)
    with pytest.raises(TypeError, match="net"):
        MetaTrainer({"conv": 3}, ConvNet(**SMALL))
    with pytest.raises(ValueError, match="net"):
        MetaTrainer({}, ConvNet(**SMALL))


@pytest.mark.parametrize("change", [{"data": "other"}, {"channels": ()}, {"batch_size": 1}, {"hidden": 0}])
def test_options_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ConvNet(**{**SMALL, **change})


def test_a_scaled_task_is_the_same_function_in_other_units():
    plain = Quadratic(dim=3, batch=4).sample(5)
    scaled = Scaled(Quadratic(dim=3, batch=4), width=1.0, loss=(0.5, 2.0)).sample(5)
    factor = plain.theta.detach() / scaled.theta.detach()
    c = factor.mean().item()
    a = scaled.num_problems / plain.num_problems
    assert factor.std() < 1e-5 and math.exp(-1) < c < math.exp(1) and math.exp(0.5) < a < math.exp(2)
    assert scaled().item() == pytest.approx(a * plain().item(), rel=1e-5)
    assert scaled().item() / scaled.num_problems == pytest.approx(plain().item() / plain.num_problems, rel=1e-5)
    plain().backward()
    scaled().backward()
    torch.testing.assert_close(scaled.theta.grad, a * c * plain.theta.grad, rtol=1e-4, atol=1e-6)
    assert [name for name, _ in scaled.named_parameters()] == ["theta"]


def test_only_training_tasks_are_scaled():
    problem = Scaled(MNIST(hidden=(3,), data="mnist-10k-embedded"), width=1.0)
    plain = MNIST(hidden=(3,), data="mnist-10k-embedded")
    for split in ("validation", "test"):
        assert torch.equal(problem.sample(1, split).weight_l0, plain.sample(1, split).weight_l0)
    assert not torch.equal(problem.sample(1).weight_l0, plain.sample(1).weight_l0)
    assert problem.config()["training_scales"] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="loss"):
        Scaled(plain, loss=(2.0, 1.0))
