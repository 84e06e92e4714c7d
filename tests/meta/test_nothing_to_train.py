"""A trainer that could not train says so; one with a partly frozen network trains the rest, and resumes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.evaluation import baselines
from l2l_fast.problems import Quadratic
from tests.meta.test_trainer import network, trainer, weights_of


def loaded_under_inference(tmp_path) -> l2l.CoordinatewiseLSTM:
    network().save(tmp_path / "net.safetensors")
    with torch.inference_mode():
        return l2l.load(tmp_path / "net.safetensors")


@pytest.mark.parametrize("autograd", [False, True])
def test_networks_that_cannot_train_are_refused(autograd, tmp_path):
    several = {"all": network().requires_grad_(False)}
    for net, message in (
        (network().requires_grad_(False), "net: all its parameters are frozen"),
        (several, "net: all its parameters are frozen"),
        (loaded_under_inference(tmp_path), "net: .*inference_mode"),
        (l2l.load_pretrained("quadratic").requires_grad_(False), "net: all its parameters are frozen"),
        (network(output_scale=0.0), "net: with output_scale=0"),
        (l2l.NTMBFGS(output_scale=0.0), "net: with output_scale=0"),
        ({"all": network(output_scale=0.0)}, "net.'all'.: with output_scale=0"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(net, autograd=autograd)
    trainer(l2l.NTMBFGS(output_scale=0.0, add_read=True))


def test_a_network_loaded_under_inference_mode_is_evaluated_all_the_same(tmp_path):
    problem = Quadratic(dim=3, batch=2)
    expected = l2l.meta.evaluate(network(), problem, [0], 4)
    assert torch.equal(l2l.meta.evaluate(loaded_under_inference(tmp_path), problem, [0], 4), expected)
    assert torch.equal(l2l.meta.evaluate(network().requires_grad_(False), problem, [0], 4), expected)


def test_a_refused_network_keeps_its_record():
    net = l2l.load_pretrained("quadratic")
    with pytest.raises(ValueError, match="unroll"):
        trainer(net, unroll=11)
    assert l2l.meta.record_of(net) is not None


@pytest.mark.parametrize("autograd", [False, True])
@pytest.mark.parametrize("names", [["bias_out"], ["weight_ih_l0", "weight_hh_l0", "bias_l0"], ["weight_out"]])
def test_a_partly_frozen_network_trains_the_rest(names, autograd, tmp_path):
    def frozen(seed: int = 0) -> l2l.CoordinatewiseLSTM:
        net = network(seed)
        for name in names:
            net.get_parameter(name).requires_grad_(False)
        return net

    run = trainer(frozen(), autograd=autograd)
    assert run.frozen == tuple(name for name, _ in run.net.named_parameters() if name in names)
    run.fit(4, progress=False)
    for (name, value), before in zip(run.net.named_parameters(), network().parameters(), strict=True):
        assert torch.equal(value, before) == (name in names), name
    assert len(run._adam.state) == 8 - len(names)
    trainer(frozen(), autograd=autograd).fit(2, progress=False).save(tmp_path / "c")
    resumed = trainer(frozen(5), autograd=autograd).resume(tmp_path / "c").fit(4, progress=False)
    assert torch.equal(weights_of(resumed.net), weights_of(run.net))
    with pytest.raises(ValueError, match="frozen"):
        trainer(network(), autograd=autograd).resume(tmp_path / "c")
    assert run.settings()["frozen"] == list(run.frozen) and "frozen" not in trainer().settings()
    run.net.requires_grad_(True)
    with pytest.raises(ValueError, match="net: other parameters are frozen"):
        run.fit(5, progress=False)


def test_fused_and_autograd_train_the_same_part():
    nets = []
    for autograd in (False, True):
        net = network()
        net.weight_hh_l0.requires_grad_(False)
        nets.append(trainer(net, autograd=autograd).fit(4, progress=False).net)
    torch.testing.assert_close(weights_of(nets[0]), weights_of(nets[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon"),
        ({"unroll": 0}, "unroll"),
        ({"lr": 0.0}, "lr"),
        ({"weights": [0.0] * 10}, "weights"),
        ({"validate_every": 3, "validation_episodes": 0}, "validation_episodes"),
        ({"validate_every": 0, "patience": 3}, "patience: without validations"),
        ({"clip_norm": 0.0}, "clip_norm"),
    ],
)
def test_options_under_which_nothing_happens(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


def test_a_learning_rate_that_has_fallen_to_zero():
    run = trainer(decay_episodes=2, decay_to=0.0).fit(2, progress=False)
    before = weights_of(run.net)
    with pytest.raises(ValueError, match="decay_to=0.*2 are finished: 3 more would change nothing"):
        run.fit(5, progress=False)
    assert run.episode == 2 and torch.equal(before, weights_of(run.net))
    run.fit(2, progress=False)


def test_other_loops_with_nothing_to_do():
    problem = Quadratic(dim=3, batch=2)
    for attempt, message in (
        (lambda: trainer().fit(0), "episodes"),
        (lambda: trainer().evaluate(0), "episodes"),
        (lambda: trainer().evaluate(seeds=[]), "seeds"),
        (lambda: baselines.compare(problem, 3, [0], names=[]), "names"),
        (lambda: baselines.search(problem, "sgd", 3, seeds=[]), "seeds"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_buffers_and_modules_around_the_network_do_not_count():
    with pytest.raises(TypeError, match="net"):
        trainer(nn.Sequential(network()))
