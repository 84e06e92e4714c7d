"""Checkpoints and logs: a run that was killed and resumed is the run that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import safetensors.torch
import torch

import l2l_fast as l2l
from l2l_fast.meta import checkpoint as checkpoints
from l2l_fast.meta.log import TrainingLog
from l2l_fast.problems import Quadratic
from tests.meta.test_trainer import log_of, network, trainer, weights_of


def test_a_resumed_run_is_bit_identical(tmp_path):
    whole = trainer(log=tmp_path / "whole.jsonl").fit(11, progress=False, checkpoint=tmp_path / "whole")
    # Interrupted after episode 8; the last checkpoint is from episode 7, the log is ahead of it.
    part = trainer(log=tmp_path / "part.jsonl").fit(7, progress=False, checkpoint=tmp_path / "part")
    part.fit(8, progress=False)
    resumed = trainer(network(seed=5), log=tmp_path / "part.jsonl").resume(tmp_path / "part")
    assert resumed.episode == 7
    resumed.fit(11, progress=False, checkpoint=tmp_path / "part")
    assert torch.equal(weights_of(whole.net), weights_of(resumed.net))
    assert torch.equal(weights_of(whole.best_net()), weights_of(resumed.best_net()))
    assert log_of(tmp_path / "whole.jsonl") == log_of(tmp_path / "part.jsonl")
    one, other = (safetensors.torch.load_file(tmp_path / name) for name in ("whole", "part"))
    assert len(one) == 5 * 8 and one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


SCRIPT = """
    import os, sys, torch
    import l2l_fast as l2l
    from tests.meta.test_trainer import trainer
    torch.set_num_threads(1)
    folder, episodes = sys.argv[1], int(sys.argv[2])
    run = trainer(log=os.path.join(folder, "log.jsonl"))
    checkpoint = os.path.join(folder, "checkpoint")
    if os.path.exists(checkpoint):
        run.resume(checkpoint)
    run.fit(episodes, progress=False, checkpoint=checkpoint, checkpoint_every=2)
    run.net.save(os.path.join(folder, "net"))
"""


def test_kill_minus_nine_at_any_moment_changes_nothing(tmp_path):
    episodes, root = 150, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), str(episodes)]
    log = tmp_path / "log.jsonl"
    kills = 0
    chance = random.Random(time.time_ns())
    for _ in range(2):
        size = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(command, env=environment, cwd=tmp_path)
        try:
            while process.poll() is None and (log.stat().st_size if log.exists() else 0) <= size + 1000:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.3))
            kills += process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert kills, "the run was over before it could be killed"
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)

    torch.set_num_threads(1)
    whole = trainer(log=tmp_path / "whole.jsonl").fit(episodes, progress=False)
    assert torch.equal(weights_of(l2l.load(tmp_path / "net")), weights_of(whole.net))
    assert log_of(log) == log_of(tmp_path / "whole.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 15}, "protocol.horizon: the checkpoint has 10, this trainer 15"),
        ({"unroll": 2}, "protocol.unroll"),
        ({"weights": "final"}, "protocol.weights"),
        ({"lr": 0.5}, "meta_optimizer.lr"),
        ({"seed": 3}, "seed"),
        ({"second_derivatives": True}, "protocol.second_derivatives"),
        ({"validate_every": 1}, "validation.every"),
        ({"net": network(output_scale=0.1)}, "network.output_scale: the checkpoint has 0.3, this trainer 0.1"),
        ({"net": network(hidden_size=5)}, "network.hidden_size"),
        ({"problem": Quadratic(dim=4, batch=8)}, "problem.dim"),
    ],
)
def test_another_run_is_not_resumed(options, message, tmp_path):
    trainer().fit(1, progress=False).save(tmp_path / "c")
    other = trainer(**options)
    before = weights_of(other.net)
    with pytest.raises(ValueError, match=message):
        other.resume(tmp_path / "c")
    assert torch.equal(before, weights_of(other.net)) and other.episode == 0


def test_damaged_and_foreign_files(tmp_path):
    run = trainer().fit(3, progress=False)
    run.save(tmp_path / "c")
    content = (tmp_path / "c").read_bytes()
    with pytest.raises(FileNotFoundError):
        run.resume(tmp_path / "none")
    for cut in (0, 5, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:cut])
        with pytest.raises(ValueError, match="cut"):
            trainer().resume(tmp_path / "cut")
    run.net.save(tmp_path / "net")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        trainer().resume(tmp_path / "net")
    with pytest.raises(ValueError, match="format"):
        l2l.load(tmp_path / "c")


@pytest.mark.parametrize("drop", ["net.bias_out", "adam.bias_out.exp_avg", "best.weight_out"])
def test_a_checkpoint_that_lacks_a_tensor_changes_nothing(drop, tmp_path):
    trainer().fit(3, progress=False).save(tmp_path / "c")
    with safetensors.safe_open(tmp_path / "c", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != drop}
        metadata = file.metadata()
    safetensors.torch.save_file(tensors, tmp_path / "c", metadata)
    run = trainer(network(seed=3))
    before = weights_of(run.net)
    with pytest.raises(ValueError, match="fit"):
        run.resume(tmp_path / "c")
    assert run.episode == 0 and torch.equal(before, weights_of(run.net))
    run.fit(2, progress=False)
    assert torch.equal(weights_of(run.net), weights_of(trainer(network(seed=3)).fit(2, progress=False).net))


def test_the_best_network_of_a_checkpoint_loads(tmp_path):
    run = trainer()
    run.save(tmp_path / "new")
    assert torch.equal(weights_of(l2l.meta.load_best(tmp_path / "new")), weights_of(run.net))
    run.fit(4, progress=False).save(tmp_path / "c")
    net = l2l.meta.load_best(tmp_path / "c")
    assert net.config == run.net.config
    assert torch.equal(weights_of(net), weights_of(run.best_net()))
    assert l2l.meta.is_checkpoint(tmp_path / "c")
    net.save(tmp_path / "net")
    assert not l2l.meta.is_checkpoint(tmp_path / "net")
    assert not l2l.meta.is_checkpoint(tmp_path / "none")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    run = trainer().fit(1, progress=False)
    run.save(tmp_path / "c")
    content = (tmp_path / "c").read_bytes()
    run.fit(2, progress=False)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == content
    assert os.listdir(tmp_path) == ["c"]


def test_a_log_is_not_mixed_up(tmp_path):
    log = tmp_path / "log"
    trainer(log=log).fit(1, progress=False)
    with pytest.raises(ValueError, match="already holds a run"):
        trainer(log=log).fit(1, progress=False)


def test_a_log_is_cut_back_to_whole_lines_of_the_past(tmp_path):
    log = TrainingLog(tmp_path / "sub" / "log")
    assert log.is_empty()
    log.cut_back(3)
    log.append({"event": "settings", "lr": 0.1})
    for episode in range(1, 6):
        log.append({"event": "episode", "episode": episode, "loss": float("inf") if episode == 2 else 0.5})
    with open(log.path, "ab") as file:
        file.write(b'{"event": "epis')
    log.cut_back(5)
    assert len(log.records()) == 6
    assert log.records()[2] == {"event": "episode", "episode": 2, "loss": None}
    log.cut_back(2)
    assert [record.get("episode") for record in log.records()] == [None, 1, 2]
    log.cut_back(2)
    assert len(log.records()) == 3


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    trainer().save(tmp_path / "c")
    with safetensors.safe_open(tmp_path / "c", framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(tmp_path / "c")
    safetensors.torch.save_file(tensors, tmp_path / "c", {**metadata, "format_version": "2"})
    for read in (l2l.meta.load_best, trainer().resume, l2l.MetaTrainer.from_checkpoint):
        with pytest.raises(ValueError, match="expected a checkpoint .*version '1'.*'2'"):
            read(tmp_path / "c")


OPTIONS = {
    "horizon": 9,
    "unroll": 4,
    "lr": 0.02,
    "seed": 5,
    "weights": [float(t) for t in range(1, 11)],
    "second_derivatives": True,
    "autograd": True,
    "coordinate_fraction": 0.5,
    "clip_norm": 0.7,
    "betas": (0.8, 0.95),
    "decay_episodes": 7,
    "decay_to": 0.3,
    "validate_every": 4,
    "validation_episodes": 3,
    "patience": 6,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_in_the_settings_and_comes_back_from_a_checkpoint(name, tmp_path):
    plain, run = trainer(), trainer(**{name: OPTIONS[name]})
    assert run.settings() != plain.settings()
    run.save(tmp_path / "c")
    with pytest.raises(ValueError, match="belongs to another run"):
        plain.resume(tmp_path / "c")
    again = l2l.MetaTrainer.from_checkpoint(tmp_path / "c")
    assert again.settings() == run.settings()
    for attribute in ("protocol", *set(OPTIONS) - {"horizon", "unroll", "weights", "second_derivatives"}):
        assert getattr(again, attribute) == getattr(run, attribute), attribute
    group = again._adam.param_groups[0]
    assert (group["betas"], group["lr"], group["eps"]) == (run.betas, run.lr, 1e-8)


def test_a_checkpoint_is_written_when_it_is_due_and_not_twice(tmp_path, monkeypatch):
    written, write = [], checkpoints.write
    monkeypatch.setattr(
        checkpoints, "write", lambda path, saved: (written.append(saved.counters.episode), write(path, saved))
    )
    run = trainer().fit(7, progress=False, checkpoint=tmp_path / "c", checkpoint_every=3)
    assert written == [0, 3, 6, 7]
    run.fit(7, progress=False, checkpoint=tmp_path / "c")
    run.fit(9, progress=False, checkpoint=tmp_path / "c", checkpoint_every=3)
    assert written == [0, 3, 6, 7, 9]
    run.fit(9, progress=False, checkpoint=tmp_path / "other")
    assert written == [0, 3, 6, 7, 9, 9]
