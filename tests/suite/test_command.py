"""python -m l2l_fast suite, from tuning to pictures, with few steps."""

from __future__ import annotations

import json

import pytest
import torch

from l2l_fast.cli import command_line as cli
from l2l_fast.evaluation import suite
from l2l_fast.evaluation.suite import evaluating

SMALL = ["--networks", "sinusoid", "quadratic", "--steps", "30", "--seeds", "2"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("suite") / "out"
    assert cli.main(["suite", *SMALL, "--out", str(out), "--tune", "--quiet"]) == 0
    return out


def test_a_contender_is_measured_tabulated_and_drawn(tuned, capsys):
    arguments = ["suite", "quadratic-gaussian", "RMSprop:lr=1e-3", *SMALL, "--out", str(tuned)]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    for words in ("## 30 steps", "ln ratio to tuned Adam", "| sinusoid |", "RMSprop:lr=1e-3", "below Adam 0.001 on"):
        assert words in out
    assert "sinusoid, 30 steps, quadratic-gaussian" in err and "tuning" not in err
    found = json.loads((tuned / "results.json").read_text())
    assert [each["contender"] for each in found] == ["quadratic-gaussian", "RMSprop:lr=1e-3"]
    assert found[0]["networks"]["sinusoid"]["data"] == "none" and len(found[1]["networks"]["quadratic"]["finals"]) == 2
    assert found[0]["missing baselines"] == [] and "tuned Adam" in found[0]["ln ratios"]
    assert (tuned / "results.md").read_text().strip() in out
    pytest.importorskip("matplotlib")
    for name in ("ratios.png", "curves-30.png"):
        assert (tuned / name).read_bytes().startswith(b"\x89PNG") and f"written: {tuned / name}" in out
    # Once more: nothing is run.
    assert cli.main(arguments) == 0
    again, err = capsys.readouterr()
    assert again == out and not err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["suite"], "expected a CONTENDER"),
        (["suite", "Adan"], "did you mean 'Adam'"),
        (["suite", "Adam", "--networks", "vgg"], "networks: expected some of softmax"),
        (["suite", "Adam", "--steps", "3"], "steps: expected an int >= 20, got 3"),
        (["suite", "Adam", "--seeds", "0"], "seeds"),
        (["suite", "Adam", "Adam"], "different ones"),
        (["suite", "Adam", "--steps", "33"], "--tune measures"),
        (["suite", "Adam", "--data", "nowhere"], "MNIST is not complete"),
    ],
)
def test_a_users_mistake(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_in_python(tuned):
    def make(parameters, total_steps):
        assert total_steps == 30
        return torch.optim.Adam(parameters, lr=1e-3)

    options = {"networks": ["sinusoid"], "seeds": 2, "out": tuned}
    found = evaluating.evaluate(suite.Contender("mine", make), 30, **options)
    row = found.rows["sinusoid"]
    # The very run of the baseline Adam at 1e-3, but for the order of additions in its fused kernel.
    assert row.ratios("Adam 0.001") == pytest.approx([0.0, 0.0], abs=1e-3)
    assert suite.text([found]).count("| sinusoid |") == 1
