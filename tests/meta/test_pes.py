"""Persistent evolution strategies: unbiased for the whole horizon, reproducible, checkpointed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta import PES, Protocol
from l2l_fast.meta.estimators import AutogradBPTT
from l2l_fast.problems import ModuleProblem, Quadratic
from tests.helpers import random_network

HORIZON, UNROLL = 6, 2


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> l2l.CoordinatewiseLSTM:
    """Five trained numbers, so that few pairs make a sharp estimate."""
    net = random_network(hidden_size=4, num_layers=1, preprocess="identity", output_scale=0.05)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in ("weight_out", "bias_out"))
    return net


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in net.parameters() if p.requires_grad])


def estimated(estimator, net, task, protocol) -> torch.Tensor:
    """The sum of an episode's meta-gradients, phi staying what it is."""
    net, total = copy.deepcopy(net), 0.0

    def step() -> None:
        nonlocal total
        total = total + flat(net)
        net.zero_grad()

    estimator.episode(task, net, protocol, step, torch.Generator().manual_seed(5))
    return total


def exact(net, task, weights=None) -> torch.Tensor:
    """Through the whole horizon, second derivatives included."""
    protocol = Protocol.make(HORIZON, HORIZON, weights, True)
    return estimated(AutogradBPTT(), net, copy.deepcopy(task), protocol)


def test_the_mean_of_many_pairs_is_the_gradient_of_the_whole_horizon():
    net, task = network(), Quadratic(dim=3, batch=2).sample(1)
    truth = exact(net, task)
    # Pairs are staggered: every one of N takes part in S of the updates, whose means are over those at hand.
    together = 0.0
    count = 150
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        work = copy.deepcopy(net)
        sums = []

        def step(work=work, sums=sums) -> None:
            sums.append(flat(work))
            work.zero_grad()

        PES(pairs=1, sigma=0.01).episode(task, work, Protocol.make(HORIZON, UNROLL, None, False), step, generator)
        assert len(sums) == HORIZON // UNROLL
        together = together + sum(sums) / count
    error = (together - truth).norm() / truth.norm()
    assert error < 0.25, (together, truth)
    # What truncation loses is more than that: the bias that PES is there to remove.
    truncated = estimated(AutogradBPTT(), net, copy.deepcopy(task), Protocol.make(HORIZON, UNROLL, None, True))
    assert (truncated - truth).norm() / truth.norm() > 2 * error


def test_a_pair_multiplies_its_losses_by_all_perturbations_since_its_start():
    """By hand: one trained number, two segments, the loss of the second alone counts."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([1.0]))

    problem = ModuleProblem(lambda generator: Two(), lambda module, generator: module.x.square().sum(), name="bowl")
    net = random_network(hidden_size=4, num_layers=1, preprocess="identity", output_scale=0.1)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name == "bias_out")
    sigma, found = 0.1, []

    def step() -> None:
        found.append(net.bias_out.grad.item())
        net.zero_grad()

    protocol = Protocol.make(2, 1, [0.0, 1.0], False)
    PES(pairs=1, sigma=sigma).episode(problem.sample(0), net, protocol, step, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    eps = [sigma * torch.randn(1, generator=generator) for _ in range(2)]
    finals = []
    for sign in (1.0, -1.0):
        task, work = problem.sample(0), copy.deepcopy(net)
        parameters = [p for p in task.parameters() if p.requires_grad]
        optimizer = l2l.LearnedOptimizer(parameters, work)
        for e in eps:
            with torch.no_grad():
                work.bias_out.copy_(net.bias_out + sign * e)
            optimizer.zero_grad()
            task().backward()
            optimizer.step()
        finals.append(task().item())
    expected = (eps[0] + eps[1]).item() * (finals[0] - finals[1]) / (2 * sigma**2)
    assert found == [pytest.approx(expected, rel=1e-4)]


def test_the_estimates_of_pairs_are_averaged():
    protocol, found = Protocol.make(UNROLL, UNROLL, None, False), {}
    for pairs in (1, 2):
        net, generator, found[pairs] = network(), torch.Generator().manual_seed(7), []

        def step(net=net, grads=found[pairs]) -> None:
            grads.append(flat(net))
            net.zero_grad()

        for _ in range(2 // pairs):  # one segment only: both pairs of two are of the same age
            PES(pairs=pairs).episode(Quadratic(dim=3, batch=2).sample(0), net, protocol, step, generator)
    (together,), (first, second) = found[2], found[1]
    torch.testing.assert_close(together, (first + second) / 2)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(("pairs", "updates"), [(1, 3), (2, 4), (3, 5), (6, 5)])
def test_pairs_are_staggered_over_the_episode(pairs, updates):
    calls = []
    net = network()

    def step() -> None:
        calls.append(1)
        net.zero_grad()

    losses = PES(pairs=pairs).episode(
        Quadratic(dim=3, batch=2).sample(0), net, Protocol.make(HORIZON, UNROLL, None, False), step
    )
    assert len(calls) == updates and len(losses) == HORIZON + 1
    assert losses[0] == pytest.approx(Quadratic(dim=3, batch=2).sample(0)().item() / 2)


def test_a_diverging_pair_is_left_out_and_counted():
    class Cliff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([1.0]))

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        module.calls = getattr(module, "calls", 0) + 1
        return module.x.square().sum() * (math.nan if module.calls == 4 else 1.0)

    trainer = l2l.MetaTrainer(
        network(), ModuleProblem(lambda generator: Cliff(), loss), HORIZON, UNROLL, estimator=PES(pairs=1),
        validate_every=0,
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.net.parameters()]
    trainer.fit(1, progress=False)
    # The first segment is whole; the second diverges, and there is no third.
    assert trainer.counters.skipped_updates == 1
    assert all(p.isfinite().all() for p in trainer.net.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(trainer.net.parameters(), before))


def make(seed: int = 0, **options) -> l2l.MetaTrainer:
    net = random_network(hidden_size=4, preprocess="identity", output_scale=0.05)
    options = {"estimator": PES(pairs=2, sigma=0.02), "validate_every": 2, "validation_episodes": 1, **options}
    return l2l.MetaTrainer(net, Quadratic(dim=3, batch=2), HORIZON, UNROLL, seed=seed, **options)


def weights(trainer: l2l.MetaTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.net.parameters()])


def test_a_run_is_a_function_of_its_seed_and_resumes_bit_for_bit(tmp_path):
    whole = make().fit(4, progress=False)
    assert torch.equal(weights(whole), weights(make().fit(4, progress=False)))
    assert not torch.equal(weights(whole), weights(make(seed=1).fit(4, progress=False)))
    path = tmp_path / "run.safetensors"
    make().fit(2, checkpoint=path, progress=False)
    resumed = l2l.MetaTrainer.from_checkpoint(path)
    assert isinstance(resumed.estimator, PES) and resumed.settings() == make().settings()
    assert (resumed.estimator.pairs, resumed.estimator.sigma) == (2, 0.02)
    assert torch.equal(weights(resumed.fit(4, progress=False)), weights(whole))
    with pytest.raises(ValueError, match="protocol.estimator"):
        make(estimator="bptt").resume(path)
    torch.set_num_threads(2)
    assert torch.equal(weights(make().fit(4, progress=False)), weights(whole))


def test_it_learns():
    net = l2l.CoordinatewiseLSTM(hidden_size=8, num_layers=1, preprocess="identity", output_scale=1.0)
    problem = Quadratic(dim=4, batch=32)
    trainer = l2l.MetaTrainer(
        net, problem, 20, 5, lr=1e-2, seed=0, estimator=PES(pairs=4, sigma=0.02), clip_norm=1.0, betas=(0.9, 0.99),
        validate_every=0,
    )  # fmt: skip
    before = trainer.evaluate(4, best=False)[:, -1].mean()
    trainer.fit(30, progress=False)
    assert trainer.evaluate(4, best=False)[:, -1].mean() < 0.8 * before


def test_networks_with_memory_train_too():
    net = l2l.NTMBFGS(hidden_size=8, gac_cells=1, memory="low_rank", history=2, preprocess="identity", output_scale=0.1)
    trainer = l2l.MetaTrainer(net, Quadratic(dim=3, batch=2), 4, 2, estimator="pes", validate_every=0)
    before = weights(trainer)
    trainer.fit(1, progress=False)
    assert not torch.equal(before, weights(trainer)) and trainer.counters.skipped_updates == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"estimator": "es"}, ValueError, "one of .*'pes', 'evolution', 'synthetic_gradients'.*, got 'es'"),
        ({"estimator": 3}, ValueError, "estimator"),
        ({"estimator": "pes", "autograd": True}, ValueError, "autograd: is of back-propagation"),
        ({"estimator": "pes", "second_derivatives": True}, ValueError, "second_derivatives"),
        ({"estimator": "pes", "meta_loss": lambda trace: trace.losses.sum()}, ValueError, "meta_loss"),
        ({"estimator": "pes", "coordinate_fraction": 0.5}, ValueError, "coordinate_fraction"),
    ],
)
def test_arguments_of_the_trainer(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0, 0.1), ValueError), ((1.5, 0.1), TypeError), ((1, 0.0), ValueError), ((1, "x"), TypeError)],
)
def test_arguments_of_the_estimator(arguments, error):
    with pytest.raises(error, match="pairs" if arguments[0] in (0, 1.5) else "sigma"):
        PES(*arguments)


def test_a_task_that_cannot_be_copied_is_named():
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(1))

        def __deepcopy__(self, memo):
            raise RuntimeError("one of a kind")

    problem = ModuleProblem(lambda generator: Stubborn(), lambda module, generator: module.x.square().sum(), name="one")
    trainer = l2l.MetaTrainer(network(), problem, 4, 2, estimator="pes", validate_every=0)
    with pytest.raises(TypeError, match="problem 'one'.*cannot be copied: one of a kind"):
        trainer.fit(1, progress=False)
