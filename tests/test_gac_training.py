"""Networks with global averaging cells in MetaTrainer, in files, and on ill-conditioned quadratics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta.estimators import AutogradBPTT, FusedBPTT
from l2l_fast.meta.protocol import Protocol
from l2l_fast.problems import ModuleProblem, Quadratic
from tests.gac_helpers import GAC_CONFIGS, GAC_IDS, gac_network
from tests.helpers import assert_close, random_network


def module_problem():
    return ModuleProblem(
        lambda generator: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)),
        lambda module, generator: (module(torch.randn(8, 5, generator=generator)) - 1).square().mean(),
    )


PROBLEMS = {"quadratic": lambda: Quadratic(dim=5, batch=3), "several tensors": module_problem}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_fused_and_autograd_episodes_agree(problem):
    """Meta-gradients of both segments of an episode, from the fused backward and from autograd."""
    results = []
    for estimator in (FusedBPTT(), AutogradBPTT()):
        net, gradients = gac_network(preprocess="identity"), []

        def meta_step(net=net, gradients=gradients):
            gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
            net.zero_grad()

        losses = estimator.episode(PROBLEMS[problem]().sample(3), net, Protocol.make(6, 3), meta_step)
        results.append((torch.tensor(losses), gradients))
    assert_close(results[0][0], results[1][0], 1e-5, "losses")
    assert len(results[0][1]) == 2
    for actual, expected in zip(results[0][1], results[1][1], strict=True):
        assert_close(actual, expected, 1e-4, "meta-gradient")


def test_problems_of_a_batch_do_not_mix_in_training_or_evaluation():
    """One problem's curve is the same alone and beside others: the first of a batch of 4 against all four."""
    net = gac_network(preprocess="identity", output_scale=0.3)
    task = Quadratic(dim=5, batch=4).sample(0, "test")
    together = torch.cat([task.W, task.y], dim=2)
    opt = l2l.LearnedOptimizer([task.theta], net, num_problems=4)
    alone = nn.Parameter(task.theta.detach()[1:2].clone())
    single = l2l.LearnedOptimizer([alone], net)
    for _ in range(4):
        opt.zero_grad()
        task().backward()
        opt.step()
        alone.grad = None
        (together[1:2, :, :5] @ alone.unsqueeze(-1) - task.y[1:2]).square().sum().backward()
        single.step()
    assert_close(task.theta[1:2], alone, 1e-5)


def test_meta_training_learns():
    torch.manual_seed(0)
    net = l2l.CoordinatewiseLSTM(8, preprocess="identity", output_scale=1.0, gac_cells=2)
    trainer = l2l.MetaTrainer(net, Quadratic(dim=4, batch=16), 20, 10, 2e-2, clip_norm=1.0, validate_every=0)
    before = trainer.evaluate(1, best=False)[0, -1]
    trainer.fit(25, progress=False)
    assert trainer.evaluate(1, best=False)[0, -1] < 0.6 * before


@pytest.mark.parametrize("kind", ["gac", "memory"])
def test_checkpoints_resume_exactly(kind, tmp_path):
    def trainer():
        torch.manual_seed(0)
        options = {"hidden_size": 6, "num_layers": 1, "preprocess": "identity", "gac_cells": 2}
        net = l2l.CoordinatewiseLSTM(**options) if kind == "gac" else l2l.NTMBFGS(**options)
        return l2l.MetaTrainer(net, Quadratic(dim=3, batch=4), 6, 3, validate_every=2, validation_episodes=1)

    whole, half = trainer().fit(4, progress=False), trainer().fit(2, progress=False)
    half.save(tmp_path / "checkpoint")
    resumed = trainer().resume(tmp_path / "checkpoint").fit(4, progress=False)
    assert torch.equal(resumed.net.phi(), whole.net.phi())
    best = l2l.meta.load_best(tmp_path / "checkpoint")
    assert type(best) is type(whole.net) and best.options() == whole.net.options()


def test_sampled_coordinates_are_refused():
    with pytest.raises(ValueError, match="coordinate_fraction"):
        l2l.MetaTrainer(gac_network(), Quadratic(), coordinate_fraction=0.5)


@pytest.mark.parametrize("options", GAC_CONFIGS, ids=GAC_IDS)
def test_files_keep_the_configuration(options, tmp_path):
    net = random_network(**options)
    net.save(tmp_path / "net.safetensors")
    loaded = l2l.load(tmp_path / "net.safetensors")
    assert loaded.config == net.config
    assert torch.equal(loaded.phi(), net.phi())


def test_lstm_cells_cannot_express_averages():
    with pytest.raises(ValueError, match="gac_cells"):
        gac_network().to_lstm_cells()


def test_lstm_cells_with_more_inputs_and_outputs_round_trip():
    net = random_network(extra_inputs=2, num_outputs=3)
    cells, linear = net.to_lstm_cells()
    assert cells[0].input_size == 4 and linear.out_features == 3
    back = l2l.CoordinatewiseLSTM.from_lstm_cells(cells, linear, extra_inputs=2, num_outputs=3)
    assert back.config == net.config and torch.equal(back.phi(), net.phi())
    with pytest.raises(ValueError, match="input_size"):
        l2l.CoordinatewiseLSTM.from_lstm_cells(cells, linear)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_ill_conditioned_quadratics_have_the_condition_asked_for(condition):
    task = Quadratic(dim=10, batch=6, family="ill_conditioned", condition=condition).sample(0)
    eigenvalues = torch.linalg.eigvalsh((task.W.mT @ task.W).double())
    torch.testing.assert_close(eigenvalues[:, -1], torch.ones(6, dtype=torch.float64), rtol=1e-4, atol=0)
    measured = eigenvalues[:, -1] / eigenvalues[:, 0]
    torch.testing.assert_close(measured, torch.full_like(measured, condition), rtol=0.02, atol=0)
    # The eigenvectors point everywhere: no coordinate is special.
    diagonal = (task.W.mT @ task.W).diagonal(dim1=1, dim2=2)
    assert condition == 1.0 or diagonal.std() > 0.02


def test_ill_conditioned_quadratics_in_configurations():
    problem = Quadratic(dim=3, family="ill_conditioned", condition=50.0)
    assert l2l.problems.get(**problem.config()).config() == problem.config()
    assert "condition" not in Quadratic().config()  # checkpoints from before there was this family
    with pytest.raises(ValueError, match="condition"):
        Quadratic(family="ill_conditioned", condition=0.5)
