"""Networks that are pruned, parametrized, normalised or tied train like others, and their checkpoints can be used."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta import MetaTrainer, evaluate, load_best, record_of
from tests.meta.test_trainer import trainer, weights_of
from tests.test_saved_networks import CHANGES

SETTLED = [name for name in CHANGES if name not in ("noisy while training", "an expanded bias")]


def changed(name: str, seed: int = 0, **options) -> l2l.CoordinatewiseLSTM:
    torch.manual_seed(seed)
    net = l2l.CoordinatewiseLSTM(**{"preprocess": "identity", "output_scale": 0.3, **options})
    CHANGES[name](net)
    return net.eval()  # a spectral norm goes on estimating otherwise


@pytest.mark.parametrize("autograd", [False, True])
@pytest.mark.parametrize("name", SETTLED)
def test_trained_measured_saved_and_resumed(name, autograd, tmp_path):
    run = trainer(changed(name), autograd=autograd, validate_every=2).fit(3, progress=False, checkpoint=tmp_path / "c")
    best = run.best_net()
    assert not torch.equal(weights_of(best), weights_of(run.net))  # validated at 2 of 3
    expected = evaluate(best, run.problem, [0, 1], 10)
    assert torch.equal(run.evaluate(2), expected)
    # What a checkpoint gives is a plain network of the same weights, as a file of the best one does.
    best.save(tmp_path / "best")
    for again in (load_best(tmp_path / "c"), l2l.load(tmp_path / "best")):
        assert [key for key, _ in again.named_parameters()] == list(run.net._names)
        assert torch.equal(weights_of(again), weights_of(best)) and record_of(again) == record_of(best)
        assert torch.equal(evaluate(again, run.problem, [0, 1], 10), expected)
    # The best network is still what it was made into, and shares nothing with the one that is trained.
    assert best.state_dict().keys() == run.net.state_dict().keys()
    before = weights_of(best)
    resumed = trainer(changed(name), autograd=autograd, validate_every=2).resume(tmp_path / "c").fit(5, progress=False)
    assert torch.equal(weights_of(run.fit(5, progress=False).net), weights_of(resumed.net))
    assert torch.equal(weights_of(run.best_net()), weights_of(resumed.best_net()))
    assert torch.equal(before, weights_of(best))
    update, _ = best(torch.ones(3), best.init_state(3))  # by forward, with its hooks
    again = load_best(tmp_path / "c")
    assert torch.equal(update, again(torch.ones(3), again.init_state(3))[0])


def test_what_hooks_left_in_a_copy_is_of_its_own_weights():
    run = trainer(changed("pruned"), validate_every=2).fit(3, progress=False)
    run.net(torch.ones(1), run.net.init_state(1))
    best = run.best_net()
    torch.testing.assert_close(best.weight_hh_l0, best.weight_hh_l0_orig * best.weight_hh_l0_mask, rtol=0, atol=0)
    assert not torch.equal(best.weight_hh_l0, run.net.weight_hh_l0) and not best.weight_hh_l0.requires_grad


def test_several_networks_of_which_one_is_pruned(tmp_path):
    net = nn.ModuleDict({"all": changed("pruned")})
    run = trainer(net).fit(3, progress=False, checkpoint=tmp_path / "c")
    again = load_best(tmp_path / "c")
    assert torch.equal(weights_of(again["all"]), weights_of(run.best_net()["all"]))
    assert torch.equal(evaluate(again, run.problem, [0], 5), evaluate(run.best_net(), run.problem, [0], 5))


@pytest.mark.parametrize("name", ["pruned", "weight norm", "old weight norm"])
def test_a_checkpoint_does_not_tell_how_to_change_a_network(name, tmp_path):
    trainer(changed(name)).fit(2, progress=False, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=r"changed after it was built.*resume\(path\)"):
        MetaTrainer.from_checkpoint(tmp_path / "c")
    plain = l2l.CoordinatewiseLSTM(preprocess="identity", output_scale=0.3)
    with pytest.raises(ValueError, match="do not fit the network"):
        trainer(plain).resume(tmp_path / "c")


@pytest.mark.parametrize("episodes", [0, 3])
def test_tied_parameters_stay_tied(episodes, tmp_path):
    run = trainer(changed("tied"))
    if episodes:
        run.fit(episodes, progress=False)
    run.save(tmp_path / "c")
    again = MetaTrainer.from_checkpoint(tmp_path / "c")
    assert again.net.weight_hh_l1 is again.net.weight_hh_l0
    assert torch.equal(weights_of(again.fit(5, progress=False).net), weights_of(run.fit(5, progress=False).net))
    assert again.settings() == run.settings() and "tied" not in trainer().settings()
    best = trainer(changed("tied")).resume(tmp_path / "c").best_net()
    assert torch.equal(weights_of(load_best(tmp_path / "c")), weights_of(best))
    untied = l2l.CoordinatewiseLSTM(preprocess="identity", output_scale=0.3)
    with pytest.raises(ValueError, match="tied: the checkpoint has {'weight_hh_l1': 'weight_hh_l0'}, this"):
        trainer(untied).resume(tmp_path / "c")


def test_checkpoints_of_plain_networks_hold_nothing_more(tmp_path):
    trainer().fit(3, progress=False).save(tmp_path / "c")
    assert {name.split(".")[0] for name in safetensors.torch.load_file(tmp_path / "c")} == {"net", "best", "adam"}


@pytest.mark.parametrize(
    "name, autograd",
    [("noisy while training", False), ("spectral norm", False), ("old spectral norm", True)],
)
def test_weights_that_do_not_stand_still_are_refused_before_anything_is_written(name, autograd, tmp_path):
    net = changed(name).train()
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    run = trainer(net, autograd=autograd, log=tmp_path / "log")
    with pytest.raises(ValueError, match=r"net: its weights are others.*net.eval\(\)"):
        run.fit(1, progress=False, checkpoint=tmp_path / "c")
    assert not list(tmp_path.iterdir()) and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    net.eval()
    assert run.fit(2, progress=False).episode == 2


def test_an_expanded_parameter_is_refused_and_a_frozen_one_is_not():
    net = changed("an expanded bias")
    with pytest.raises(ValueError, match="net: bias_l0 is expanded"):
        trainer(net)
    net.bias_l0.requires_grad_(False)
    trainer(net).fit(1, progress=False)
