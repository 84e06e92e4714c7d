"""The MNIST perceptron: its shapes, its loss and its minibatches (Andrychowicz et al. 2016, section 3.2)."""

import math

import pytest
import torch
from torch import nn

from l2l_fast.problems import MNIST, get


def plain_network(task: nn.Module, activation: type[nn.Module]) -> nn.Sequential:
    """The same network out of torch's layers, with the task's parameters."""
    parameters = list(task.parameters())
    layers: list[nn.Module] = []
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        layer.weight.data.copy_(weight.data)
        layer.bias.data.copy_(bias.data)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    ("hidden", "count"), [((20,), 15_910), ((40,), 31_810), ((20, 20), 16_330), ((), 7_850)], ids=str
)
def test_parameter_counts_of_the_paper(hidden, count) -> None:
    task = MNIST(hidden=hidden).sample(0)
    assert sum(parameter.numel() for parameter in task.parameters()) == count
    names = [f"{kind}_l{k}" for k in range(len(hidden) + 1) for kind in ("weight", "bias")]
    assert [name for name, _ in task.named_parameters()] == names


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("sigmoid", nn.Sigmoid),
        ("relu", nn.ReLU),
        ("tanh", nn.Tanh),
        ("elu", nn.ELU),
        ("gelu", nn.GELU),
        ("silu", nn.SiLU),
        ("softplus", nn.Softplus),
        ("leaky_relu", nn.LeakyReLU),
    ],
)
def test_loss_and_gradients_equal_those_of_torch_layers(name, activation) -> None:
    problem = MNIST(hidden=(7, 5), activation=name, batch_size=16, init_std=0.5)
    task = problem.sample(3).double()
    pixels, labels = problem.sample(3).double().minibatch()
    network = plain_network(task, activation)
    expected = nn.functional.cross_entropy(network(pixels), labels)
    expected.backward()
    loss = task()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for mine, other in zip(task.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_minibatches_are_scaled_images_of_the_split_with_their_labels() -> None:
    problem = MNIST(batch_size=64)
    for split in ("train", "validation", "test"):
        task = problem.sample(0, split)
        images = problem.data.split(split)
        pixels, labels = task.minibatch()
        assert pixels.shape == (64, 784)
        assert pixels.dtype == torch.float32
        assert pixels.min() == 0
        assert pixels.max() == 1
        table = {
            image.tobytes(): label for image, label in zip(images.images.numpy(), images.labels.tolist(), strict=True)
        }
        found = [table[row.tobytes()] for row in (pixels * 255).round().to(torch.uint8).numpy()]
        assert found == labels.tolist()
        again, _ = task.minibatch()
        assert not torch.equal(pixels, again)


def test_indices_are_drawn_with_replacement_and_evenly() -> None:
    problem = MNIST(batch_size=3333 * 5, data="mnist-10k-embedded")
    task = problem.sample(0, "test")
    images = problem.data.split("test")
    drawn = sum(torch.bincount(task.minibatch()[1], minlength=10) for _ in range(6)) / 30
    expected = torch.bincount(images.labels, minlength=10).float()
    torch.testing.assert_close(drawn, expected, rtol=0.05, atol=0)


def test_initial_parameters_and_loss() -> None:
    task = MNIST(hidden=(200,)).sample(0)
    for name, parameter in task.named_parameters():
        if parameter.numel() >= 200:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.15), name
            assert abs(parameter.mean().item()) < 0.002, name
    assert MNIST().sample(0)().item() == pytest.approx(math.log(10), abs=0.02)
    wide = MNIST(init_std=0.1).sample(0)
    assert wide.weight_l0.std().item() == pytest.approx(0.1, rel=0.05)


def test_every_task_draws_its_own_scale_of_theta_0_from_a_range() -> None:
    problem = MNIST(init_std=(0.001, 0.1))
    found = torch.tensor([problem.sample(seed).weight_l0.std().item() for seed in range(60)])
    assert found.min() > 0.00098 and found.max() < 0.102
    # Log-uniform: a half lies below the geometric mean.
    assert 15 <= int((found < 0.01).sum()) <= 45
    again = get(**problem.config())
    torch.testing.assert_close(again.sample(3).weight_l0, problem.sample(3).weight_l0, rtol=0, atol=0)


def test_the_data_set_used_is_named() -> None:
    assert MNIST(data="mnist-10k-embedded").config()["data"] == "mnist-10k-embedded"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": (20, 0)}, ValueError, "hidden must be a positive integer, got 0"),
        ({"hidden": 20}, TypeError, "hidden must be a sequence of layer widths, got 20"),
        ({"hidden": "20"}, TypeError, "hidden must be a sequence"),
        ({"activation": "step"}, ValueError, r"activation must be one of \('sigmoid', .*\), got 'step'"),
        ({"batch_size": -1}, ValueError, "batch_size must be a positive integer, got -1"),
        ({"init_std": float("inf")}, ValueError, "init_std must be finite"),
        ({"init_std": (0.1, 0.01)}, ValueError, "init_std must be a number or a rising pair"),
        ({"init_std": (0.0, 0.01)}, ValueError, "init_std must be a number or a rising pair"),
        ({"init_std": (0.01,)}, ValueError, "init_std must be a number or a rising pair"),
        ({"data": 5}, TypeError, "data must be None, a folder"),
        ({"data": "no/such/folder"}, FileNotFoundError, "missing train-images"),
    ],
)
def test_options_are_checked(options, error, message) -> None:
    with pytest.raises(error, match=message):
        MNIST(**options)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_held_out_error_is_the_share_of_wrong_test_images(standardize) -> None:
    problem = MNIST(data="mnist-10k-embedded", hidden=(5,), activation="relu", init_std=0.1, standardize=standardize)
    task, images = problem.sample(3, "train"), problem.data.split("test")
    state = task.generator.get_state()
    network, wrong = plain_network(task, nn.ReLU), 0
    for image, label in zip(images.images[:300], images.labels[:300].tolist()):
        pixels = image.reshape(-1).double() / 255
        pixels = (pixels - 0.1307) / 0.3081 if standardize else pixels
        wrong += int(network(pixels.float()).argmax()) != label
    assert 0 < wrong < 300
    few = type(images)(images.images[:300], images.labels[:300])
    task._held_out, everything = few, task._held_out
    assert task.held_out_error() == pytest.approx(wrong / 300, abs=1.1 / 300)
    assert len(everything) == len(images) and torch.equal(everything.images, images.images)
    # Nothing of the task moves: neither its minibatches nor its gradients.
    assert torch.equal(task.generator.get_state(), state) and all(p.grad is None for p in task.parameters())
    for split in ("validation", "test"):
        assert problem.sample(3, split).held_out_error() is None


def test_default_initialisation_is_uniform_within_the_root_of_the_fan_in() -> None:
    task = MNIST(hidden=(30,), init_std="default", data="mnist-10k-embedded").sample(0)
    for layer, fan_in in enumerate((784, 30)):
        bound = fan_in**-0.5
        weight, bias = (getattr(task, f"{kind}_l{layer}").detach() for kind in ("weight", "bias"))
        assert 0.95 * bound < weight.abs().max() <= bound and bias.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
