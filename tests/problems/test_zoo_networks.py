"""The zoo's networks against torch's own modules, or against a derivative taken another way."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2l_fast.problems import zoo as package
from l2l_fast.problems.zoo import ZooTask
from l2l_fast.problems.zoo.draws import Draw
from l2l_fast.problems.zoo.heldout_images import VariationalAutoencoder, to_patches
from l2l_fast.problems.zoo.heldout_others import Equation, Flow, solution
from l2l_fast.problems.zoo.layers import Init
from l2l_fast.problems.zoo.recurrent import GATES, Recurrent
from l2l_fast.problems.zoo.sequences import next_symbol_losses, text_material
from l2l_fast.problems.zoo.sources import Rows, noisy
from l2l_fast.problems.zoo.transformers import Blocks


def draw() -> Draw:
    return Draw(torch.Generator().manual_seed(0))


def parameters(leaves, problems=2) -> dict[str, torch.Tensor]:
    dice = draw()
    # Not at theta_0, where gains are one and offsets zero.
    return {
        name: (leaf.initial(problems, dice) + 0.1 * dice.normal(problems, *leaf.shape)).double()
        for name, leaf in leaves.items()
    }


def fill(module: nn.Module, **values: torch.Tensor) -> None:
    for name, value in values.items():
        target = module.get_parameter(name)
        assert target.shape == value.shape
        target.data.copy_(value)


def task_with(family: str, **wanted) -> ZooTask:
    zoo = package.Zoo(family, problems=2, data="mnist-10k-embedded")
    tasks = (zoo.sample(seed) for seed in range(2000))
    return next(t for t in tasks if all(getattr(t._net, key) == value for key, value in wanted.items())).double()


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize(
    ("activation", "module"),
    [
        ("relu", nn.ReLU),
        ("tanh", nn.Tanh),
        ("sigmoid", nn.Sigmoid),
        ("gelu", nn.GELU),
        ("elu", nn.ELU),
        ("silu", nn.SiLU),
    ],
)
def test_perceptrons(norm, activation, module) -> None:
    task = task_with("perceptron", norm=norm, activation=activation)
    pixels, labels = task.minibatch()
    theta, losses = task.theta(), task.losses_on((pixels, labels)) / task.loss_scales
    for k in range(2):
        layers: list[nn.Module] = []
        count = len(task._net.widths) - 1
        for layer in range(count):
            weight = theta[f"l{layer}_weight"][k]
            layers.append(nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype))
            fill(layers[-1], weight=weight, bias=theta[f"l{layer}_bias"][k])
            if layer < count - 1:
                if norm != "none":
                    kind = nn.LayerNorm if norm == "layer" else nn.BatchNorm1d
                    layers.append(kind(len(weight), dtype=weight.dtype))
                    fill(layers[-1], weight=theta[f"n{layer}_gain"][k], bias=theta[f"n{layer}_offset"][k])
                layers.append(module())
        expected = F.cross_entropy(nn.Sequential(*layers)(pixels[k]), labels[k])
        torch.testing.assert_close(losses[k], expected)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_convolutions(normalised, averaged, activation) -> None:
    task = task_with("convolutions", normalised=normalised, averaged=averaged, activation=activation)
    net = task._net
    pixels, labels = task.minibatch()
    theta, losses = task.theta(), task.losses_on((pixels, labels)) / task.loss_scales
    for k in range(2):
        x = pixels[k].view(-1, 1, net.side, net.side)
        for block in range(len(net.channels)):
            bias = None if normalised else theta[f"c{block}_bias"][k]
            x = F.conv2d(x, theta[f"c{block}_weight"][k], bias, padding=net.kernel // 2)
            if normalised:
                layer = nn.BatchNorm2d(x.shape[1], dtype=x.dtype)
                fill(layer, weight=theta[f"n{block}_gain"][k], bias=theta[f"n{block}_offset"][k])
                x = layer(x)
            x = F.max_pool2d(getattr(torch, activation)(x), 2)
        x = x.mean((2, 3)) if averaged else x.flatten(1)
        logits = F.linear(x, theta["out_weight"][k], theta["out_bias"][k])
        torch.testing.assert_close(losses[k], F.cross_entropy(logits, labels[k]))


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_networks(cell, layers) -> None:
    net = Recurrent(cell, 7, 5, 6, layers, 1)
    theta = parameters(net.leaves(Init()))
    symbols = draw().below(7, 2, 3, 9)
    losses = net.losses(theta, (symbols,))
    for k in range(2):
        module = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell](5, 6, layers, batch_first=True).double()
        for layer in range(layers):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                fill(module, **{f"{kind}_l{layer}": theta[f"r{layer}_{kind}"][k]})
        hidden, _ = module(theta["embedding"][k][symbols[k, :, :-1]])
        logits = F.linear(hidden, theta["out_weight"][k], theta["out_bias"][k])
        expected = F.cross_entropy(logits.flatten(0, 1), symbols[k, :, 1:].flatten())
        torch.testing.assert_close(losses[k], expected)


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("causal", [True, False])
def test_transformer_blocks(pre, activation, causal) -> None:
    blocks = Blocks(2, 8, 2, 12, activation, pre)
    theta = parameters(blocks.leaves(Init()))
    x = draw().normal(2, 3, 5, 8).double()
    mask = torch.full((5, 5), -math.inf, dtype=x.dtype).triu(1) if causal else None
    found = blocks(theta, x, mask)
    for k in range(2):
        y = x[k]
        for block in range(2):
            module = nn.TransformerEncoderLayer(
                8, 2, 12, dropout=0.0, activation=activation, batch_first=True, norm_first=pre, dtype=x.dtype
            )
            own = {name.removeprefix(f"b{block}_"): value[k] for name, value in theta.items()}
            fill(
                module,
                **{
                    "self_attn.in_proj_weight": own["qkv_weight"],
                    "self_attn.in_proj_bias": own["qkv_bias"],
                    "self_attn.out_proj.weight": own["proj_weight"],
                    "self_attn.out_proj.bias": own["proj_bias"],
                    "linear1.weight": own["up_weight"],
                    "linear1.bias": own["up_bias"],
                    "linear2.weight": own["down_weight"],
                    "linear2.bias": own["down_bias"],
                    "norm1.weight": own["n1_gain"],
                    "norm1.bias": own["n1_offset"],
                    "norm2.weight": own["n2_gain"],
                    "norm2.bias": own["n2_offset"],
                },
            )
            y = module(y, src_mask=mask)
        if pre:
            y = F.layer_norm(y, (8,), theta["n_gain"][k], theta["n_offset"][k])
        torch.testing.assert_close(found[k], y)


@pytest.mark.parametrize("family", ["transformer", "recurrent"])
def test_language_models_do_not_see_what_they_predict(family) -> None:
    net = task_with(family, first=1)._net
    length, known = 9, 4
    net = replace(net, length=length) if family == "transformer" else net
    theta = parameters(net.leaves(Init(), 1.0) if family == "transformer" else net.leaves(Init()))
    symbols = draw().below(net.symbols, 2, 3, length + 1)

    def predicting_known(symbols: torch.Tensor) -> torch.Tensor:
        everything, rest = (replace(net, first=first).losses(theta, (symbols,)) for first in (1, known + 1))
        return everything * length - rest * (length - known)

    changed = symbols.clone()
    changed[:, :, known + 1 :] = (changed[:, :, known + 1 :] + 1) % net.symbols
    torch.testing.assert_close(predicting_known(changed), predicting_known(symbols))
    changed[:, :, known] = (changed[:, :, known] + 1) % net.symbols
    assert (predicting_known(changed) - predicting_known(symbols)).abs().min() > 1e-3


def test_only_places_that_can_be_known_count() -> None:
    logits = draw().normal(2, 3, 5, 4)
    symbols = draw().below(4, 2, 3, 6)
    losses = next_symbol_losses(logits, symbols, 3)
    for k in range(2):
        expected = F.cross_entropy(logits[k, :, 2:].flatten(0, 1), symbols[k, :, 3:].flatten())
        torch.testing.assert_close(losses[k], expected)


def test_derivatives_of_the_equations_network() -> None:
    net = Equation((1, 7, 5, 1), 2.0, 3.0)
    theta = parameters(net.leaves(Init()))
    x = draw().normal(2, 6, 1).double().requires_grad_()
    value, slope, curvature = net.jet(theta, x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(slope, first)
    torch.testing.assert_close(curvature, second)
    for k in range(2):
        layers = [F.linear(x[k], theta["l0_weight"][k], theta["l0_bias"][k])]
        for layer in (1, 2):
            layers.append(F.linear(layers[-1].tanh(), theta[f"l{layer}_weight"][k], theta[f"l{layer}_bias"][k]))
        torch.testing.assert_close(value[k], layers[-1])


def test_the_equation_is_that_of_its_solution() -> None:
    x = draw().normal(9, 1).double().requires_grad_()
    u, f = solution([(0.5, 2.0, 0.1), (1.2, 0.7, 2.0)], 3.0, x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
    torch.testing.assert_close(f, second + 3.0 * u)
    # And the loss is the mean square of the residual and, by weight, of the errors at the ends.
    net = Equation((1, 4, 1), 3.0, 7.0)
    theta = parameters(net.leaves(Init()), 1)
    points, ends = x.detach()[None], torch.tensor([[[0.3], [-0.2]]]).double()
    value, _, curvature = net.jet(theta, points)
    at_ends, _, _ = net.jet(theta, torch.tensor([[[-1.0], [1.0]]]).double())
    expected = (curvature + 3.0 * value - f).square().mean() + 7.0 * (at_ends - ends).square().sum()
    torch.testing.assert_close(net.losses(theta, (points, f[None], ends)), expected.reshape(1))


def test_the_flow_is_a_density() -> None:
    net = Flow(1, 6, 3, 0.25)
    theta = {name: value[:1] for name, value in parameters(net.leaves(Init())).items()}
    side = torch.linspace(-9, 9, 400).double()
    grid = torch.cartesian_prod(side, side)
    # Losses are per dimension, the floor comes off, and densities have an integral of one.
    each = net.losses(
        {name: value.expand(len(grid), *value.shape[1:]) for name, value in theta.items()}, (grid[:, None],)
    )
    density = (-2 * (each + net.floor)).exp()
    assert density.sum() * (side[1] - side[0]) ** 2 == pytest.approx(1.0, abs=0.01)


def test_patches_are_squares_of_the_picture() -> None:
    pictures = draw().normal(2, 3, 8, 8)
    patches = to_patches(pictures.flatten(2), 8, 4)
    assert patches.shape == (2, 3, 4, 16)
    assert torch.equal(patches[1, 2, 1].view(4, 4), pictures[1, 2, :4, 4:])
    assert torch.equal(patches[0, 1, 2].view(4, 4), pictures[0, 1, 4:, :4])


@pytest.mark.parametrize("groups", [1, 2])
def test_residual_convolutions(groups) -> None:
    task = task_with("residual-convolutions", groups=groups)
    net, theta = task._net, task.theta()
    pixels, labels = task.minibatch()
    losses = task.losses_on((pixels, labels)) / task.loss_scales
    for k in range(2):

        def conv(name: str, x: torch.Tensor, stride: int = 1, k: int = k) -> torch.Tensor:
            bias = theta[f"{name}_bias"][k] if f"{name}_bias" in theta else None
            return F.conv2d(x, theta[f"{name}_weight"][k], bias, stride=stride, padding=1)

        def norm(name: str, x: torch.Tensor, k: int = k) -> torch.Tensor:
            return F.group_norm(x, groups, theta[f"{name}_gain"][k], theta[f"{name}_offset"][k])

        x = conv("in", pixels[k].view(-1, 1, net.side, net.side))
        for stage in range(len(net.channels)):
            x = conv(f"s{stage}", x, 2)
            inner = conv(f"a{stage}", norm(f"na{stage}", x).relu())
            x = x + conv(f"b{stage}", norm(f"nb{stage}", inner).relu())
        logits = F.linear(x.relu().mean((2, 3)), theta["out_weight"][k], theta["out_bias"][k])
        torch.testing.assert_close(losses[k], F.cross_entropy(logits, labels[k]))


def test_the_variational_bound() -> None:
    net = VariationalAutoencoder(12, 5, 3)
    theta = parameters(net.leaves(Init()))
    pixels, noise = draw().rand(2, 4, 12).double(), draw().normal(2, 4, 3).double()
    losses = net.losses(theta, (pixels, noise))
    for k in range(2):

        def layer(name: str, x: torch.Tensor, k: int = k) -> torch.Tensor:
            return F.linear(x, theta[f"{name}_weight"][k], theta[f"{name}_bias"][k])

        mean, log_variance = layer("e1", layer("e0", pixels[k]).tanh()).chunk(2, 1)
        posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
        codes = mean + posterior.stddev * noise[k]
        logits = layer("d1", layer("d0", codes).tanh())
        likelihood = F.binary_cross_entropy_with_logits(logits, pixels[k], reduction="none").sum(1)
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        bound = likelihood + torch.distributions.kl_divergence(posterior, prior).sum(1)
        torch.testing.assert_close(losses[k], bound.mean() / 12)


def test_label_noise_is_drawn_anew_and_as_frequent_as_it_says() -> None:
    dice = draw()
    labels = torch.zeros(200, 100, dtype=torch.int64)
    first, second = (noisy(labels, 10, 0.3, dice) for _ in range(2))
    assert (first != 0).float().mean() == pytest.approx(0.27, abs=0.02)
    assert not torch.equal(first, second)
    clean = Rows((torch.arange(50.0)[:, None], torch.arange(50)), 16).draw(3, dice)
    assert torch.equal(clean[0][..., 0].long(), clean[1])
    assert clean[0].shape == (3, 16, 1)


def test_windows_are_stretches_of_the_text() -> None:
    given = text_material(draw(), "validation", "asv-genesis-luke")
    blocks = given.source.text.split("validation")
    rows = given.source.draw(4, draw())[0]
    assert rows.shape == (4, given.source.batch, given.length + 1)
    known = {tuple(row) for row in blocks.unfold(1, given.length + 1, 1).flatten(0, 1).tolist()}
    assert {tuple(row) for row in rows.flatten(0, 1).tolist()} <= known


def test_quadratics_start_near_one_and_have_their_minimum_elsewhere() -> None:
    zoo = package.Zoo("noisy-quadratic", problems=64, rescale=False)
    starts, jumpy = [], 0
    for seed in range(12):
        task = zoo.sample(seed)
        starts.append(task.losses().mean().item())
        assert not any(torch.equal(a, b) for a, b in zip(task._source.centres, task._source.centres[1:]))
        with torch.no_grad():
            for parameter, centre in zip(task.parameters(), task._source.centres, strict=True):
                parameter.copy_(centre.expand_as(parameter))
        rest = task.losses().mean().item()
        assert rest < 0.2 * starts[-1]
        assert (rest == 0) == (task._source.noise == 0)
        jumpy += rest > 0
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.zero_()
        assert task.losses().mean() > 2 * rest
    assert 0.3 < min(starts) < max(starts) < 3
    assert 6 <= jumpy < 12


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_initial_weights(kind) -> None:
    leaves = Init(kind, 1.5).linear("l", 100, 40)
    weight, bias = (leaves[name].initial(50, draw()) for name in ("l_weight", "l_bias"))
    assert weight.shape == (50, 40, 100)
    # The uniform bound is torch's kaiming_uniform_(a=sqrt(5)), a standard deviation of bound / sqrt(3).
    layer = nn.Linear(100, 40)
    assert layer.weight.abs().max().item() == pytest.approx(0.1, rel=0.01)
    assert weight.std() == pytest.approx(0.15 / (math.sqrt(3) if kind == "uniform" else 1), rel=0.02)
    assert bias.abs().max() == pytest.approx(0.1, rel=0.01)
