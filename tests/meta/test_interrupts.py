"""Ctrl-C at any moment: the run is as it was after the last complete episode, in memory and on the disk."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import l2l_fast as l2l
from l2l_fast.cli import command_line as cli
from l2l_fast.meta import checkpoint as checkpoints
from l2l_fast.problems import ModuleProblem
from tests.meta.test_trainer import log_of, network, trainer, weights_of

EPISODES, CALLS = 5, 11 * 5 + 2 * 11  # evaluations of f in the run below: episodes, and validations after 2 and 4


class Stop(KeyboardInterrupt):
    """As Ctrl-C, and known to be ours."""


class Interrupting:
    """A loss that raises at chosen calls."""

    def __init__(self, calls: set[int], error: type[BaseException] = Stop) -> None:
        self.calls, self.error, self.count = set(calls), error, 0
        self.raised = False

    def __call__(self, module: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        self.count += 1
        if self.count in self.calls:
            self.raised = True
            raise self.error("at call", self.count)
        x = torch.randn(8, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()


def run_of(loss, **options) -> l2l.MetaTrainer:
    problem = ModuleProblem(lambda generator: torch.nn.Linear(3, 1), loss, name="regression")
    return trainer(problem=problem, **{"validate_every": 2, "validation_episodes": 1, **options})


def assert_same(one: l2l.MetaTrainer, other: l2l.MetaTrainer) -> None:
    assert one.counters == other.counters
    assert torch.equal(weights_of(one.net), weights_of(other.net))
    assert torch.equal(weights_of(one.best_net()), weights_of(other.best_net()))
    slots = [checkpoints.adam_tensors(run.net, run._adam) for run in (one, other)]
    assert slots[0].keys() == slots[1].keys()
    assert all(torch.equal(value, slots[1][name]) for name, value in slots[0].items())


def whole(folder: Path, **options) -> l2l.MetaTrainer:
    loss = Interrupting(set())
    run = run_of(loss, log=folder / "whole.jsonl", **options).fit(EPISODES, progress=False)
    assert loss.count == CALLS
    return run


@pytest.mark.parametrize("autograd", [False, True])
@settings(max_examples=15)
@given(calls=st.sets(st.integers(1, CALLS), min_size=1, max_size=3), error=st.sampled_from([Stop, SystemExit, OSError]))
def test_an_interrupt_anywhere_changes_nothing(autograd, calls, error, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    expected = whole(folder, autograd=autograd)
    loss = Interrupting(calls, error)
    checkpoint, log = folder / "checkpoint", folder / "part.jsonl"
    run = run_of(loss, log=log, autograd=autograd)
    for _ in range(len(calls) + 1):
        try:
            run.fit(EPISODES, checkpoint=checkpoint, checkpoint_every=3, progress=False)
        except error:
            # In memory, in the log and on the disk: whole episodes, and not one less.
            events = [record for record in log_of(log) if record["event"] == "episode"]
            assert len(events) == run.episode == checkpoints.read(checkpoint).counters.episode
            before = run_of(Interrupting(set()), autograd=autograd)
            if run.episode:
                before.fit(run.episode, progress=False)
                before.counters.planned = EPISODES
                assert_same(run, before)
            if loss.count % 2:  # go on from the file, or in memory
                run = run_of(loss, net=network(seed=9), log=log, autograd=autograd).resume(checkpoint)
    assert_same(run, expected)
    assert log_of(log) == log_of(folder / "whole.jsonl")


def test_a_second_interrupt_stops_at_once_and_corrupts_nothing(tmp_path, monkeypatch):
    expected = whole(tmp_path)
    loss = Interrupting({40})  # in the third episode
    run = run_of(loss, log=tmp_path / "log")
    checkpoint = tmp_path / "checkpoint"
    for place in ("put_back", "write"):
        with monkeypatch.context() as patch:
            original = getattr(checkpoints, place)

            def interrupted(*arguments, original=original):
                if loss.raised:
                    raise Stop("again")
                return original(*arguments)

            patch.setattr(checkpoints, place, interrupted)
            with pytest.raises(Stop, match="again"):
                run.fit(EPISODES, checkpoint=checkpoint, checkpoint_every=100, progress=False)
        # Half-way back, the next call begins by going back; half-way through saving, the file is the one before.
        assert run._unsettled == (place == "put_back")
        assert checkpoints.read(checkpoint).counters.episode == (0 if place == "put_back" else 2)
        loss.calls, loss.raised = {loss.count + 15}, False  # an episode later
    loss.calls = set()
    run.fit(EPISODES, checkpoint=checkpoint, progress=False)
    assert_same(run, expected)
    assert_same(run_of(Interrupting(set())).resume(checkpoint), expected)


def test_a_run_is_made_again_from_its_checkpoint_alone(tmp_path):
    from l2l_fast.problems import Quadratic
    from l2l_fast.problems.scaled import Scaled

    problem = Scaled(Quadratic(dim=3, batch=4), 0.5, (-1, 1))
    options = {"problem": problem, "weights": "final", "decay_episodes": 3, "coordinate_fraction": 0.5, "seed": 4}
    net = network(seed=2)
    net.bias_out.requires_grad_(False)
    expected = trainer(net, **options).fit(2, progress=False, checkpoint=tmp_path / "c")
    again = l2l.MetaTrainer.from_checkpoint(tmp_path / "c", log=tmp_path / "log")
    assert again.settings() == expected.settings() and again.frozen == ("bias_out",)
    assert_same(again.fit(4, progress=False), expected.fit(4, progress=False))
    run_of(Interrupting(set())).fit(1, progress=False).save(tmp_path / "mine")
    with pytest.raises(ValueError, match="regression"):
        l2l.MetaTrainer.from_checkpoint(tmp_path / "mine")
    trainer(meta_loss=lambda trace: trace.losses[-1]).save(tmp_path / "loss")
    with pytest.raises(ValueError, match="meta_loss"):
        l2l.MetaTrainer.from_checkpoint(tmp_path / "loss")


def test_what_was_finished_is_saved_and_said(tmp_path, capsys):
    run = trainer().fit(3, progress=False)
    run.fit(3, checkpoint=tmp_path / "c")
    assert "nothing left to train: 3 episodes are finished" in capsys.readouterr().err
    assert checkpoints.read(tmp_path / "c").counters.episode == 3


# ---- the command ----

SMALL = ["--problem", "quadratic", "--option", "dim=3", "--option", "batch=4", "--horizon", "6", "--unroll", "3"]
SMALL += ["--hidden-size", "5", "--validate-every", "4", "--validation-episodes", "2"]


def command(out: Path, *arguments: str) -> int:
    return cli.main(["train", "--out", str(out), "--quiet", *arguments])


def finished(out: Path) -> torch.Tensor:
    return l2l.load(out / "optimizer.safetensors").phi().detach()


def interrupt_at(monkeypatch, call: int) -> None:
    count = [0]
    evaluate = l2l.problems.Quadratic.make_task

    def make_task(self, *arguments):
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    monkeypatch.setattr(l2l.problems.Quadratic, "make_task", make_task)


@pytest.mark.parametrize("call, saved", [(1, 0), (2, 1), (6, 3), (8, 5)])
def test_ctrl_c_leaves_a_folder_that_resumes(call, saved, tmp_path, monkeypatch, capsys):
    assert command(tmp_path / "whole", *SMALL, "--episodes", "7") == 0
    out = tmp_path / "part"
    with monkeypatch.context() as patch:
        interrupt_at(patch, call)
        assert command(out, *SMALL, "--episodes", "7") == 130
    assert f"{saved} episodes are saved" in capsys.readouterr().err
    assert command(out, *SMALL, "--episodes", "7") == 2  # not over a run that could go on
    assert "--resume continues it" in capsys.readouterr().err
    assert command(out, "--resume") == 0
    assert f"episodes {saved}..7" in capsys.readouterr().out
    assert torch.equal(finished(out), finished(tmp_path / "whole"))
    assert log_of(out / "log.jsonl") == log_of(tmp_path / "whole" / "log.jsonl")


def test_a_finished_run_is_extended(tmp_path, capsys):
    out = tmp_path / "run"
    assert command(out, *SMALL, "--episodes", "3") == 0
    assert command(out, "--resume") == 0
    assert "nothing left to train: the run has its 3 episodes" in capsys.readouterr().out
    assert command(out, "--resume", "--episodes", "6", "--hidden-size", "5", "--option", "dim=3") == 0
    rates = [record["lr"] for record in log_of(out / "log.jsonl") if record["event"] == "episode"]
    assert len(rates) == 6 and rates[3:] == [pytest.approx(0.01 * rates[0])] * 3  # where the schedule ended
    assert command(out, "--resume", "--episodes", "5") == 2
    assert "--episodes 5: the run has 6 already" in capsys.readouterr().err
    to_zero = tmp_path / "to_zero"
    assert command(to_zero, *SMALL, "--episodes", "2", "--decay-to", "0") == 0
    capsys.readouterr()
    assert command(to_zero, "--resume", "--episodes", "4") == 2
    assert "with decay_to=0 the learning rate is 0 after 2 episodes" in capsys.readouterr().err
    planned = tmp_path / "planned"
    assert command(planned, *SMALL, "--episodes", "3", "--decay-episodes", "6") == 0
    assert command(planned, "--resume", "--episodes", "6") == 0
    assert command(tmp_path / "whole", *SMALL, "--episodes", "6") == 0
    assert torch.equal(finished(planned), finished(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0.5"], "--lr 0.5: the run has 0.01"),
        (["--hidden-size", "6"], "--hidden-size 6: the run has 5"),
        (["--horizon", "7"], "--horizon 7: the run has 6"),
        (["--seed", "1"], "--seed 1: the run has 0"),
        (["--decay-episodes", "9"], "--decay-episodes 9"),
        (["--patience", "9"], "--patience 9: the run has none"),
        (["--option", "dim=4"], "problem.dim"),
        (["--problem", "mnist"], "--problem mnist: the run is on quadratic"),
        (["--option", "sides=4"], "sides"),
    ],
)
def test_options_that_differ_are_named(options, message, tmp_path, capsys):
    assert command(tmp_path, *SMALL, "--episodes", "1") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command(tmp_path, "--resume", "--episodes", "2", *options) == 2
    assert message in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        [*SMALL, "--hidden-size", "3"],
        [*SMALL, "--lr", "-1"],
        [*SMALL, "--unroll", "9"],
        [*SMALL, "--validate-every", "0", "--patience", "2"],
        [*SMALL, "--decay-to", "2"],
        [*SMALL, "--output-scale", "0"],
        [*SMALL, "--resume"],
        ["--episodes", "3"],
        ["--problem", "mnist", "--data", "nowhere"],
    ],
)
def test_a_mistake_leaves_no_folder(options, tmp_path, capsys):
    assert command(tmp_path / "out", *options) == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_log_of_a_run_that_never_saved_does_not_lock_the_folder(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"event": "settings"}\n')
    assert command(tmp_path, "--resume") == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert command(tmp_path, *SMALL, "--episodes", "1") == 0
    assert "begun anew" in capsys.readouterr().err
    assert log_of(tmp_path / "log.jsonl")[0]["problem"]["dim"] == 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_a_real_process(number, status, tmp_path):
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-m", "l2l_fast", "train", *SMALL, "--out", str(tmp_path), "--quiet", "--threads", "1"]
    words += ["--decay-episodes", "100", "--validate-every", "0", "--episodes", "100000"]
    log = tmp_path / "log.jsonl"
    # Whoever runs the tests may ignore SIGINT, as a shell does for what it runs in the background.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, cwd=root, stderr=subprocess.PIPE, text=True, env={**os.environ}, preexec_fn=heed)
    try:
        while process.poll() is None and (log.stat().st_size if log.exists() else 0) < 5000:
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, err
    saved = checkpoints.read(tmp_path / "checkpoint.safetensors").counters
    assert saved.episode == sum(record["event"] == "episode" for record in log_of(log)) > 0
    assert f"{saved.episode} episodes are saved" in err and math.isfinite(saved.episode)
