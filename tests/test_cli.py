"""The command line, from train to compare; a user's mistake gets a sentence and exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import l2l_fast as l2l
from l2l_fast import cli, demo, recipes
from l2l_fast.problems import MNIST, ModuleProblem, Quadratic

SMALL = ["--problem", "quadratic", "--option", "dim=3", "--option", "batch=4"]
SHORT = ["--horizon", "6", "--episodes", "3"]
TRAIN = ["--horizon", "6", "--unroll", "3", "--hidden-size", "5", "--validate-every", "2", "--validation-episodes", "2"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "quadratic"
    assert cli.main(["train", *SMALL, *TRAIN, "--episodes", "4", "--out", str(out), "--quiet"]) == 0
    return out


def test_train_leaves_optimizer_checkpoint_and_log(run_folder):
    net = l2l.load(run_folder / "optimizer.safetensors")
    assert net.hidden_size == 5 and net.preprocess == "identity"
    assert torch.equal(net.phi(), l2l.meta.load_best(run_folder / "checkpoint.safetensors").phi())
    records = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records] == ["settings", *(["episode", "episode", "validation"] * 2)]
    assert records[0]["problem"]["dim"] == 3


def test_train_resumes(run_folder, tmp_path, capsys):
    arguments = ["train", *SMALL, *TRAIN, "--quiet", "--seed", "3", "--decay-to", "1"]
    part, whole = str(tmp_path / "part"), str(tmp_path / "whole")
    assert cli.main([*arguments, "--episodes", "4", "--out", whole]) == 0
    trainer = recipes.RECIPES["quadratic"].make_trainer(
        recipes.RECIPES["quadratic"].make_network(3, hidden_size=5), Quadratic(dim=3, batch=4), 4,
        seed=3, horizon=6, unroll=3, validate_every=2, validation_episodes=2, decay_to=1.0,
        log=tmp_path / "part" / "log.jsonl",
    )  # fmt: skip
    trainer.fit(2, progress=False, checkpoint=tmp_path / "part" / "checkpoint.safetensors")
    assert cli.main([*arguments, "--episodes", "4", "--out", part, "--resume"]) == 0
    one, other = (l2l.load(Path(folder) / "optimizer.safetensors").phi() for folder in (part, whole))
    assert torch.equal(one, other)
    capsys.readouterr()
    assert cli.main([*arguments, "--episodes", "4", "--out", part, "--resume", "--lr", "0.5"]) == 2
    assert "meta_optimizer.lr" in capsys.readouterr().err


def test_evaluate_takes_optimizers_and_checkpoints(run_folder, tmp_path, capsys):
    results = []
    for name in ("optimizer", "checkpoint"):
        path = tmp_path / f"{name}.json"
        assert cli.main(["evaluate", "--optimizer", str(run_folder / f"{name}.safetensors"), *SMALL, *SHORT,
                         "--json", str(path), "--threads", "1"]) == 0  # fmt: skip
        results.append(json.loads(path.read_text()))
    assert results[0] == results[1]
    assert results[0]["horizon"] == 6 and results[0]["test_tasks"] == 3
    assert "learned LSTM" in capsys.readouterr().out


def test_compare_prints_draws_and_writes(run_folder, tmp_path, capsys):
    plot, record = tmp_path / "curves.png", tmp_path / "curves.json"
    arguments = ["compare", "--optimizer", str(run_folder / "optimizer.safetensors"), *SMALL, *SHORT]
    arguments += ["--tuning-episodes", "1", "--plot", str(plot), "--json", str(record)]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    for name in ("learned LSTM", "SGD", "NAG", "RMSprop", "Adam", "best baseline"):
        assert name in out
    assert "tuning adam" in err
    assert set(json.loads(record.read_text())["results"]) == {"learned", "sgd", "nag", "rmsprop", "adam"}
    if "learning curves" in out:
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_printed_next_command_works(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *SMALL, *TRAIN, "--episodes", "1", "--out", "my run", "--quiet"]) == 0
    import shlex

    command = capsys.readouterr().out.splitlines()[-1].split(":", 1)[1]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "l2l_fast"]
    assert cli.main([*words[3:], *SHORT, "--tuning-episodes", "1", "--quiet"]) == 0


def test_info(capsys, monkeypatch):
    monkeypatch.delenv("L2L_FAST_DATA", raising=False)
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["instruction set"] == l2l._C.isa() and facts["torch"] == torch.__version__
    assert facts["mnist-10k-embedded"].startswith("10,000 images")
    assert facts["mnist-60k"].startswith("not found") and "L2L_FAST_DATA" in facts["mnist-60k"]
    assert cli.main(["info"]) == 0
    assert "instruction set" in capsys.readouterr().out


def test_bench_is_handed_over(monkeypatch, capsys):
    called = []
    module = type(sys)("l2l_fast.benchmark")
    module.main = lambda argv: called.append(argv)
    monkeypatch.setitem(sys.modules, "l2l_fast.benchmark", module)
    assert cli.main(["bench", "--rounds", "3"]) == 0
    assert called == [["--rounds", "3"]]
    monkeypatch.setitem(sys.modules, "l2l_fast.benchmark", None)
    assert cli.main(["bench"]) == 2
    assert "no l2l_fast.benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice"),
        (["info", "--threads", "0"], "whole number"),
        (["train", "--problem", "quadratic"], "--out"),
        (["train", "--problem", "chess", "--out", "x"], "chess"),
        (["train", *SMALL, "--out", "{tmp}", "--option", "sides=3"], "sides"),
        (["train", *SMALL, "--out", "{tmp}", "--option", "dim"], "KEY=VALUE"),
        (["train", *SMALL, "--out", "{tmp}", "--option", "dim=-1"], "dim must be a positive integer, got -1"),
        (["train", *SMALL, "--out", "{tmp}", "--data", "x"], "data"),
        (["train", *SMALL, "--out", "{tmp}/file"], "file"),
        (["train", *SMALL, "--out", "{tmp}", "--lr", "-1"], "lr"),
        (["train", *SMALL, "--out", "{tmp}", "--lr", "much"], "--lr"),
        (["train", *SMALL, "--out", "{tmp}", "--horizon", "5", "--unroll", "6"], "unroll"),
        (["train", *SMALL, "--out", "{tmp}", "--hidden-size", "1000"], "hidden_size: expected 4..64"),
        (["train", *SMALL, "--out", "{tmp}", "--resume"], "no checkpoint"),
        (["train", *SMALL, "--out", "{run}"], "--resume continues it"),
        (["train", "--problem", "mnist", "--data", "{tmp}/none", "--out", "{tmp}"], "train-images-idx3-ubyte"),
        (["evaluate", "--optimizer", "{tmp}/none", *SMALL], "no such file"),
        (["evaluate", "--optimizer", "{tmp}/file", *SMALL], "not a readable safetensors file"),
        (["evaluate", "--optimizer", "{tmp}", *SMALL], "--optimizer"),
        (["evaluate", "--optimizer", "{run}/optimizer.safetensors", *SMALL, "--episodes", "0"], "whole number"),
        (["evaluate", "--optimizer", "{run}/optimizer.safetensors", *SMALL, *SHORT, "--json", "{tmp}"], "--json"),
        (["compare", "--optimizer", "{run}/log.jsonl", *SMALL], "not a readable safetensors file"),
        (["demo", "--quick", "--data", "{tmp}/none"], "train-images-idx3-ubyte"),
    ],
)
def test_mistakes_get_a_sentence(arguments, message, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("nothing of use")
    arguments = [text.format(tmp=tmp_path, run=run_folder) for text in arguments]
    try:
        status = cli.main(arguments)
    except SystemExit as error:  # argparse
        status = error.code
    err = capsys.readouterr().err
    assert status == 2
    assert message in err and "Traceback" not in err and "error:" in err


def test_as_a_module():
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-m", "l2l_fast", "--help"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0
    for name in ("train", "evaluate", "compare", "bench", "info", "demo"):
        assert name in result.stdout
    result = subprocess.run([sys.executable, "-m", "l2l_fast", "evaluate"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_recipes():
    net = recipes.get(Quadratic()).make_network(3)
    state = torch.get_rng_state()
    assert torch.equal(net.phi(), recipes.get(Quadratic()).make_network(3).phi())
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(net.phi(), recipes.get(Quadratic()).make_network(4).phi())
    mine = ModuleProblem(lambda generator: torch.nn.Linear(1, 1), lambda module, generator: module.weight.sum())
    assert recipes.get(mine) is recipes.get(MNIST())
    trainer = recipes.get(mine).make_trainer(net, mine, 7, lr=0.5)
    assert (trainer.lr, trainer.decay_episodes) == (0.5, 7)


def test_demo_in_small(tmp_path, capsys):
    halves = demo.tasks(quick=True)
    assert [half.problem.name for half in halves] == ["quadratic", "mnist"]
    small = [
        demo.DemoTask("small quadratics", Quadratic(dim=3, batch=4), 2, 2, 1, 5),
        demo.DemoTask("small perceptron", MNIST(hidden=(3,), batch_size=8), 1, 2, 1, 3),
    ]
    assert demo.run(small, tmp_path, progress=False) in (0, 1)
    out = capsys.readouterr().out
    assert out.count("learned LSTM") == 2 and "mnist-10k-embedded" in out
    assert "-m l2l_fast compare --optimizer" in out
    record = json.loads((tmp_path / "results.json").read_text())
    assert [item["problem"]["name"] for item in record["comparisons"]] == ["quadratic", "mnist"]
    for name in ("quadratic", "mnist"):
        assert l2l.load(tmp_path / f"{name}.safetensors").hidden_size == 20
    assert demo.run(small[:1], tmp_path, progress=False) in (0, 1)  # a second time over the first
