"""Contenders by text: what is understood, and what is said of what is not."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.evaluation.suite import Contender, parse
from l2l_fast.networks.record import attach
from l2l_fast.networks.shipped import path_of


def made(text, steps=50):
    return parse(text).make([nn.Parameter(torch.ones(3))], steps)


def test_a_network_is_known_by_its_weights(tmp_path):
    """What else its file tells, how it was trained, how it scored, makes no other contender of it."""
    net = l2l.CoordinatewiseLSTM(4, 1)
    path = tmp_path / "mine.safetensors"
    net.save(path)
    first = parse(str(path)).identity
    attach(net, {"score": 1.0})
    net.save(path)
    assert parse(str(path)).identity == first
    with torch.no_grad():
        net.bias_out += 1e-3
    net.save(path)
    assert parse(str(path)).identity != first


@pytest.mark.parametrize("name", ["Adam", "torch.optim.Adam", "torch.optim:Adam", "torch.optim.adam:Adam"])
def test_a_class_of_torch_with_options(name):
    optimizer = made(f"{name}:lr=3e-3,betas=(0.8, 0.99),amsgrad=True")
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert group["lr"] == 3e-3 and group["betas"] == (0.8, 0.99) and group["amsgrad"] is True
    assert made(name).param_groups[0]["lr"] == 1e-3


def test_the_schedule_is_the_suites():
    found = parse("SGD:lr=0.1,schedule=cosine")
    assert found.schedule == "cosine" and found.name == "SGD:lr=0.1,schedule=cosine"
    assert parse("SGD:schedule='linear',lr=0.1").schedule == "linear" and parse("SGD").schedule == "constant"


def test_a_pretrained_optimizer_is_told_the_length():
    optimizer = made("quadratic", 77)
    assert isinstance(optimizer, l2l.LearnedOptimizer) and optimizer.param_groups[0]["total_steps"] == 77
    assert made("quadratic:lr=0.5").param_groups[0]["lr"] == 0.5


def test_a_file_is_known_by_its_contents(tmp_path):
    path = tmp_path / "mine.safetensors"
    shutil.copy(path_of("quadratic"), path)
    one = parse(str(path))
    assert one.name == "mine.safetensors" and isinstance(made(str(path)), l2l.LearnedOptimizer)
    assert made(f"{path}:lr=0.5").param_groups[0]["lr"] == 0.5
    shutil.copy(path_of("quadratic-gaussian"), path)
    assert parse(str(path)).identity != one.identity


def test_a_class_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "their_optimizers.py").write_text("from torch.optim import SGD\n\nclass Mine(SGD):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(made("their_optimizers:Mine:lr=0.25")).__name__ == "Mine"
    assert made("their_optimizers.Mine:lr=0.25").param_groups[0]["lr"] == 0.25
    before = parse("their_optimizers:Mine").identity
    (tmp_path / "their_optimizers.py").write_text("from torch.optim import Adam as Mine\n")
    assert parse("their_optimizers:Mine").identity != before  # its runs are not those of the code before


@pytest.mark.parametrize(
    "text, error, words",
    [
        ("Adan", ValueError, "did you mean 'Adam'.*mnist-mlp"),
        ("mnist_mlp", ValueError, "did you mean 'mnist-mlp'"),
        ("", ValueError, "expected NAME"),
        ("Adam:lr=", ValueError, "cannot be read"),
        ("Adam:lr=open('x')", ValueError, "cannot be read"),
        ("Adam:lr=1,**x", ValueError, "name of an optimizer|cannot be read"),
        ("Adam:learning=1", TypeError, "learning"),
        ("Adam:lr=-1", TypeError, "learning rate"),
        ("Adam:schedule=steps", ValueError, "schedule must be one of"),
        ("nothing.safetensors", FileNotFoundError, "no such file"),
        ("no_such_module:Adam", ValueError, "no_such_module"),
        ("fashion-conv", ValueError, "a network for each of conv, fc"),
        ("LBFGS", TypeError, "closure"),
        ("torch.zeros", TypeError, "torch.zeros"),
        ("rm -rf", ValueError, "name of an optimizer"),
        (3, TypeError, "expected a text"),
    ],
)
def test_what_is_not_understood_is_said(text, error, words):
    with pytest.raises(error, match=words):
        parse(text)


def test_contenders_in_python():
    with pytest.raises(TypeError, match="make"):
        Contender("x", 3)
    with pytest.raises(ValueError, match="schedule"):
        Contender("x", torch.optim.Adam, "steps")
    with pytest.raises(TypeError, match="name"):
        Contender("", torch.optim.Adam)
