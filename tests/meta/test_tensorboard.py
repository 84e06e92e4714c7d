"""What TensorBoard shows of a run is what its log says, also of one that was interrupted and resumed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import l2l_fast as l2l
from l2l_fast.cli import command_line as cli
from l2l_fast.meta import TensorBoardLog
from l2l_fast.meta.log import TrainingLog
from l2l_fast.problems import Quadratic

OPTIONS = {"horizon": 6, "unroll": 3, "validate_every": 2, "validation_episodes": 1}
NAMES = {"loss_first": "train/loss at the start", "loss_mean": "train/mean loss", "loss_final": "train/final loss"}
NAMES |= {"lr": "train/learning rate", "skipped_updates": "train/skipped updates"}


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch):
    """TensorBoard reads files in the order of their names, which begin with the second that they were opened in."""
    if importlib.util.find_spec("tensorboard") is not None:
        clock = SimpleNamespace(time=itertools.count(1_700_000_000).__next__)
        monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)


def trainer(log: TrainingLog) -> l2l.MetaTrainer:
    net = l2l.CoordinatewiseLSTM(hidden_size=4, preprocess="identity", output_scale=1.0)
    return l2l.MetaTrainer(net, Quadratic(dim=2, batch=3), log=log, **OPTIONS)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def agree(log: Path, folder: Path) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    drawn = curves(folder)
    for key, name in NAMES.items():
        expected = [(each["episode"], each[key]) for each in records if each["event"] == "episode"]
        assert drawn[name] == [(episode, pytest.approx(value, rel=1e-6)) for episode, value in expected]
    found = [(each["episode"], each["loss_final"]) for each in records if each["event"] == "validation"]
    assert drawn["validation/final loss"] == [(episode, pytest.approx(value, rel=1e-6)) for episode, value in found]
    norms = [sum(each["grad_norms"]) / len(each["grad_norms"]) for each in records if each["event"] == "episode"]
    assert [value for _, value in drawn["train/norm of the meta-gradient"]] == pytest.approx(norms, rel=1e-6)


def test_the_curves_are_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    log = TensorBoardLog(tmp_path / "log.jsonl", tmp_path / "board")
    trainer(log).fit(4, progress=False)
    agree(tmp_path / "log.jsonl", tmp_path / "board")


def test_a_run_that_is_resumed_has_one_curve(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    file, folder, checkpoint = tmp_path / "log.jsonl", tmp_path / "board", tmp_path / "c.safetensors"
    first = trainer(TensorBoardLog(file, folder))
    first.fit(2, checkpoint=checkpoint, progress=False)
    first.fit(5, progress=False)  # beyond the checkpoint: a resume drops it
    again = l2l.MetaTrainer.from_checkpoint(checkpoint, log=TensorBoardLog(file, folder))
    again.fit(3, progress=False)
    evaluate = l2l.meta.trainer.evaluate
    with monkeypatch.context() as patch:
        patch.setattr("l2l_fast.meta.trainer.evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # within episode 4, whose line is in the log by then
            again.fit(6, progress=False)
    assert l2l.meta.trainer.evaluate is evaluate and again.episode == 3
    again.fit(6, progress=False)
    agree(file, folder)
    assert [episode for episode, _ in curves(folder)["train/final loss"]] == [1, 2, 3, 4, 5, 6]


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    pytest.importorskip("tensorboard")
    log = TensorBoardLog(tmp_path / "log.jsonl", tmp_path / "board")
    losses = {"loss_first": 1.0, "loss_mean": float("inf"), "loss_final": float("nan")}
    log.append({"event": "episode", "episode": 1, "grad_norms": [float("inf")], "lr": 0.1, "skipped_updates": 1,
                "seconds": 0.5, **losses})  # fmt: skip
    log.flush()
    drawn = curves(tmp_path / "board")
    assert "train/mean loss" not in drawn and "train/norm of the meta-gradient" not in drawn
    assert drawn["train/loss at the start"] == [(1, 1.0)]


SMALL = ["train", "--problem", "quadratic", "--option", "dim=2", "--option", "batch=3", "--horizon", "4"]
SMALL += ["--unroll", "2", "--hidden-size", "4", "--validate-every", "0", "--quiet"]


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_the_option_of_train(folder, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    option = ["--tensorboard"] if folder is None else ["--tensorboard", str(tmp_path / folder)]
    assert cli.main([*SMALL, "--episodes", "2", "--out", str(out), *option]) == 0
    board = out / "tensorboard" if folder is None else tmp_path / folder
    assert cli.main(["train", "--out", str(out), "--resume", "--episodes", "3", "--quiet", *option]) == 0
    assert [episode for episode, _ in curves(board)["train/final loss"]] == [1, 2, 3]


def test_without_tensorboard_it_is_said_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install tensorboard \(or l2l_fast\[tensorboard\]\)"):
        TensorBoardLog(tmp_path / "log.jsonl", tmp_path / "board")
    assert cli.main([*SMALL, "--episodes", "2", "--out", str(tmp_path / "run"), "--tensorboard"]) == 2
    assert "TensorBoard is not installed" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert cli.main([*SMALL, "--episodes", "2", "--out", str(tmp_path / "run")]) == 0


def test_a_folder_that_cannot_be_one(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    arguments = [*SMALL, "--episodes", "2", "--out", str(tmp_path / "run"), "--tensorboard", str(tmp_path / "file")]
    assert cli.main(arguments) == 2
    assert "tensorboard: expected a folder" in capsys.readouterr().err and not (tmp_path / "run").exists()
