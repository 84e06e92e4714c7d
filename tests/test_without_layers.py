"""Networks without an LSTM, whose state are moving averages: the kernels against the float64 reference, and the shipped
one beside the network that it was made of."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import operators, reference
from l2l_fast.kernels.config import Config
from l2l_fast.kernels.state import num_tiles
from l2l_fast.problems.zoo import Zoo

CONFIG = Config(0, 0, "normalized", 10.0, 0.02, tensor_inputs=3)
SIZES = (0, 1, 63, 64, 65, 1000)


def network(seed: int = 0, **options) -> l2l.CoordinatewiseLSTM:
    net = l2l.CoordinatewiseLSTM(hidden_size=0, num_layers=0, preprocess="normalized", **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def gradients(numel: int, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(numel)
    scale = 10 ** (4 * torch.randn(numel, generator=generator))
    return [torch.randn(numel, generator=generator) * scale for _ in range(steps)]


@pytest.mark.parametrize("numel", SIZES)
def test_steps_equal_the_reference(isa, numel):
    net = network(tensor_inputs=3)
    inputs, nominal = torch.tensor([0.3, -1.0, 0.7]), torch.tensor([-0.5, 0.4, 0.2, 0.6, 0.3])
    state, exact = net.init_state(numel), net.init_state(numel, dtype=torch.float64)
    param, in_place = torch.ones(numel), torch.zeros((num_tiles(numel), 4, 64))
    expected = param.double()
    for step, grad in enumerate(gradients(numel, 5), 1):
        update, state = net(grad, state, tensor_inputs=inputs, nominal=nominal)
        oracle, exact = net(grad.double(), exact, tensor_inputs=inputs, nominal=nominal)
        assert torch.allclose(update.double(), oracle, rtol=2e-5, atol=1e-8)
        common = {"ages": [step], "tensor_inputs": inputs.unsqueeze(0), "nominal": nominal.unsqueeze(0)}
        operators.step_([param], [grad], [in_place], net.phi().detach(), net.config, 0.5, 0.01, False, **common)
        expected = (1 - 0.5 * 0.01) * expected + 0.5 * oracle
    assert torch.allclose(param.double(), expected, rtol=2e-5, atol=1e-7)
    assert torch.equal(state.data, in_place) and state.age == 5
    ours, theirs = (each.to_logical()[0].rows.detach().double() for each in (state, exact))
    size = theirs[:, 3:]  # the root mean square, beside which a mean may be small
    assert bool(((ours - theirs).abs() <= 1e-5 * size).all())


def test_meta_gradients_equal_the_reference(isa):
    net, numel = network(tensor_inputs=3), 130
    inputs = torch.tensor([0.3, -1.0, 0.7])
    found = []
    for dtype in (torch.float32, torch.float64):
        weights = copy.deepcopy(net)
        state = weights.init_state(numel, dtype=dtype)
        total = torch.zeros((), dtype=torch.float64)
        for grad in gradients(numel, 4):
            update, state = weights(grad.to(dtype), state, tensor_inputs=inputs)
            total = total + (update.double() * torch.arange(numel).cos()).sum()
        total.backward()
        found.append(weights.bias_out.grad)
    assert found[1].abs().min() > 1e-4 and torch.allclose(found[0], found[1], rtol=1e-5)


def test_a_segment_equals_the_reference(isa):
    net, steps = network(), 7
    param = nn.Parameter(torch.linspace(-1, 1, 70))
    opt = l2l.LearnedOptimizer([param], net)
    opt.start_segment()
    records = []
    for step in range(steps + 1):
        opt.zero_grad()
        (param.sin().square().sum() / 3).backward()
        records.append([param.grad.clone().double()])
        if step < steps:
            opt.step()
    opt.backward_segment()
    nominal = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5]).expand(steps, 1, 5)
    start = net.init_state(70, dtype=torch.float64).to_logical()
    ones = [1.0] * steps
    options = ([start], records, ones, ones, ones, net.phi().detach().double(), net.config)
    expected, _ = reference.segment_backward(*options, nominal=nominal)
    assert torch.allclose(net.bias_out.grad.double(), expected, rtol=1e-4) and expected.abs().min() > 0


def test_bad_gradients_stay_in_their_coordinates(isa):
    net, (grad, _) = network(), gradients(130, 2)
    bad = grad.clone()
    bad[[5, 70]] = torch.tensor([torch.nan, torch.inf])
    (good, _), (found, _) = net(grad, net.init_state(130)), net(bad, net.init_state(130))
    others = torch.ones(130, dtype=torch.bool)
    others[[5, 70]] = False
    assert torch.equal(found[others], good[others]) and found[5].isnan() and found[70].isfinite()


def train(net, steps: int = 30, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 70), nn.ReLU(), nn.Linear(70, 1)).to(dtype)
    inputs = {"total_steps": steps} if net.tensor_inputs else {}
    opt = l2l.LearnedOptimizer(model.parameters(), net, **inputs, **options)
    losses = []
    for step in range(steps):
        x = torch.randn(32, 13, generator=torch.Generator().manual_seed(step), dtype=dtype)
        opt.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses, model, opt


def test_the_small_one_steps_as_the_general_one_does():
    general, small = l2l.load_pretrained("general"), l2l.load_pretrained("general-small")
    assert not general.weight_out.any() and torch.equal(small.weight_nominal, general.weight_nominal)
    assert torch.equal(small.bias_out, general.bias_out)
    (ours, _, opt), (theirs, _, _) = train(small), train(general)
    assert ours == pytest.approx(theirs, rel=1e-4) and ours[-1] < 0.3 * ours[0]
    assert train(small, dtype=torch.float64)[0] == pytest.approx(train(general, dtype=torch.float64)[0], rel=1e-12)
    assert all(entry["lstm_state"].shape[1:] == (4, 64) for entry in opt.state.values())  # 16 bytes a coordinate


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_run_goes_on_from_its_checkpoint(kind):
    small = l2l.load_pretrained("general-small")
    straight, _, _ = train(small, 12, state_dtype=kind)
    torch.manual_seed(0)
    _, model, opt = train(small, 12, state_dtype=kind)
    model.zero_grad()
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert saved["state"][0]["lstm_state"].shape == (9, 13, 4)
    twin = copy.deepcopy(model)
    other = l2l.LearnedOptimizer(twin.parameters(), l2l.load_pretrained("general-small"), total_steps=12)
    other.load_state_dict(saved)
    for each, optimizer in ((model, opt), (twin, other)):
        each(torch.ones(4, 13)).sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert straight[-1] == pytest.approx(train(small, 12)[0][-1], rel=0.02)


def test_the_state_of_the_general_one_is_refused_with_its_shape():
    _, model, opt = train(l2l.load_pretrained("general"), 3)
    other = l2l.LearnedOptimizer(model.parameters(), l2l.load_pretrained("general-small"), total_steps=3)
    with pytest.raises(ValueError, match="hidden_size"):
        other.load_state_dict(opt.state_dict())


def test_copies_files_and_threads(tmp_path):
    net = network(tensor_inputs=3)
    net.save(tmp_path / "net.safetensors")
    twins = [l2l.load(tmp_path / "net.safetensors"), copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    assert all(torch.equal(twin.phi(), net.phi()) and twin.options() == net.options() for twin in twins)
    grad, results = gradients(70_000, 1)[0], []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(net(grad, net.init_state(70_000), tensor_inputs=[0.1, 0.2, 0.3])[0])
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_evolution_trains_it():
    net = network(tensor_inputs=15)
    before = net.weight_nominal.clone()
    trainer = l2l.MetaTrainer(net, Zoo(problems=1), horizon=200, unroll=50, lr=0.1, seed=0, estimator="evolution")
    trainer.fit(episodes=1)
    assert not torch.equal(net.weight_nominal, before) and bool(net.weight_nominal.isfinite().all())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": 0, "hidden_size": 0}, "num_layers"),
        ({"num_layers": 0, "preprocess": "normalized"}, "hidden_size"),
        ({"num_layers": 1, "hidden_size": 0, "preprocess": "normalized"}, "hidden_size"),
        ({"num_layers": 0, "hidden_size": 0, "preprocess": "normalized", "gac_cells": 1}, "gac_cells"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        l2l.CoordinatewiseLSTM(**options)


def test_what_the_operators_refuse():
    for config, message in (
        (Config(0, 0, "log_sign", 10.0, 0.1), "hidden_size: expected 4"),
        (Config(4, 0, "normalized", 10.0, 0.1), "num_layers: expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            state = torch.zeros(1, 4, 64)
            operators.step_([torch.ones(1)], [torch.ones(1)], [state], torch.zeros(2), config, 1.0, 0.0, False)
    with pytest.raises(ValueError, match="num_layers"):
        network().to_lstm_cells()
