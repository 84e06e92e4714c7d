"""Decoupled chains in the surroundings that modules are used in, and what they refuse."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import l2l_fast as l2l
from l2l_fast import dni

without_norm = functools.partial(dni.predictor_for, batch_norm=False)


def convolutional() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(6 * 3 * 3, 10)),
        nn.Linear(10, 3),
    ]


def shaken(net: dni.Decoupled) -> dni.Decoupled:
    """With predictors that say something."""
    for stage in net.stages[:-1]:
        nn.init.normal_(stage.predictor.out.weight, std=0.1)
    return net


def plain(*sizes, dtype=torch.float32) -> list[nn.Module]:
    return [nn.Linear(a, b).to(dtype) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]


@pytest.fixture
def images():
    return torch.randn(5, 1, 8, 8), torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize("num_classes", [None, 3])
def test_convolutional_chains_have_convolutional_predictors(images, num_classes):
    net = shaken(dni.Decoupled(convolutional(), images[0], num_classes=num_classes))
    kinds = [type(stage.predictor) for stage in net.stages]
    assert kinds == [dni.ConvPredictor, dni.ConvPredictor, dni.Predictor, type(None)]
    found = net.backward(images[0], F.cross_entropy, images[1])
    assert found.predictor_losses.shape == (3,) and found.output.shape == (5, 3)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for s in net.stages[:-1] for p in s.module.parameters())


def test_labels_change_what_conditioned_predictors_say(images):
    activity = torch.randn(5, 4, 6, 6)
    for predictor, h in ((dni.ConvPredictor(4, 3), activity), (dni.Predictor(4, 3), activity[:, :, 0, 0])):
        nn.init.normal_(predictor.out.weight)
        predictor.eval()
        one, other = predictor(h, images[1]), predictor(h, (images[1] + 1) % 3)
        assert one.shape == h.shape and not torch.equal(one, other)


def test_an_example_leaves_no_trace(images):
    modules = convolutional()
    modules[0].append(nn.Dropout(0.5))
    modules[1].eval()
    before = copy.deepcopy(nn.ModuleList(modules).state_dict())
    modes = [module.training for module in modules]
    first = images[0].clone().requires_grad_()
    net = dni.Decoupled(modules, first)
    assert [module.training for module in modules] == modes and first.grad is None
    for name, value in nn.ModuleList(modules).state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(p.requires_grad and p.grad is not None for p in net.parameters())


def test_running_statistics_move_once_in_a_pass_and_not_in_evaluation(images):
    net = dni.Decoupled(convolutional(), images[0], num_classes=3)
    net.backward(images[0], F.cross_entropy, images[1])
    counts = [b.item() for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [1] * len(counts) and len(counts) == 4
    net.eval()
    kept = [b.clone() for b in net.buffers()]
    net.backward(images[0], F.cross_entropy, images[1])
    assert all(torch.equal(a, b) for a, b in zip(kept, net.buffers(), strict=True))


def test_modules_may_write_to_their_input():
    modules = [nn.Linear(4, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), nn.Linear(6, 3)]
    other = [copy.deepcopy(module) for module in modules]
    other[1][0].inplace = False
    x, y = torch.randn(7, 4), torch.randint(3, (7,))
    nets = [dni.Decoupled(modules, x), dni.Decoupled(other, x)]
    nets[1].load_state_dict(shaken(nets[0]).state_dict())
    for net in nets:
        net.backward(x, F.cross_entropy, y)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def test_frozen_parts_stay_and_let_gradients_through():
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    net = shaken(dni.Decoupled(plain(4, 5, 6, 7, 3), x))
    whole = copy.deepcopy(net)
    whole.backward(x, F.cross_entropy, y)
    net.stages[0].module.requires_grad_(False)  # the first: nothing to differentiate by
    net.stages[2].module.requires_grad_(False)  # between others
    net.stages[1].predictor.requires_grad_(False)
    net.backward(x, F.cross_entropy, y)
    frozen = 0
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        frozen += not p.requires_grad
        assert p.grad is None if not p.requires_grad else torch.equal(p.grad, q.grad)
    assert frozen == 4 + sum(1 for _ in net.stages[1].predictor.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_predictors_take_the_activities_dtype(dtype):
    x, y = torch.randn(8, 4, dtype=dtype), torch.randint(3, (8,))
    net = shaken(dni.Decoupled(plain(4, 5, 3, dtype=dtype), x, num_classes=3))
    found = net.backward(x, F.cross_entropy, y)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in net.parameters())
    assert found.predictor_losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_default_dtype_of_float64_changes_nothing():
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    modules = plain(4, 5, 3)
    torch.set_default_dtype(torch.float64)
    try:
        net = dni.Decoupled(modules, x, num_classes=3)
        net.backward(x, F.cross_entropy, y)
        core = nn.LSTM(3, 5, dtype=torch.float32)
        recurrent = dni.Recurrent(core, 10, auxiliary=True, output_size=5)
        episode = dni.CopyTask().sample(3, 4, torch.Generator())
    finally:
        torch.set_default_dtype(torch.float32)
    for module in (net, recurrent):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert episode.inputs.dtype == torch.float32


def test_autocast():
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    net = shaken(dni.Decoupled(plain(4, 5, 6, 3), x, num_classes=3))
    with torch.autocast("cpu", torch.bfloat16):
        found = net.backward(x, F.cross_entropy, y)
    assert found.output.dtype == torch.bfloat16 and found.predictor_losses.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    exact = copy.deepcopy(net)
    exact.zero_grad()
    exact.backward(x, F.cross_entropy, y)
    for p, q in zip(net.module_parameters(), exact.module_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65])
def test_batches_of_any_size_and_layout(size):
    net = dni.Decoupled(plain(4, 5, 3), torch.zeros(2, 4), predictor=without_norm)
    shaken(net)
    x, y = torch.randn(4, size).T, torch.randint(3, (size, 2))[:, 0]
    found = net.backward(x, F.cross_entropy, y)
    once = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    again = net.backward(x.contiguous(), F.cross_entropy, y.contiguous())
    torch.testing.assert_close(found.loss, again.loss)
    for p, g in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_an_empty_batch_moves_nothing():
    net = dni.Decoupled(plain(4, 5, 3), torch.zeros(2, 4), predictor=without_norm)
    net.backward(torch.zeros(0, 4), lambda out: out.sum())
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_a_nan_stays_where_back_propagation_keeps_it():
    # In its own sample, as far as predictors look at samples one by one.
    net = shaken(dni.Decoupled(plain(4, 5, 3), torch.zeros(2, 4), predictor=without_norm))
    x = torch.randn(3, 4)
    x[1, 0] = float("nan")
    local = net.stages[0].advance(x, first=True)
    assert local.prediction[[0, 2]].isfinite().all() and local.prediction[1].isnan().all()


def test_results_repeat_bit_for_bit():
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        net = dni.Decoupled(plain(20, 30, 30, 3), torch.zeros(2, 20), num_classes=3)
        opt = l2l.LearnedOptimizer(net.parameters(), l2l.load_pretrained("general"), total_steps=5)
        x, y = torch.randn(16, 20), torch.randint(3, (16,))
        for _ in range(5):
            opt.zero_grad()
            net.backward(x, F.cross_entropy, y)
            opt.step()
        found.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_can_go_on_below_the_first_module():
    # What the input came of is trained too, by what the first predictor says.
    embedding = nn.Embedding(9, 4)
    tokens, y = torch.randint(9, (8,)), torch.randint(3, (8,))
    net = shaken(dni.Decoupled(plain(4, 5, 3), torch.zeros(2, 4)))
    net.backward(embedding(tokens), F.cross_entropy, y)
    assert embedding.weight.grad.abs().sum() > 0


def test_labels_other_than_the_targets():
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    soft = F.one_hot(y, 3).float() * 0.9 + 0.1 / 3
    net = shaken(dni.Decoupled(plain(4, 5, 3), x, num_classes=3))
    with pytest.raises(TypeError, match="labels: expected classes of dtype int64, got torch.float32"):
        net.backward(x, F.cross_entropy, soft)
    net.backward(x, F.cross_entropy, soft, labels=y)
    with pytest.raises(TypeError, match="labels: expected classes for the conditioned predictors, got none"):
        net.backward(x, lambda out: out.sum())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: dni.Decoupled([]), "modules: expected at least one, got none"),
        (lambda: dni.Decoupled(nn.Linear(2, 2)), "modules: expected a sequence of nn.Modules, got one Linear"),
        (lambda: dni.Decoupled(3), "modules: expected a sequence of nn.Modules, got int"),
        (lambda: dni.Decoupled([torch.tanh]), "modules: expected nn.Modules, got builtin_function_or_method"),
        (lambda: dni.Decoupled(plain(2, 2, 2)), "example: expected an input of the first module"),
        (lambda: dni.Decoupled(plain(2, 2, 2), predictors=[]), "predictors: expected 1, one less than modules, got 0"),
        (lambda: dni.Decoupled(plain(2, 2), num_classes=0), "num_classes must be a positive integer, got 0"),
        (lambda: dni.Decoupled(plain(2, 2), gradient_scale="sum"), 'gradient_scale: expected "batch" or a number > 0'),
        (lambda: dni.Decoupled(plain(2, 2), gradient_scale=0), "gradient_scale: expected a finite number > 0"),
        (lambda: dni.Decoupled(plain(2, 2, 2), torch.zeros(2, 3, 2)), "predictor: expected activities [batch, "),
        (lambda: dni.ConvPredictor(3, kernel_size=4), "kernel_size must be odd"),
        (lambda: dni.Predictor(3, hidden=(0,)), "hidden must be a positive integer, got 0"),
    ],
)
def test_wrong_arguments_are_named(make, words):
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        make()


class Two(nn.Module):
    def forward(self, x):
        return x, x


def test_wrong_calls_are_named_before_anything_is_written():
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    net = dni.Decoupled(plain(4, 5, 3), x, num_classes=3)
    for labels, words in (
        (y[:7], "labels: expected [8], a class for every sample, got [7]"),
        (y[:, None], "labels: expected [batch], a class for every sample, got [8, 1]"),
        (y + 3, "labels: expected classes in 0..2, got"),
        ([1] * 8, "labels: expected a tensor of classes, int64 [batch], got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(words)):
            net.backward(x, F.cross_entropy, y, labels=labels)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are switched off"):
        net.backward(x, F.cross_entropy, y)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="gradients are switched off"):
        net.backward(x, F.cross_entropy, y)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match=re.escape("loss_fn: expected a scalar tensor, got shape (8, 3)")):
        net.backward(x, lambda out, _: out, y)
    wrong = dni.Decoupled([nn.Linear(4, 5), nn.Linear(5, 3)], predictors=[nn.Linear(5, 4)])
    with pytest.raises(ValueError, match=re.escape("predictor: expected the activity's shape (8, 5), got (8, 4)")):
        wrong.backward(x, F.cross_entropy, y)
    with pytest.raises(TypeError, match="modules: expected Two to return one tensor, got tuple"):
        dni.Decoupled([Two()]).backward(x, F.cross_entropy, y)
    with pytest.raises(RuntimeError, match="advance: the last stage has no predictor"):
        net.stages[-1].advance(x)


def test_it_is_public():
    assert "dni" in l2l.__all__ and "dni" in dir(l2l)
    import l2l_fast.dni as by_import

    assert by_import is dni is l2l.dni
    assert dni.Decoupled.__module__ == "l2l_fast.problems.dni.decoupled"
    assert all(hasattr(dni, name) for name in dni.__all__) and dni.__all__ == sorted(dni.__all__)


def test_predictors_made_under_autocast_are_those_made_outside():
    def made():
        torch.manual_seed(0)
        chain = [torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)]
        return dni.Decoupled(chain, torch.randn(2, 4), num_classes=3)

    plain = made()
    with torch.autocast("cpu", torch.bfloat16):
        inside = made()
    for (name, a), (_, b) in zip(plain.named_parameters(), inside.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
