"""Trained optimizers in files, what they remember, what the package brings, and the warning at another protocol."""

from __future__ import annotations

import json
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta import MetaTrainer, ProtocolWarning, evaluate, load_best, record_of
from l2l_fast.meta.mismatch import mismatches
from l2l_fast.networks import pretrained, trained
from l2l_fast.networks.record import attach
from tests.helpers import random_network

QUADRATIC = {"preprocess": "identity", "output_scale": 1.0, "hidden_size": 8}


def trainer(net=None, **options):
    net = l2l.CoordinatewiseLSTM(**QUADRATIC) if net is None else net
    settings = {"horizon": 6, "unroll": 3, "validate_every": 2, "validation_episodes": 1, **options}
    return MetaTrainer(net, l2l.problems.Quadratic(dim=2, batch=3), **settings)


def test_the_record_travels_with_the_network(tmp_path):
    run = trainer().fit(2, progress=False, checkpoint=tmp_path / "c")
    net = run.best_net()
    record = record_of(net)
    assert record["episodes"] == 2 and record["protocol"]["horizon"] == 6 and record["problem"]["dim"] == 2
    trained.save(net, tmp_path / "x.safetensors")
    for again in (l2l.load(tmp_path / "x.safetensors"), load_best(tmp_path / "c")):
        assert torch.equal(again.phi(), net.phi())
        assert record_of(again) == json.loads(json.dumps(record))
    # The plain reader and writer keep it too; without a record there is none in the file.
    net.save(tmp_path / "plain.safetensors")
    for again in (l2l.load(tmp_path / "plain.safetensors"), l2l.network.load(tmp_path / "x.safetensors")):
        assert torch.equal(again.phi(), net.phi()) and record_of(again) == json.loads(json.dumps(record))
        with pytest.warns(ProtocolWarning, match="horizon"):
            evaluate(again, l2l.problems.Quadratic(dim=2, batch=3), [0], 7)
    assert trained.read_record(tmp_path / "plain.safetensors") == record
    l2l.CoordinatewiseLSTM(**QUADRATIC).save(tmp_path / "plain.safetensors")
    assert record_of(l2l.load(tmp_path / "plain.safetensors")) is None


@pytest.mark.parametrize("record", [3, ["x"], {"x": {1, 2}}, {"x": torch.ones(2)}])
def test_a_record_that_no_file_can_hold(tmp_path, record):
    for net in (random_network(), nn.ModuleDict({"a": random_network()})):
        with pytest.raises(TypeError, match="record: expected"):
            trained.save(net, tmp_path / "x", record)
    assert not list(tmp_path.iterdir())


def test_the_last_network_remembers_its_protocol_and_does_not_pass_for_the_best(tmp_path):
    run = trainer().fit(4, progress=False)
    run.net.save(tmp_path / "x")
    again = l2l.load(tmp_path / "x")
    record, best = record_of(again), record_of(run.best_net())
    assert (record["episodes"], record["best_episode"], record["validation_loss"]) == (4, None, None)
    assert best["best_episode"] in (2, 4) and record["protocol"] == best["protocol"]
    with pytest.warns(ProtocolWarning, match="horizon"):
        evaluate(again, l2l.problems.Quadratic(dim=2, batch=3), [0], 7)


def test_further_training_forgets_the_old_record():
    net = trainer().fit(1, progress=False).best_net()
    assert record_of(net) is not None
    record = record_of(net)
    run = trainer(net, horizon=4)
    assert record_of(run.best_net())["protocol"]["horizon"] == 4
    assert record_of(net) == record  # a trainer alone changes nothing
    run._one_episode()
    assert record_of(net) is None


@pytest.mark.parametrize("autograd", [False, True])
def test_a_record_is_lost_with_the_first_update_and_comes_back_with_the_weights(autograd):
    net = trainer().fit(1, progress=False).best_net()
    record, before = record_of(net), net.phi().clone()
    run = trainer(net, horizon=4, unroll=2, autograd=autograd)
    seen = []
    step = run._meta_step

    def interrupted():
        step()
        seen.append(record_of(net))
        if len(seen) == 2:
            raise KeyboardInterrupt

    run._meta_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.fit(1, progress=False)
    assert seen == [None, None] and torch.equal(before, net.phi()) and record_of(net) == record
    run._meta_step = step
    run.fit(1, progress=False)
    assert record_of(net)["protocol"]["horizon"] == 4


def test_updates_that_are_left_out_leave_the_record():
    net = trainer().fit(1, progress=False).best_net()
    record, run = record_of(net), trainer(net)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    run._meta_step()
    assert run.counters.skipped_updates == 1 and record_of(net) == record


def test_a_resumed_network_does_not_carry_the_record_of_its_former_weights(tmp_path):
    trainer().fit(1, progress=False).save(tmp_path / "c")
    run = trainer(trainer(horizon=5).fit(1, progress=False).best_net()).resume(tmp_path / "c")
    assert record_of(run.net) is None


@pytest.mark.parametrize(
    "problem, horizon, words",
    [
        (l2l.problems.Quadratic(dim=2, batch=3), 7, "horizon: trained for 6 steps, evaluated over 7"),
        (l2l.problems.Quadratic(dim=2, family="gaussian"), 6, "family"),
        (l2l.problems.Quadratic(dim=2, init_std=1.0), 6, "init_std"),
        (l2l.problems.MNIST(hidden=(4,), batch_size=8), 2, "name: trained with 'quadratic'"),
    ],
)
def test_another_protocol_warns(problem, horizon, words):
    net = trainer().fit(1, progress=False).best_net()
    with pytest.warns(ProtocolWarning, match=words):
        evaluate(net, problem, [0], horizon)


def test_a_value_within_the_range_of_the_training_does_not_warn():
    net = l2l.CoordinatewiseLSTM()
    attach(net, {"problem": {"init_std": [0.001, 0.05]}})
    for within in (0.001, 0.01, 0.05):
        assert mismatches(net, l2l.problems.MNIST(init_std=within), 100) == []
    assert mismatches(net, l2l.problems.MNIST(init_std=(0.001, 0.05)), 100) == []
    for other in (0.0009, 0.1, (0.001, 0.1)):
        assert "init_std" in mismatches(net, l2l.problems.MNIST(init_std=other), 100)[0]


def test_the_same_protocol_and_mere_transfers_do_not_warn():
    net = trainer().fit(1, progress=False).best_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(net, l2l.problems.Quadratic(dim=2, batch=3), [0], 6)
        evaluate(net, l2l.problems.Quadratic(dim=5, batch=2), [0], 4)
        evaluate(l2l.CoordinatewiseLSTM(**QUADRATIC), l2l.problems.Quadratic(), [0], 2)


def test_another_output_scale_or_minibatch_is_a_mismatch():
    net = random_network(output_scale=0.1)
    record = {
        "problem": {"name": "mnist", "batch_size": 128},
        "network": {**net.config._asdict(), "output_scale": 0.5},
        "protocol": {"horizon": 100},
    }
    attach(net, record)
    lines = mismatches(net, l2l.problems.MNIST(batch_size=64), 100)
    assert len(lines) == 2 and "batch_size" in lines[0] and "output_scale" in lines[1]


def test_several_networks_in_one_file(tmp_path):
    both = nn.ModuleDict({"conv": random_network(0), "fc": random_network(1, hidden_size=8)})
    attach(both, {"episodes": 3})
    trained.save(both, tmp_path / "x.safetensors")
    again = trained.load(tmp_path / "x.safetensors")
    assert list(again) == ["conv", "fc"] and again["fc"].hidden_size == 8
    assert all(torch.equal(again[kind].phi(), both[kind].phi()) for kind in both)
    assert record_of(again) == {"episodes": 3}


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    trained.save(nn.ModuleDict({"a": random_network()}), path)
    content = path.read_bytes()
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    others = ({"config": "{}"}, {"config": "null"}, {"format_version": "9"}, {"training": "["}, {"training": "3"})
    for changed in others:
        path.write_bytes(safetensors.torch.save(tensors, {**metadata, **changed}))
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            trained.load(path)
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        trained.load(path)
    with pytest.raises(FileNotFoundError):
        trained.load(tmp_path / "missing")
    with pytest.raises(TypeError, match="net"):
        trained.save(nn.Linear(1, 1), path)


@pytest.mark.parametrize("name", pretrained.names())
def test_every_pretrained_optimizer_says_what_it_is(name):
    facts = l2l.list_pretrained()[name]
    assert facts["problem"]["name"] and facts["horizon"] >= 100 and facts["episodes"] >= 1
    assert all("test tasks" in score for score in facts["score"].values())
    assert pretrained.path_of(name).stat().st_size < 100_000


def test_the_pretrained_quadratic_optimizer_beats_every_tuned_baseline():
    net = l2l.load_pretrained("quadratic")
    losses = evaluate(net, l2l.problems.Quadratic(), range(3), 100)
    # NAG at its best learning rate ends at 0.077 in the mean (Adam 0.094, RMSprop 0.160, SGD 0.178).
    assert losses[:, -1].mean() < 0.065
    score = l2l.list_pretrained()["quadratic"]["score"]["test"]
    assert losses[:, -1].mean().item() == pytest.approx(score["step 100"], rel=0.5)


def test_unknown_names():
    with pytest.raises(ValueError, match="quadratic"):
        l2l.load_pretrained("nothing")


def test_several_networks_become_groups():
    net = l2l.load_pretrained("fashion-conv")
    model = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten(), nn.Linear(2, 3))
    for call in (
        lambda: l2l.LearnedOptimizer(model.parameters(), net),
        lambda: l2l.LearnedOptimizer([{"params": model.parameters(), "network": net}]),
    ):
        with pytest.raises(TypeError, match=r"network: .*\['conv', 'fc'\].*LearnedOptimizer\(\[\{'params'") as error:
            call()
    # What the message says works.
    example = str(error.value).split("LearnedOptimizer(")[1][:-1]
    for kind, part in (("conv", "[model[0].weight]"), ("fc", "[model[0].bias, *model[2].parameters()]")):
        example = example.replace(f"..., 'network': networks['{kind}']", f"{part}, 'network': networks['{kind}']")
    optimizer = l2l.LearnedOptimizer(eval(example, {"model": model, "networks": net}))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
