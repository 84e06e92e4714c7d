"""The commands experiment, pretrained, decisions and import."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.cli import command_line as cli
from l2l_fast.networks import pretrained
from tests.test_experiments import small


def test_the_list_of_experiments(capsys):
    assert cli.main(["experiment", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("quadratic-uniform", "mnist", "fashion-conv"))
    assert cli.main(["experiment"]) == 2


def test_an_experiment_is_trained_and_evaluated_and_then_only_evaluated(tmp_path, capsys):
    small(tmp_path)
    file, out = str(tmp_path / "small.json"), tmp_path / "out"
    assert cli.main(["experiment", file, "--out", str(out), "--quiet", "--episodes", "2", "--test-episodes", "2"]) == 0
    assert "2 fresh test tasks" in capsys.readouterr().out
    optimizer = str(out / "optimizer.safetensors")
    again = tmp_path / "again"
    assert cli.main(["experiment", file, "--out", str(again), "--quiet", "--optimizer", optimizer]) == 0
    assert not (again / "candidate0").exists() and (again / "results.md").is_file()


def test_what_cannot_be_run_is_said(tmp_path, capsys):
    small(tmp_path)
    for arguments in (["nothing"], [str(tmp_path / "small.json"), "--evaluate-only"]):
        assert cli.main(["experiment", *arguments]) == 2
        assert "error" in capsys.readouterr().err


def test_the_list_of_pretrained_optimizers(capsys):
    assert cli.main(["pretrained"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in pretrained.names())
    assert cli.main(["pretrained", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(pretrained.names())


def test_a_pretrained_optimizer_by_name(capsys):
    options = ["--problem", "quadratic", "--option", "batch=4", "--episodes", "2", "--horizon", "5"]
    assert cli.main(["evaluate", "--optimizer", "quadratic", *options]) == 0
    assert "learned LSTM" in capsys.readouterr().out


def test_decisions(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "x.png"
    options = ["--problem", "quadratic", "--option", "batch=2", "--horizon", "6", "--adam-lr", "0.2"]
    assert cli.main(["decisions", "quadratic", *options, "--plot", str(plot)]) == 0
    assert plot.is_file() and "Adam 0.2" in capsys.readouterr().out


def test_import(tmp_path, capsys):
    module = nn.ModuleDict({"cell": nn.LSTMCell(2, 8), "out": nn.Linear(8, 1)})
    torch.save(module.state_dict(), tmp_path / "x.pt")
    options = ["--preprocess", "log_sign", "--output-scale", "0.5", "--out", str(tmp_path / "x.safetensors")]
    assert cli.main(["import", str(tmp_path / "x.pt"), *options]) == 0
    net = l2l.load(tmp_path / "x.safetensors")
    assert net.output_scale == 0.5 and torch.equal(net.weight_out, module["out"].weight)
    (tmp_path / "x.l2l").write_bytes(pickle.dumps({"linear": print}))
    assert cli.main(["import", str(tmp_path / "x.l2l"), *options]) == 2
    assert "print" in capsys.readouterr().err


def test_training_a_general_optimizer_goes_on_from_another(tmp_path, capsys):
    """The recipe of the zoo, from weights that are there, with the suite as the next step."""
    small = ["--problem", "zoo", "--option", "problems=1", "--option", 'families="noisy-quadratic"', "--horizon", "20"]
    out = str(tmp_path / "run")
    arguments = ["train", *small, "--unroll", "10", "--episodes", "2", "--out", out, "--quiet", "--start", "general"]
    assert cli.main(arguments) == 0
    assert f"measure it with:   python -m l2l_fast suite {out}" in capsys.readouterr().out
    before, after = pretrained.load_pretrained("general"), l2l.load(tmp_path / "run" / "optimizer.safetensors")
    moved = (after.weight_nominal - before.weight_nominal).abs().max()
    assert 0 < moved < 0.2 and torch.equal(after.phi(), before.phi())
    for wrong, message in (
        ([*arguments[:-5], "--out", str(tmp_path / "b"), "--start", "genral"], "--start: no such file"),
        ([*arguments, "--hidden-size", "8", "--out", str(tmp_path / "c")], "--hidden-size: with --start"),
        (["train", "--resume", "--out", out, "--start", "general"], "--start: a run that is resumed"),
    ):
        assert cli.main(wrong) == 2
        assert message in capsys.readouterr().err
