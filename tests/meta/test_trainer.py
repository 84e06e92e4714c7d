"""MetaTrainer: learning, options, log and checkpoints."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta.protocol import cosine_decay, episode_seed
from l2l_fast.problems import ModuleProblem, Quadratic


def network(seed: int = 0, **options) -> l2l.CoordinatewiseLSTM:
    net = l2l.CoordinatewiseLSTM(**{"hidden_size": 6, "preprocess": "identity", "output_scale": 0.3, **options})
    net.reset_parameters(torch.Generator().manual_seed(seed))
    return net


def trainer(net=None, problem=None, **options) -> l2l.MetaTrainer:
    settings = {"horizon": 10, "unroll": 5, "lr": 1e-2, "validate_every": 3, "validation_episodes": 2, **options}
    return l2l.MetaTrainer(net or network(), problem or Quadratic(dim=3, batch=8), **settings)


def weights_of(net: l2l.CoordinatewiseLSTM) -> torch.Tensor:
    return net.phi().detach().clone()


def log_of(path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_training_learns_to_optimise():
    run = trainer(horizon=20, unroll=10, clip_norm=1.0)
    before = run.evaluate(5, best=False)[:, -1].mean()
    run.fit(60, progress=False)
    after = run.evaluate(5)
    assert after.shape == (5, 21) and after.dtype == torch.float64
    assert after[:, -1].mean() < 0.5 * before
    assert after[:, -1].mean() < 0.5 * after[:, 0].mean()


def test_a_run_is_a_function_of_its_seed():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))  # must not matter
        results.append(weights_of(trainer(seed=seed).fit(4, progress=False).net))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert len({episode_seed(seed, episode) for seed in range(20) for episode in range(50)}) == 1000


def test_fused_and_autograd_training_agree():
    fused = trainer().fit(6, progress=False)
    unrolled = trainer(autograd=True).fit(6, progress=False)
    torch.testing.assert_close(weights_of(fused.net), weights_of(unrolled.net), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"second_derivatives": True},
        {"meta_loss": lambda trace: trace.losses[1:].log().mean()},
        {"weights": "final"},
        {"weights": lambda t: t / 10},
        {"clip_norm": 1e-3},
        {"decay_episodes": 4, "decay_to": 0.0},
        {"betas": (0.5, 0.9)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_changes_the_run_and_survives_a_resume(options, tmp_path):
    plain = trainer().fit(5, progress=False)
    whole = trainer(**options).fit(5, progress=False)
    assert not torch.equal(weights_of(plain.net), weights_of(whole.net))
    trainer(**options).fit(2, progress=False).save(tmp_path / "c")
    resumed = trainer(network(seed=9), **options).resume(tmp_path / "c").fit(5, progress=False)
    assert torch.equal(weights_of(whole.net), weights_of(resumed.net))


def test_fit_counts_episodes_in_all():
    run = trainer().fit(3, progress=False)
    assert run.episode == 3
    assert run.fit(5, progress=False).episode == 5
    assert run.fit(5, progress=False).episode == 5
    assert torch.equal(weights_of(run.net), weights_of(trainer().fit(5, progress=False).net))


def test_the_best_network_is_chosen_by_final_validation_loss(tmp_path):
    run = trainer(log=tmp_path / "log", lr=0.3)  # far too large: it gets worse again
    run.fit(16, progress=False)
    validations = [record for record in log_of(tmp_path / "log") if record["event"] == "validation"]
    finals = [math.inf if record["loss_final"] is None else record["loss_final"] for record in validations]
    assert [record["episode"] for record in validations] == [3, 6, 9, 12, 15]
    assert run.counters.best_loss == min(finals)
    assert run.counters.best_episode == validations[finals.index(min(finals))]["episode"]
    assert [record["best"] for record in validations] == [f == min(finals[: k + 1]) for k, f in enumerate(finals)]
    again = trainer(lr=0.3).fit(run.counters.best_episode, progress=False)
    assert torch.equal(weights_of(run.best_net()), weights_of(again.net))
    assert not torch.equal(weights_of(run.best_net()), weights_of(run.net))


def test_patience_stops_a_run_for_good(tmp_path):
    run = trainer(patience=2, lr=0.3)
    run.fit(100, progress=False, checkpoint=tmp_path / "c")
    assert run.counters.stopped and run.episode < 100
    assert run.episode == run.counters.best_episode + 2 * 3
    resumed = trainer(patience=2, lr=0.3).resume(tmp_path / "c")
    assert resumed.fit(100, progress=False).episode == run.episode


def test_a_meta_gradient_that_is_not_finite_is_left_out():
    run = trainer(network(output_scale=1e30))
    before = weights_of(run.net)
    run.fit(2, progress=False)
    assert run.counters.skipped_updates > 0
    assert weights_of(run.net).isfinite().all()
    assert run.counters.skipped_updates < 4 or torch.equal(before, weights_of(run.net))


def test_clipping_bounds_the_gradient_of_the_loss_per_problem(tmp_path):
    norms = {}
    for batch in (1, 64):
        log = tmp_path / str(batch)
        trainer(problem=Quadratic(dim=3, batch=batch), log=log, lr=1e-6).fit(8, progress=False)
        episodes = [record for record in log_of(log) if record["event"] == "episode"]
        norms[batch] = torch.tensor([record["grad_norms"] for record in episodes]).mean().item()
    assert norms[64] < 2 * norms[1]  # with the sum over problems it would be 64 times as much


def test_user_modules_train(tmp_path):
    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(16, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    problem = ModuleProblem(lambda generator: nn.Linear(3, 1), loss, name="regression")
    run = trainer(network(preprocess="log_sign", output_scale=0.1), problem, horizon=20, unroll=10)
    run.fit(40, progress=False, checkpoint=tmp_path / "c")
    losses = run.evaluate(5)
    assert losses[:, -1].mean() < 0.5 * losses[:, 0].mean()
    assert run.settings()["problem"]["name"] == "regression"


def test_cosine_decay():
    assert [cosine_decay(k, None, 0.1) for k in (0, 7)] == [1.0, 1.0]
    assert cosine_decay(0, 10, 0.1) == 1.0
    assert cosine_decay(5, 10, 0.1) == pytest.approx(0.55)
    assert cosine_decay(10, 10, 0.1) == cosine_decay(50, 10, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": "fast"}, TypeError, "lr"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm"),
        ({"coordinate_fraction": 0.0}, ValueError, "coordinate_fraction"),
        ({"coordinate_fraction": 1.5}, ValueError, "coordinate_fraction"),
        ({"coordinate_fraction": 0.5, "autograd": True}, ValueError, "coordinate_fraction"),
        ({"decay_to": 2.0}, ValueError, "decay_to"),
        ({"decay_episodes": 0}, ValueError, "decay_episodes"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"validate_every": -1}, ValueError, "validate_every"),
        ({"validation_episodes": 0}, ValueError, "validation_episodes"),
        ({"patience": 0}, ValueError, "patience"),
        ({"unroll": 11}, ValueError, "unroll"),
        ({"meta_loss": 3}, TypeError, "meta_loss"),
        ({"net": nn.Linear(1, 1)}, TypeError, "net"),
        ({"problem": nn.Linear(1, 1)}, TypeError, "problem"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        trainer(**options)
    with pytest.raises(ValueError, match="episodes"):
        trainer().fit(0)


def test_options_of_a_trainer_are_read_and_assigned_under_their_names():
    run, other = trainer(lr=0.02, patience=3), trainer(lr=0.01, patience=4)
    run.lr, run.patience = 0.01, 4
    assert (run.lr, run.patience) == (0.01, 4) and run.settings() == other.settings()
    assert torch.equal(weights_of(run.fit(2, progress=False).net), weights_of(other.fit(2, progress=False).net))
