"""NTMBFGS: the controller with its memory, in LearnedOptimizer, MetaTrainer and files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import reference
from l2l_fast.problems import ModuleProblem, Quadratic
from tests.helpers import assert_close, structured_gradient

MEMORIES = [
    {"memory": "dense"},
    {"memory": "low_rank", "history": 2},
    {"memory": "dense", "initial": "identity"},
    {"initial": "identity", "add_read": True},
]
MEMORY_IDS = ["dense", "low_rank", "identity", "add_read"]


def ntm(seed=0, dtype=torch.float32, **options):
    """Heads large enough that the memory matters."""
    net = l2l.NTMBFGS(**{"hidden_size": 8, "output_scale": 0.5, **options}, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * 0.5)
    return net


def double(net):
    options = {name: value for name, value in net.options().items() if name != "type"}
    other = l2l.NTMBFGS(**options, dtype=torch.float64)
    other.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    return other


def literal_run(net, grads, groups):
    """Appendix D with an explicit matrix and history, on the float64 reference; returns the updates."""
    n = grads[0].numel() // groups
    state, history, r = net.init_state(grads[0].numel(), dtype=torch.float64).to_logical(), [], None
    updates = []
    for g in grads:
        matrix = torch.zeros(groups, n, n, dtype=torch.float64)
        if net.initial == "identity":
            matrix = matrix + torch.eye(n, dtype=torch.float64)
        for a, b in history if net.memory == "dense" else history[-net.history :]:
            for k in range(net.write_heads):
                matrix = matrix + a[k][:, :, None] * b[k][:, None, :]
        if r is None:
            r = torch.zeros(net.read_heads, groups, n, dtype=torch.float64)
        read = torch.stack([(matrix @ each[:, :, None]).squeeze(-1) for each in r]).flatten(1)
        out, state = reference.lstm_step(g, state, net.phi(), net.config, groups, read)
        rows = out[1:].view(-1, groups, n)
        r = rows[: net.read_heads]
        a, b = rows[net.read_heads :].split(net.write_heads)
        history.append((a, b))
        updates.append(out[0] + read[0] if net.add_read else out[0])
    return updates


@pytest.mark.parametrize("heads", [(1, 3), (2, 1)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("options", MEMORIES, ids=MEMORY_IDS)
def test_steps_and_gradients_are_the_definition(options, groups, heads):
    net = ntm(read_heads=heads[0], write_heads=heads[1], **options)
    exact = double(net)
    grads = [structured_gradient((groups * 5,), seed=t) for t in range(5)]
    expected = literal_run(exact, [g.double() for g in grads], groups)
    sum((u * g).sum() for u, g in zip(expected, grads, strict=True)).backward()
    state, memory, loss = net.init_state(groups * 5), net.init_memory(groups * 5, groups), 0.0
    for g, u in zip(grads, expected, strict=True):
        update, state, memory = net(g, state, memory)
        assert_close(update, u, 2e-5)
        loss = loss + (update * g).sum()
    loss.backward()
    for actual, wanted in zip(net.parameters(), exact.parameters(), strict=True):
        assert_close(actual.grad, wanted.grad, 1e-4)


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((4, 6), (2, 3), (2,))]


def set_gradients(params, t):
    for k, param in enumerate(params):
        param.grad = structured_gradient(param.shape, seed=10 * t + k).to(param.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", MEMORIES, ids=MEMORY_IDS)
def test_the_optimizer_takes_the_same_steps(options, groups, dtype):
    net, params = ntm(dtype=dtype, **options), parameters(dtype)
    opt = l2l.LearnedOptimizer(params, net, lr=0.5, num_problems=groups)
    numels = [param.numel() for param in params]
    theta = [torch.zeros(n, dtype=torch.float64) for n in numels]
    grads = []
    for t in range(5):
        set_gradients(params, t)
        grads.append(reference.join([param.grad.double().flatten() for param in params], groups))
        opt.step()
    for update in literal_run(double(net), grads, groups):
        theta = [x + 0.5 * u for x, u in zip(theta, reference.separate(update, numels, groups), strict=True)]
    for param, value in zip(params, theta, strict=True):
        assert_close(param, value.view(param.shape), 2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("options", MEMORIES, ids=MEMORY_IDS)
def test_a_checkpoint_continues_exactly(options):
    net, params = ntm(**options), parameters()
    opt = l2l.LearnedOptimizer(params, net, num_problems=2)
    for t in range(3):
        set_gradients(params, t)
        opt.step()
    copies = copy.deepcopy(params)
    other = l2l.LearnedOptimizer(copies, net, num_problems=2)
    saved = opt.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in saved["state"][0].values())
    other.load_state_dict(saved)
    for optimizer, its in ((opt, params), (other, copies)):
        for t in (3, 4):
            set_gradients(its, t)
            optimizer.step()
    for a, b in zip(params, copies, strict=True):
        assert torch.equal(a, b)


def test_a_saved_memory_must_fit():
    params = parameters()
    opt = l2l.LearnedOptimizer(params, ntm())
    set_gradients(params, 0)
    opt.step()
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="memory"):
        l2l.LearnedOptimizer(parameters(), ntm(memory="low_rank")).load_state_dict(saved)
    with pytest.raises(ValueError, match="read_heads=1, now read_heads=2"):
        l2l.LearnedOptimizer(parameters(), ntm(read_heads=2)).load_state_dict(saved)


def test_every_parameter_needs_a_gradient():
    params = parameters()
    opt = l2l.LearnedOptimizer(params, ntm())
    set_gradients(params, 0)
    params[1].grad = None
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="gradient for every parameter"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_segments_and_shards_are_refused():
    with pytest.raises(NotImplementedError, match="memory"):
        l2l.LearnedOptimizer(parameters(), ntm()).start_segment()
    with pytest.raises(NotImplementedError, match="memory"):
        l2l.LearnedOptimizer(parameters(), ntm(), process_group=lambda tensor: None)


@pytest.mark.parametrize("options", MEMORIES, ids=MEMORY_IDS)
def test_files(options, tmp_path):
    net = ntm(**options)
    net.save(tmp_path / "net.safetensors")
    loaded = l2l.load(tmp_path / "net.safetensors")
    assert type(loaded) is l2l.NTMBFGS and loaded.options() == net.options()
    assert torch.equal(loaded.phi(), net.phi())


@pytest.mark.parametrize("memory", ["dense", "low_rank"])
def test_meta_training_learns(memory):
    """Evaluated through LearnedOptimizer, trained through the functional step: both must agree to get better."""
    torch.manual_seed(0)
    net = l2l.NTMBFGS(hidden_size=8, preprocess="identity", output_scale=1.0, memory=memory)
    problem = Quadratic(dim=4, batch=16, family="ill_conditioned")
    trainer = l2l.MetaTrainer(net, problem, 20, 10, 2e-2, clip_norm=1.0, validate_every=0)
    before = trainer.evaluate(1, best=False)[0, -1]
    trainer.fit(25, progress=False)
    after = trainer.evaluate(1, best=False)[0, -1]
    assert after < 0.6 * before


def test_segments_carry_the_memory_by_value(monkeypatch):
    """The memory at a segment's start is that of the last one's end, and no graph crosses."""
    net = ntm(preprocess="identity")
    memories = []
    forward = l2l.NTMBFGS.forward

    def spy(self, grad, state, memory):
        result = forward(self, grad, state, memory)
        memories.append((memory, result[2]))
        return result

    monkeypatch.setattr(l2l.NTMBFGS, "forward", spy)
    trainer = l2l.MetaTrainer(net, Quadratic(dim=3, batch=2), 4, 2, 1e-9, validate_every=0)
    trainer.fit(1, progress=False)
    for t, (memory, _) in enumerate(memories):
        assert memory.matrix.requires_grad == (t % 2 == 1)
        if t:
            assert torch.equal(memory.matrix, memories[t - 1][1].matrix)
    assert memories[-1][0].matrix.abs().max() > 0


def test_an_optimizee_of_several_tensors():
    """Two tensors of one module have one memory between them, in training as in deployment."""
    problem = ModuleProblem(
        lambda generator: nn.Linear(3, 2), lambda module, generator: module(torch.ones(4, 3)).square().mean()
    )
    net = ntm()
    trainer = l2l.MetaTrainer(net, problem, 3, 3, 1e-9, validate_every=0)
    trainer.fit(1, progress=False)
    curve = trainer.evaluate(1, best=False)
    task = problem.sample(0, "test")
    opt = l2l.LearnedOptimizer(task.parameters(), net)
    for _ in range(3):
        opt.zero_grad()
        task().backward()
        opt.step()
    assert next(iter(opt.state.values()))["memory_matrix"].shape == (1, 8, 8)
    assert float(curve[0, -1]) == pytest.approx(task().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"read_heads": 0}, ValueError, "read_heads"),
        ({"write_heads": 8}, ValueError, "write_heads"),
        ({"read_heads": 2, "write_heads": 7}, ValueError, "write_heads"),
        ({"write_heads": 1.0}, TypeError, "write_heads"),
        ({"memory": "sparse"}, ValueError, "memory"),
        ({"history": 0}, ValueError, "history"),
        ({"history": "ten"}, TypeError, "history"),
        ({"initial": "random"}, ValueError, "initial"),
        ({"add_read": 1}, TypeError, "add_read"),
        ({"gac_cells": 50}, ValueError, "gac_cells"),
    ],
)
def test_wrong_options_are_refused(options, error, name):
    with pytest.raises(error, match=name):
        l2l.NTMBFGS(**options)


def test_a_memory_of_another_kind_or_size_is_refused():
    net = ntm()
    with pytest.raises(TypeError, match="memory"):
        net(torch.ones(6), net.init_state(6), ntm(memory="low_rank").init_memory(6))
    with pytest.raises(ValueError, match="memory"):
        net(torch.ones(6), net.init_state(6), net.init_memory(8))
    with pytest.raises(ValueError, match="num_problems"):
        net.init_memory(6, 4)


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_a_memory_is_made_of_its_entries_again(kind):
    net = ntm(memory=kind, initial="identity", read_heads=1, write_heads=2)
    memory, (a, b, r) = net.init_memory(8, 2), torch.randn(3, 2, 2, 4)
    for _ in range(3):
        memory.write_(a, b, r[:1])
    other = net.memory_from({name: value.clone() for name, value in memory.entries().items()}, 8, 2)
    for each in (memory, other):
        each.write_(b, a, r[1:])
    assert torch.equal(memory.read(r[:1]), other.read(r[:1]))
    assert net.memory_from(memory.entries(), 8, 2).reads is memory.reads


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"memory_reads": torch.zeros(1, 2, 5)}, ValueError),
        ({"memory_reads": [0.0]}, TypeError),
        ({"memory_reads": None}, TypeError),
        ({"memory_matrix": torch.zeros(2, 4, 4), "memory_left": torch.zeros(2, 20, 4)}, ValueError),
        ({"memory_written": torch.tensor(3)}, ValueError),
    ],
)
def test_entries_that_make_no_memory_are_refused(kind, change, error):
    net = ntm(memory=kind, read_heads=1, write_heads=2)
    with pytest.raises(error, match="memory"):
        net.memory_from({**net.init_memory(8, 2).entries(), **change}, 8, 2)


@pytest.mark.parametrize("options", MEMORIES, ids=MEMORY_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_coordinate_that_is_not_finite_stays_alone(options, dtype):
    param = nn.Parameter(torch.zeros(20, dtype=dtype))
    opt = l2l.LearnedOptimizer([param], ntm(**options), num_problems=2)
    for t in range(5):
        param.grad = structured_gradient((20,), seed=t).to(dtype)
        if t == 1:
            param.grad[3] = torch.nan
        opt.step()
    assert param.isnan().nonzero().flatten().tolist() == [3]
    assert all(v.isfinite().all() for name, v in opt.state[param].items() if name.startswith("memory_"))
