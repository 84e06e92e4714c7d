"""The sampled meta-gradient: right when everything is chosen, unbiased otherwise, a function of its generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from l2l_fast.meta import Protocol
from l2l_fast.meta.estimators import FusedBPTT
from l2l_fast.optim import segment_sampling
from l2l_fast.optim.optimizer import LearnedOptimizer
from l2l_fast.optim.segment_sampling import SMALL, Sampling
from l2l_fast.problems import Quadratic
from tests.gac_helpers import gac_network
from tests.helpers import assert_close, random_network
from tests.meta.test_trainer import trainer, weights_of

TILES = 2 * SMALL + 3


def recorded(segment_of, extra_unused: bool = False):
    """An optimizer with a finished segment over one large and one small tensor, gradients of theta_T in place."""
    torch.manual_seed(3)
    large, small = nn.Parameter(torch.randn(5, 64 * TILES // 5 - 7)), nn.Parameter(torch.randn(70))
    target = torch.linspace(3, 5, large.numel()).view_as(large)
    net = random_network(hidden_size=5, output_scale=0.1)
    optimizer = LearnedOptimizer([large, small], net)
    segment_of(optimizer)
    for t in range(4):
        optimizer.zero_grad()
        loss = ((large - target) ** 2).sum()
        if not (extra_unused and t == 1):
            loss = loss + (small**3).sum()
        loss.backward()
        if t < 3:
            optimizer.step()
    return optimizer, net


def sampled_gradient(segment_of, **options) -> torch.Tensor:
    optimizer, net = recorded(segment_of, **options)
    optimizer.backward_segment([0.5, 1.0, 2.0])
    return torch.cat([parameter.grad.reshape(-1) for parameter in net.parameters()])


def with_fraction(fraction: float, seed: int = 0):
    def start(optimizer: LearnedOptimizer) -> None:
        optimizer.start_segment(Sampling(fraction, torch.Generator().manual_seed(seed)))

    return start


def all_chosen(optimizer: LearnedOptimizer) -> None:
    optimizer.start_segment(Sampling(1.0, torch.Generator()))


@pytest.mark.parametrize("extra_unused", [False, True])
def test_choosing_every_tile_gives_the_exact_gradient(extra_unused):
    exact = sampled_gradient(LearnedOptimizer.start_segment, extra_unused=extra_unused)
    assert_close(sampled_gradient(all_chosen, extra_unused=extra_unused), exact, 1e-5)


def test_the_estimate_is_unbiased():
    exact = sampled_gradient(LearnedOptimizer.start_segment)
    estimates = torch.stack([sampled_gradient(with_fraction(0.25, seed)) for seed in range(64)])
    assert (estimates - exact).norm(dim=1).median() > 1e-3 * exact.norm()  # each one differs
    spread = estimates.std(0).norm() / 64**0.5
    assert (estimates.mean(0) - exact).norm() < 4 * spread
    assert spread < 0.1 * exact.norm()


def test_the_estimate_is_a_function_of_the_generator():
    one, same, other = (sampled_gradient(with_fraction(0.25, seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_small_tensors_are_never_sampled():
    net = random_network(hidden_size=5, preprocess="identity", output_scale=0.1)
    collected = []
    for fraction in (0.1, 1.0):
        FusedBPTT(fraction).episode(
            Quadratic(dim=4, batch=16).sample(0),
            net,
            Protocol.make(4, 2),
            lambda: collected.append(net.weight_hh_l0.grad.clone()),
        )
        net.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(collected[:2], collected[2:], strict=True))


def test_gradients_of_the_start_states_stay_exact():
    results = []
    for start in (LearnedOptimizer.start_segment, with_fraction(0.25)):
        optimizer, net = recorded(start)
        states = optimizer.backward_segment(return_grad_start_states=True)
        results.append(([state.data for state in states.values()], net.weight_out.grad))
    assert all(torch.equal(one, other) for one, other in zip(results[0][0], results[1][0], strict=True))
    assert torch.equal(results[0][1], results[1][1])


def test_a_sampled_run_resumes_bit_for_bit(tmp_path):
    options = {"problem": Quadratic(dim=10, batch=128), "coordinate_fraction": 0.3}
    whole = trainer(**options).fit(4, progress=False)
    trainer(**options).fit(2, progress=False).save(tmp_path / "c")
    resumed = trainer(**options).resume(tmp_path / "c").fit(4, progress=False)
    assert torch.equal(weights_of(whole.net), weights_of(resumed.net))
    exact = trainer(problem=options["problem"]).fit(4, progress=False)
    assert not torch.equal(weights_of(whole.net), weights_of(exact.net))


def test_every_episode_and_every_run_looks_at_other_tiles(monkeypatch):
    chosen = []
    part = segment_sampling._part

    def recording(*arguments):
        chosen.append(tuple(arguments[-1].tolist()))
        return part(*arguments)

    monkeypatch.setattr(segment_sampling, "_part", recording)
    for seed in (0, 1):
        trainer(problem=Quadratic(dim=10, batch=256), coordinate_fraction=0.3, seed=seed).fit(3, progress=False)
    assert len(chosen) == 2 * 3 * 2 and len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("fraction, count", [(1e-9, 1), (0.25, 9), (0.5, 18), (0.999, TILES)])
def test_so_many_tiles_are_looked_at(fraction, count, monkeypatch):
    chosen = []
    part = segment_sampling._part
    monkeypatch.setattr(segment_sampling, "_part", lambda *a: chosen.append(a[-1].tolist()) or part(*a))
    assert sampled_gradient(with_fraction(fraction)).isfinite().all()
    assert TILES == 35 and [len(tiles) for tiles in chosen] == [count]
    assert chosen[0] == sorted(set(chosen[0])) and set(chosen[0]) <= set(range(TILES))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, torch.Generator()), ValueError, "fraction.*> 0"),
        ((1.5, torch.Generator()), ValueError, "fraction.*<= 1"),
        (("half", torch.Generator()), TypeError, "fraction"),
        ((0.5, 7), TypeError, "generator.*int"),
    ],
)
def test_wrong_samplings_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Sampling(*arguments)


def test_what_cannot_be_sampled_is_refused_before_anything_is_recorded():
    sampling = Sampling(0.5, torch.Generator())
    plain = LearnedOptimizer([nn.Parameter(torch.ones(3))], random_network(hidden_size=5))
    with pytest.raises(TypeError, match="sampling.*float"):
        plain.start_segment(0.5)
    joint = gac_network(preprocess="identity")
    together = LearnedOptimizer([nn.Parameter(torch.ones(3))], joint)
    with pytest.raises(NotImplementedError, match="start_segment.*communicate cannot be sampled"):
        together.start_segment(sampling)
    plain.start_segment(sampling)
    with pytest.raises(NotImplementedError, match="add_param_group.*cannot be sampled"):
        plain.add_param_group({"params": [nn.Parameter(torch.ones(3))], "network": joint})
    assert len(plain.param_groups) == 1
