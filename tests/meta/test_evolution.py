"""Evolution strategies over whole episodes, and the crowds of optimizees that they compare."""

from __future__ import annotations

import json

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.kernels.tensor_inputs import DEFAULT_INPUTS
from l2l_fast.meta.crowd import Crowd
from l2l_fast.meta.estimators import Evolution
from l2l_fast.problems.zoo import Zoo
from tests.helpers import assert_close
from tests.normalized_helpers import normalized_network


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny optimizees: more threads only wait for each other
    yield
    torch.set_num_threads(before)


def network(**options):
    sizes = {"tensor_inputs": len(DEFAULT_INPUTS), "output_scale": 0.01, "hidden_size": 4}
    net = normalized_network(**{**sizes, **options})
    with torch.no_grad():
        net.weight_nominal.mul_(0.1)
    return net


def orthogonal_network(seed: int) -> l2l.OrthogonalLSTM:
    net = l2l.OrthogonalLSTM()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def zoo(family: str, **options) -> Zoo:
    return Zoo(family, problems=1, data="mnist-10k-embedded", **options)


@pytest.mark.parametrize("make", [network, orthogonal_network])
@pytest.mark.parametrize("family", ["teacher-regression", "noisy-quadratic", "convolutions"])
def test_a_member_goes_the_way_of_the_optimizer(family, make):
    """Steps of a crowd are those of LearnedOptimizer on the task's parameters without their leading dimension."""
    nets = [make(seed=seed) for seed in (1, 2)]
    task, twin = (zoo(family).sample(5, "train") for _ in range(2))
    crowd = Crowd(task, 2, nets[0].config, 20)
    named = ([net.phi(), *net.beside_phi()] for net in nets)
    weights = [torch.stack([each.detach() for each in alike]) for alike in zip(*named, strict=True)]
    alone = []
    for net in nets:
        params = {n: torch.nn.Parameter(p.detach()[0].clone()) for n, p in twin.named_parameters()}
        alone.append((params, l2l.LearnedOptimizer(params.values(), net, total_steps=20)))
    for _ in range(3):  # few: rounding differs, and ways part
        crowd.theta.grad = None
        losses = crowd.losses()
        losses.sum().backward()
        crowd.step(crowd.theta.grad, *weights)
        batch = twin.minibatch()
        for k, (params, optimizer) in enumerate(alone):
            optimizer.zero_grad()
            loss = twin.losses_of({name: param.unsqueeze(0) for name, param in params.items()}, batch)
            loss.sum().backward()
            assert_close(losses[k], loss[0], 1e-4)
            optimizer.step()
    for k, (params, _) in enumerate(alone):
        flat = torch.cat([param.detach().flatten() for param in params.values()])
        assert_close(crowd.theta[k].detach(), flat, 3e-3)  # what is orthogonalized makes more of rounding


def trainer(seed=3, **options):
    net, estimator = network(), Evolution(2, 0.1, 10)
    return l2l.MetaTrainer(
        net, zoo("noisy-quadratic", rescale=False), horizon=30, unroll=10, seed=seed, estimator=estimator, **options
    )


def test_runs_are_reproducible_and_resume(tmp_path):
    whole = trainer().fit(4, progress=False)
    half = trainer().fit(2, progress=False, checkpoint=tmp_path / "c")
    assert not torch.equal(half.net.weight_nominal, whole.net.weight_nominal)
    resumed = l2l.MetaTrainer.from_checkpoint(tmp_path / "c", zoo("noisy-quadratic", rescale=False))
    resumed.fit(4, progress=False)
    assert torch.equal(resumed.net.weight_nominal, whole.net.weight_nominal)
    assert resumed.estimator.config() == whole.estimator.config()


def test_it_learns_a_gain():
    """On quadratics with a learning rate that is far too small, the constant of the gain grows, and the loss falls."""
    net = network()
    with torch.no_grad():
        net.weight_nominal.zero_()
        net.weight_out.zero_()
        net.bias_out.zero_()
    problem = zoo("noisy-quadratic", rescale=False)
    fitted = l2l.MetaTrainer(
        net, problem, horizon=20, unroll=20, lr=0.1, estimator=Evolution(4, 0.2, 20), validate_every=0
    )
    before = fitted.evaluate(4, best=False)[:, -1].log().mean()
    fitted.fit(25, progress=False)
    assert fitted.net.weight_nominal[0, 0] > 0.3
    assert fitted.evaluate(4, best=False)[:, -1].log().mean() < before - 0.05


def test_the_log_has_the_mean_over_the_steps_of_the_episode(tmp_path, monkeypatch):
    """An episode draws its length: the mean is over its steps, not over the horizon."""
    episode = Evolution(2, 0.1, 10).episode
    run = trainer(log=tmp_path / "log.jsonl").fit(3, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    episodes = [line for line in lines if line["event"] == "episode"]
    kept: list[list[float]] = []
    monkeypatch.setattr(run.estimator, "episode", lambda *args: kept.append(episode(*args)) or kept[-1])
    again = trainer()
    again.estimator = run.estimator
    again.fit(3, progress=False)
    assert {len(curve) for curve in kept} - {31}  # some are shorter than the horizon
    for line, curve in zip(episodes, kept, strict=True):
        assert line["loss_mean"] == pytest.approx(sum(curve[1:]) / len(curve[1:]))


def test_the_estimate_is_that_of_antithetic_pairs():
    """Of a loss that is linear in eps the estimate is the projection of its gradient; here from the formula, with the
    two members' losses taken from crowds of their own."""
    net = network()
    estimator, problem = Evolution(1, 0.1, 10), zoo("teacher-regression", rescale=False)
    protocol = l2l.meta.protocol.Protocol.make(10, 10)
    found = []
    estimator.episode(
        problem.sample(7, "train"),
        net,
        protocol,
        lambda: found.append(net.weight_nominal.grad.clone()),
        torch.Generator().manual_seed(4),
    )
    generator = torch.Generator().manual_seed(4)
    torch.rand((), generator=generator, dtype=torch.float64)
    eps = 0.1 * torch.randn(1, net.weight_nominal.numel(), generator=generator, dtype=torch.float64)
    logs = []
    for sign in (1, -1):
        crowd = Crowd(problem.sample(7, "train"), 1, net.config, 10)
        nominals = net.weight_nominal.detach() + sign * eps.view_as(net.weight_nominal).float()
        losses = []
        for _ in range(11):
            crowd.theta.grad = None
            loss = crowd.losses()
            loss.sum().backward()
            losses.append(loss.item())
            crowd.step(crowd.theta.grad, net.phi().detach().unsqueeze(0), nominals.unsqueeze(0))
        logs.append(torch.tensor(losses[1:]).double().log().mean())
    expected = 2.0 * (logs[0] - logs[1]) * eps[0] / (2 * 0.1**2)
    assert len(found) == 1
    assert_close(found[0].flatten(), expected, 1e-2)


def test_refusals():
    with pytest.raises(ValueError, match="sigma"):
        Evolution(sigma=0.0)
    with pytest.raises((ValueError, TypeError), match="pairs"):
        Evolution(pairs=0)
    net = network()
    protocol = l2l.meta.protocol.Protocol.make(10, 10)
    with pytest.raises(TypeError, match="zoo"):
        Evolution().episode(l2l.problems.Quadratic().sample(0, "train"), net, protocol, lambda: None)
    several = Zoo("noisy-quadratic", problems=2).sample(0, "train")
    with pytest.raises(ValueError, match="one problem"):
        Evolution().episode(several, net, protocol, lambda: None)


def test_members_do_not_meet():
    """What is said of all tensors is of those of one member: another one that runs wild changes nothing."""
    tame, wild = network(seed=1), network(seed=1)
    with torch.no_grad():
        wild.weight_nominal[0, 0] += 6.0
    ends = []
    for other in (tame, wild):
        crowd = Crowd(zoo("teacher-regression").sample(5, "train"), 2, tame.config, 20)
        for _ in range(4):
            crowd.theta.grad = None
            crowd.losses().sum().backward()
            phis = torch.stack([net.phi().detach() for net in (tame, other)])
            crowd.step(crowd.theta.grad, phis, torch.stack([n.weight_nominal.detach() for n in (tame, other)]))
        ends.append(crowd.theta.detach())
    assert not torch.allclose(ends[1][0], ends[1][1], rtol=0.1)
    assert_close(ends[1][0], ends[0][0], 1e-5)


def test_all_that_acts_beside_phi_is_trained(tmp_path):
    """Of a network that orthogonalizes, too, and after resuming."""
    problem = zoo("teacher-regression", rescale=False)
    options = {"horizon": 20, "unroll": 10, "seed": 3, "validate_every": 0}
    runs = []
    for steps in ((4,), (2, 4)):
        run = l2l.MetaTrainer(orthogonal_network(0), problem, estimator=Evolution(2, 0.1, 10), **options)
        run.fit(steps[0], progress=False, checkpoint=tmp_path / f"{len(steps)}")
        if len(steps) > 1:
            run = l2l.MetaTrainer.from_checkpoint(tmp_path / "2", problem).fit(steps[1], progress=False)
        runs.append(run.net.state_dict())
    before = orthogonal_network(0).state_dict()
    for name in before:
        assert torch.equal(runs[0][name], runs[1][name])
        assert torch.equal(runs[0][name], before[name]) == (name not in ("weight_nominal", "weight_orthogonal"))


def test_only_networks_with_the_default_inputs_are_trained():
    problem = zoo("teacher-regression", rescale=False)
    run = l2l.MetaTrainer(network(tensor_inputs=3), problem, horizon=20, unroll=10, estimator=Evolution(2, 0.1, 10))
    with pytest.raises(ValueError, match="tensor_inputs=15, got 3"):
        run.fit(1, progress=False)
