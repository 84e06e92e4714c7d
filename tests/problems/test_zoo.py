"""The zoo: what every family promises, and the units of tasks."""

import copy
import json
import math
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

from l2l_fast import problems
from l2l_fast.problems import zoo as package
from l2l_fast.problems.data import load_mnist
from l2l_fast.problems.zoo import TRAINING, VALIDATION, ZooTask
from l2l_fast.problems.zoo.families import FAMILIES
from l2l_fast.problems.zoo.task import RESCALINGS

# The same images on every machine, whatever others it has.
Zoo = partial(package.Zoo, data="mnist-10k-embedded")
family = pytest.mark.parametrize("family", FAMILIES)


def gradients(task: ZooTask, batch=None) -> dict[str, torch.Tensor]:
    batch = task.minibatch() if batch is None else batch
    losses = task.losses_on(batch)
    return dict(zip(dict(task.named_parameters()), torch.autograd.grad(losses.sum(), list(task.parameters()))))


def first_with(zoo: package.Zoo, **wanted) -> ZooTask:
    """The first task with these attributes."""
    tasks = (zoo.sample(seed) for seed in range(100))
    return next(t for t in tasks if all(getattr(t, name) == value for name, value in wanted.items()))


@family
def test_a_task_is_a_function_of_seed_and_split(family) -> None:
    zoo = Zoo(family, problems=2)
    task, again = zoo.sample(3), Zoo(family, problems=2).sample(3)
    assert task.label == again.label
    for _ in range(2):
        assert torch.equal(task.losses(), again.losses())
    for value, same in zip(gradients(task).values(), gradients(again).values(), strict=True):
        assert torch.equal(value, same)
    other = zoo.sample(3, "test")
    assert [p.tolist() for p in task.parameters()] != [p.tolist() for p in other.parameters()]


@family
@pytest.mark.parametrize("seed", range(3))
def test_each_problem_is_the_same_as_alone(family, seed) -> None:
    # The architecture is drawn before anything of which there are K, so that the same seed gives the same one.
    # float64: behind some layers batch normalisation makes gradients of zero, which float32 leaves to rounding.
    task, alone = Zoo(family, problems=3).sample(seed).double(), Zoo(family, problems=1).sample(seed).double()
    assert (alone.label, alone.rescaling) == (task.label, task.rescaling)
    batch = task.minibatch()
    together, losses = gradients(task, batch), task.losses_on(batch)
    assert losses.shape == (3,)
    for k in range(3):
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(getattr(task, name)[k : k + 1])
            for name, buffer in alone.named_buffers():
                buffer.copy_(getattr(task, name)[k : k + 1])
        part = tuple(value[k : k + 1] for value in batch)
        torch.testing.assert_close(alone.losses_on(part), losses[k : k + 1].detach(), rtol=1e-9, atol=0.0)
        for name, gradient in gradients(alone, part).items():
            torch.testing.assert_close(gradient[0], together[name][k], rtol=1e-7, atol=1e-10)


@family
def test_no_problem_meets_another_ones_numbers(family) -> None:
    task = Zoo(family, problems=3).sample(1)
    batch = task.minibatch()
    before = gradients(task, batch)
    losses = task.losses_on(batch).detach()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter[1] = parameter[1] * 1.5 + 0.1
    after = gradients(task, batch)
    now = task.losses_on(batch).detach()
    assert torch.equal(now[[0, 2]], losses[[0, 2]])
    assert now[1] != losses[1]
    for name, gradient in before.items():
        assert torch.equal(after[name][[0, 2]], gradient[[0, 2]]), name
    # And the loss of one has no derivative with respect to another's parameters.
    own = torch.autograd.grad(task.losses_on(batch)[1], list(task.parameters()))
    assert all(not value[[0, 2]].any() for value in own)
    assert any(value[1].any() for value in own)


@family
def test_problems_differ_in_theta_and_minibatches(family) -> None:
    task = Zoo(family, problems=2, rescale=False).sample(0)
    started = [p for p in task.parameters() if p.std() > 0]
    assert all(not torch.equal(p[0], p[1]) for p in started)
    assert started or family == "logistic-regression"
    batch = task.minibatch()
    assert any(not torch.equal(value[0], value[1]) for value in batch)
    assert any(not torch.equal(a, b) for a, b in zip(batch, task.minibatch(), strict=True))


@family
def test_adam_makes_the_losses_fall(family) -> None:
    task = Zoo(family, problems=4, rescale=False).sample(1)
    adam = torch.optim.Adam(task.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        adam.zero_grad()
        loss = task.losses()
        loss.sum().backward()
        adam.step()
        losses.append(loss.detach())
    assert (torch.stack(losses[-20:]).mean(0) < 0.93 * torch.stack(losses[:5]).mean(0)).all(), task


@family
def test_parameters_lead_with_k_and_say_what_they_are(family) -> None:
    task = Zoo(family, problems=3).sample(2)
    assert 500 <= task.coordinates <= 4000
    assert task.coordinates * 3 == sum(p.numel() for p in task.parameters())
    for name, parameter in task.named_parameters():
        assert parameter.shape[0] == 3
        assert parameter.dtype == torch.float32
        assert task.is_vector(name) == (parameter.dim() == 2)
        assert task.fan_in(name) == (1 if parameter.dim() == 2 else math.prod(parameter.shape[2:]))
    with pytest.raises(ValueError, match=r"name must be one of \(.*\), got 'weight_of_nothing'"):
        task.fan_in("weight_of_nothing")


def test_fan_in_is_that_of_torch() -> None:
    task = Zoo("convolutions", problems=2).sample(0)
    channels = task.c0_weight.shape[1]
    kernel = task.c0_weight.shape[-1]
    layer = torch.nn.Conv2d(1, channels, kernel)
    assert task.c0_weight[0].shape == layer.weight.shape
    assert task.fan_in("c0_weight") == torch.nn.init._calculate_correct_fan(layer.weight, "fan_in") == kernel**2
    assert not task.is_vector("c0_weight")
    assert task.is_vector("out_bias")


@family
def test_copies_and_states_go_on_alike(family) -> None:
    zoo = Zoo(family, problems=2)
    task = zoo.sample(4)
    task.losses()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(0.9)
    twins = [copy.deepcopy(task), pickle.loads(pickle.dumps(task)), zoo.sample(4)]
    twins[2].load_state_dict(copy.deepcopy(task.state_dict()))
    twins[2].generator.set_state(task.generator.get_state())
    expected = [task.losses() for _ in range(2)]
    for twin in twins:
        assert all(torch.equal(twin.losses(), loss) for loss in expected)


@family
def test_functional_call_and_second_derivatives(family) -> None:
    task = Zoo(family, problems=2).sample(1).double()
    twin = copy.deepcopy(task)
    moved = {name: (p.detach() * 1.1).requires_grad_() for name, p in task.named_parameters()}
    loss = torch.func.functional_call(task, moved, ())
    assert loss.dtype == torch.float64
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(loss, twin())
    values = list(moved.values())
    first = torch.autograd.grad(loss, values, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), values, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in second)


@pytest.mark.parametrize("families", ["train", "validation"])
def test_losses_and_gradients_are_finite_and_every_parameter_matters(families) -> None:
    zoo = Zoo(families, problems=2)
    seen = set()
    for seed in range(200):
        task = zoo.sample(seed, problems.SPLITS[seed % 3])
        seen.add(task.family)
        batch = task.minibatch()
        losses = task.losses_on(batch)
        assert torch.isfinite(losses).all(), task
        for name, gradient in gradients(task, batch).items():
            assert torch.isfinite(gradient).all(), (name, task)
            # A layer may be dead at the start in one network, not all of it in both.
            assert gradient.any() or task.family in ("recurrent", "deep-gru") or "relu" in task.label, (name, task)
    assert seen == set(TRAINING if families == "train" else VALIDATION)


def test_units_of_theta_leave_f_as_it_is() -> None:
    zoo = Zoo("perceptron", problems=4)
    for rescaling in RESCALINGS:
        task = first_with(zoo, rescaling=rescaling)
        theta, batch = task.theta(), task.minibatch()
        # f's own theta_0 has f's own size, whatever the units: biases within torch's bound.
        bound = 1 / math.sqrt(task.fan_in("l0_weight"))
        assert 0.8 * bound < theta["l0_bias"].abs().max() <= bound * 1.0001
        if rescaling == "none":
            assert all(theta[name] is getattr(task, name) for name in theta)
            continue
        for name, value in theta.items():
            factor = (value / getattr(task, name)).detach().log()
            assert factor.nan_to_num(0).abs().max() <= 3.001
            # One factor per problem, tensor or coordinate: how many there are.
            spread = factor.flatten(1).nan_to_num(0)
            constant = (spread - spread[:, :1]).abs().max() < 1e-3
            assert constant == (rescaling != "coordinate") or not value.any(), name
        weight, bias = ((theta[n] / getattr(task, n))[0].flatten()[0].item() for n in ("l0_weight", "l0_bias"))
        assert (abs(weight / bias - 1) < 1e-3) == (rescaling == "global")
        # z -> f(c z): the chain rule.
        inner = {name: value.detach().requires_grad_() for name, value in theta.items()}
        loss = (task._net.losses(inner, batch) * task.loss_scales).sum()
        by_theta = dict(zip(inner, torch.autograd.grad(loss, list(inner.values()))))
        for name, gradient in gradients(task, batch).items():
            c = getattr(task, f"factor_of_{name}")
            torch.testing.assert_close(gradient, by_theta[name] * c, rtol=1e-4, atol=1e-6)


def test_scales_of_losses_can_be_taken_out() -> None:
    zoo = Zoo("softmax-regression", problems=64)
    scales = [zoo.sample(seed).loss_scales for seed in range(30)]
    scaled = [value for value in scales if (value != 1).any()]
    assert 5 < len(scaled) < 25
    logs = torch.cat(scaled).log()
    assert logs.min() < -2.5
    assert logs.max() > 2.5
    assert logs.abs().max() <= 3
    for seed in range(8):
        task = zoo.sample(seed)
        # Logits are small at theta_0, so that losses in nats are ln 10 and somewhat more.
        usual = (task.losses() / task.loss_scales).mean().item()
        assert 0.9 * math.log(10) < usual < 2 * math.log(10)


def test_without_rescaling_units_are_one() -> None:
    zoo = Zoo(problems=2, rescale=False)
    for seed in range(20):
        task = zoo.sample(seed)
        assert task.rescaling == "none"
        assert (task.loss_scales == 1).all()


def test_families_are_drawn_by_their_weights() -> None:
    assert not set(TRAINING) & set(VALIDATION)
    assert len(VALIDATION) >= 5
    zoo = Zoo(problems=1)
    drawn = [zoo.sample(seed).family for seed in range(400)]
    total = sum(weight for _, weight in TRAINING.values())
    for name, (_, weight) in TRAINING.items():
        share, expected = drawn.count(name) / 400, weight / total
        assert abs(share - expected) < 4 * math.sqrt(expected / 400), name


def test_splits_have_disjoint_data() -> None:
    tasks = {split: Zoo("perceptron", problems=1).sample(0, split) for split in problems.SPLITS}
    seen = {split: task._source.data.pixels for split, task in tasks.items()}
    assert len({value.data_ptr() for value in seen.values()}) == 3
    texts = {split: set() for split in problems.SPLITS}
    for split in texts:
        task = first_with_text(split)
        for _ in range(20):
            # Twelve characters are enough to know a place by, and fit in every window that is asked for.
            texts[split] |= {tuple(row) for row in task.minibatch()[0].flatten(0, 1)[:, -12:].tolist()}
    blocks = {
        split: {tuple(row) for row in task_text(split).unfold(1, 12, 1).flatten(0, 1).tolist()} for split in texts
    }
    for split, found in texts.items():
        assert found <= blocks[split]


def first_with_text(split: str) -> ZooTask:
    zoo = Zoo("recurrent", problems=2)
    tasks = (zoo.sample(seed, split) for seed in range(100))
    return next(task for task in tasks if hasattr(task._source, "text") and task._source.length >= 12)


def task_text(split: str) -> torch.Tensor:
    from l2l_fast.problems.data.text import load_text

    return load_text().split(split)


def test_torchs_defaults_do_not_matter() -> None:
    expected = {name: Zoo(name, problems=2).sample(5).losses() for name in FAMILIES}
    torch.set_default_dtype(torch.float64)
    try:
        for name, losses in expected.items():
            assert torch.equal(Zoo(name, problems=2).sample(5).losses(), losses), name
    finally:
        torch.set_default_dtype(torch.float32)


def test_pictures_are_pooled() -> None:
    from l2l_fast.problems.zoo.pixels import load, small

    images = load("mnist-10k-embedded").split("test")
    picture = images.images[7].float()
    fourteen = picture.view(14, 2, 14, 2).mean((1, 3))
    assert (small("mnist-10k-embedded", "test", 14).pixels[7].view(14, 14) - fourteen).abs().max() <= 0.5
    eight = torch.nn.functional.pad(picture, (2, 2, 2, 2)).view(8, 4, 8, 4).mean((1, 3))
    pooled = small("mnist-10k-embedded", "test", 8)
    assert (pooled.pixels[7].view(8, 8) - eight).abs().max() <= 0.5
    assert torch.equal(pooled.labels, images.labels)
    assert copy.deepcopy(pooled) is pooled
    assert pickle.loads(pickle.dumps(pooled)) is pooled


def test_image_sets(tmp_path, monkeypatch) -> None:
    from l2l_fast.problems.zoo import pixels

    monkeypatch.delenv("L2L_FAST_DATA", raising=False)
    monkeypatch.setenv("L2L_FAST_FASHION_MNIST", str(tmp_path / "nowhere"))
    assert package.Zoo().config()["data"] == "mnist-10k-embedded"
    with pytest.raises(FileNotFoundError, match="Fashion-MNIST"):
        package.Zoo(data="mnist-10k-embedded,fashion-mnist")
    # Where Fashion-MNIST is, it takes part.
    monkeypatch.setattr(pixels, "load_fashion_mnist", lambda folder: replace(load_mnist(), name="fashion-mnist"))
    monkeypatch.setattr(pixels, "_made", {})
    both = package.Zoo("softmax-regression", problems=1)
    assert both.config()["data"] == "mnist-10k-embedded,fashion-mnist"
    assert {both.sample(seed)._source.data.data for seed in range(12)} == {"mnist-10k-embedded", "fashion-mnist"}


def test_config_builds_the_problem_again() -> None:
    zoo = Zoo(["recurrent", "flow"], problems=3, coordinates=(600, 900), rescale=False)
    config = json.loads(json.dumps(zoo.config()))
    again = problems.get(**config)
    assert again.config() == config
    for seed in range(3):
        assert 600 <= again.sample(seed).coordinates <= 900
        assert torch.equal(again.sample(seed).losses(), zoo.sample(seed).losses())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"families must be one of \('perceptron', .*\), got 'zebra'"):
        Zoo("zebra")
    with pytest.raises(ValueError, match="families must be one or more different names, got \\[\\]"):
        Zoo([])
    with pytest.raises(TypeError, match="families must be None, a name or names, got 3"):
        Zoo(3)
    with pytest.raises(ValueError, match="problems must be a positive integer, got 0"):
        Zoo(problems=0)
    with pytest.raises(TypeError, match="coordinates must be a pair of whole numbers, got 500"):
        Zoo(coordinates=500)
    with pytest.raises(ValueError, match=r"coordinates must be a rising pair, got \(4000, 500\)"):
        Zoo(coordinates=(4000, 500))
    with pytest.raises(TypeError, match="rescale must be True, False or a number in .0, 1., got 'often'"):
        Zoo(rescale="often")
    with pytest.raises(ValueError, match="rescale must be True, False or a number in .0, 1., got 1.5"):
        Zoo(rescale=1.5)
    with pytest.raises(ValueError, match="data must be one of .* got 'cifar'"):
        Zoo(data="cifar")
    with pytest.raises(ValueError, match="coordinates: no 'softmax-regression' of 500 drawn has 1 to 2; they have 650"):
        Zoo("softmax-regression", coordinates=(1, 2)).sample(0)
