"""The command line, from train to compare; a user's mistake gets a sentence and exit status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.cli import command_line as cli
from l2l_fast.cli import demo
from l2l_fast.cli import evaluate as evaluate_command
from l2l_fast.evaluation import benchmark
from l2l_fast.meta import ProtocolWarning, recipes, record_of
from l2l_fast.problems import MNIST, ModuleProblem, Quadratic
from tests.helpers import recorded_samples
from tests.test_comparison import made_up

SMALL = ["--problem", "quadratic", "--option", "dim=3", "--option", "batch=4"]
SHORT = ["--horizon", "6", "--episodes", "3"]
EVALUATE = ["evaluate", "--optimizer", "quadratic", "--problem", "quadratic"]
IMPORT = ["--preprocess", "log_sign", "--output-scale", "0.5", "--out", "x.safetensors"]
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
    for name in ("learned LSTM", "SGD", "heavy ball", "NAG", "RMSprop", "Adam", "AdamW", "best baseline", "tuned: "):
        assert name in out
    assert "tuning adam" in err
    assert set(json.loads(record.read_text())["results"]) == {"learned", *l2l.baselines.NAMES}
    pytest.importorskip("matplotlib")
    assert f"learning curves: {plot}" in out and plot.read_bytes().startswith(b"\x89PNG")


def test_compare_with_some_baselines_goes_on_from_its_cache(run_folder, tmp_path, capsys):
    arguments = ["compare", "--optimizer", str(run_folder / "optimizer.safetensors"), *SMALL, *SHORT]
    arguments += ["--tuning-episodes", "2", "--plot", str(tmp_path / "x.png"), "--json", str(tmp_path / "x.json")]
    arguments += ["--cache", str(tmp_path / "kept"), "--baselines", "sgd", "nag"]
    assert cli.main(arguments) == 0
    first, err = capsys.readouterr()
    assert "tuning nag" in err and "RMSprop" not in first
    assert list(json.loads((tmp_path / "x.json").read_text())["results"]) == ["learned", "sgd", "nag"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["nag.jsonl", "sgd.jsonl"]
    assert cli.main(arguments) == 0
    second, err = capsys.readouterr()
    assert second == first and "tuning nag" not in err


def test_the_printed_next_command_works(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *SMALL, *TRAIN, "--episodes", "1", "--out", "my run", "--quiet"]) == 0
    import shlex

    command = capsys.readouterr().out.splitlines()[-1].split(":", 1)[1]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "l2l_fast"]
    assert cli.main([*words[3:], *SHORT, "--tuning-episodes", "1", "--quiet"]) == 0


def words_of(command: str) -> list[str]:
    import shlex

    return shlex.split(command)


def test_printed_commands_are_quoted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = [*SMALL, *TRAIN, "--episodes", "1", "--quiet"]
    for out in ("my run", "-dash", "$HOME;ls"):
        assert cli.main(["train", *short, f"--out={out}"]) == 0
        words = words_of(capsys.readouterr().out.splitlines()[-1].split(":", 1)[1])
        parsed = cli._parser().parse_args(words[3:])
        assert parsed.optimizer == f"{out}/optimizer.safetensors" and dict(parsed.option) == {"dim": 3, "batch": 4}
        half = demo.DemoTask("small", Quadratic(), 1, 1, 1)
        words = words_of(demo._next_command(half, Path(out)))
        parsed = cli._parser().parse_args(words[3:])
        assert (Path(words[0]).resolve(), words[1:3]) == (Path(sys.executable).resolve(), ["-m", "l2l_fast"])
        assert parsed.optimizer == f"{out}/quadratic.safetensors" and parsed.plot == f"{out}/wider.png"
        assert parsed.option == [("hidden", [40])]
        with monkeypatch.context() as patch:
            patch.setattr(l2l.MetaTrainer, "_one_episode", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            assert cli.main(["train", *short, f"--out={out}2"]) == 130
        parsed = cli._parser().parse_args(words_of(capsys.readouterr().err.splitlines()[-1])[3:])
        assert parsed.out == f"{out}2" and parsed.resume


def test_a_folder_with_an_optimizer_and_no_checkpoint_says_how_to_go_on(run_folder, tmp_path, capsys):
    optimizer = tmp_path / "optimizer.safetensors"
    optimizer.write_bytes((run_folder / "optimizer.safetensors").read_bytes())
    before = contents(tmp_path)
    arguments = ["train", *SMALL, *TRAIN, "--episodes", "1", "--quiet", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert "whose checkpoint is gone" in err and "move the file away" in err and "--resume" not in err
    assert cli.main([*arguments, "--resume"]) == 2
    err = capsys.readouterr().err
    assert "only optimizer.safetensors" in err and "move it away" in err
    assert contents(tmp_path) == before
    optimizer.rename(tmp_path / "old.safetensors")
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "optimizer.safetensors", "log.jsonl"])
def test_what_cannot_be_written_at_the_end_is_said_at_the_beginning(name, run_folder, tmp_path, capsys):
    arguments = ["train", *SMALL, *TRAIN, "--episodes", "9", "--quiet", "--out", str(tmp_path)]
    (tmp_path / name).mkdir()
    if name != "checkpoint.safetensors":
        (tmp_path / "checkpoint.safetensors").write_bytes((run_folder / "checkpoint.safetensors").read_bytes())
        arguments.append("--resume")
    before = contents(tmp_path)
    assert cli.main(arguments) == 2
    assert "folder" in capsys.readouterr().err and contents(tmp_path) == before


@pytest.mark.parametrize("content", ['{"mine": 1}\n', "notes\n", "[1]\n", "\x00\xff\n"])
def test_logs_that_are_somebodys_are_never_lost(content, run_folder, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    short = [*SMALL, *TRAIN, "--episodes", "1", "--quiet", "--out", str(tmp_path)]
    assert cli.main(["train", *short]) == 2
    assert "is not the log of a run" in capsys.readouterr().err
    (tmp_path / "checkpoint.safetensors").write_bytes((run_folder / "checkpoint.safetensors").read_bytes())
    assert cli.main(["train", "--resume", "--out", str(tmp_path), "--episodes", "9"]) == 2
    assert "is not the log of a run" in capsys.readouterr().err
    half = demo.DemoTask("small", Quadratic(dim=3, batch=4), 1, 1, 1, 3)
    (tmp_path / "quadratic.jsonl").write_text(content)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is not the log of a run"):
        demo.run([replace(half, problem=MNIST(hidden=(2,))), half], tmp_path, progress=False)
    assert contents(tmp_path) == before and log.read_text() == content


def test_episodes_of_a_run_without_a_checkpoint_are_not_thrown_away(run_folder, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_bytes((run_folder / "log.jsonl").read_bytes())
    before = contents(tmp_path)
    assert cli.main(["train", *SMALL, *TRAIN, "--episodes", "1", "--quiet", "--out", str(tmp_path)]) == 2
    assert "holds 4 episodes of a run whose checkpoint is gone" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_log_torn_in_its_first_line_is_the_packages_own(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "sett')
    assert cli.main(["train", *SMALL, *TRAIN, "--episodes", "1", "--quiet", "--out", str(tmp_path)]) == 0


def test_info(capsys, monkeypatch):
    monkeypatch.delenv("L2L_FAST_DATA", raising=False)
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["instruction set"] == l2l._C.isa() and facts["torch"] == torch.__version__
    assert facts["mnist-10k-embedded"].startswith("10,000 images")
    assert facts["mnist-60k"].startswith("not found") and "L2L_FAST_DATA" in facts["mnist-60k"]
    assert cli.main(["info"]) == 0
    assert "instruction set" in capsys.readouterr().out


def test_bench_is_handed_over(monkeypatch):
    called = []
    monkeypatch.setattr(benchmark, "main", lambda argv: called.append(argv))
    assert cli.main(["bench", "--rounds", "3"]) == 0
    assert called == [["--rounds", "3"]]


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
        (["train", *SMALL, "--out", "{tmp}/file"], "--out: expected a folder, but this is a file: '{tmp}/file'"),
        (["train", *SMALL, "--out", "file/x"], "--out: the folder cannot be made: '{tmp}/file' is not a folder"),
        (["train", *SMALL, "--out", "dangling"], "--out: expected a folder, but this is a link to nothing"),
        (["train", *SMALL, "--out", ""], "--out: expected the name of a folder"),
        (["train", "--resume", "--out", ""], "--out: expected the name of a folder"),
        (["train", "--resume", "--out", "file"], "--out: expected a folder, but this is a file"),
        (["train", *SMALL, "--out", "foreign"], "log.jsonl' is not the log of a run"),
        (["train", *SMALL, "--out", "new", "--seed", "9" * 30], "seed: expected -9223372036854775808..184467440737095"),
        (["train", *SMALL, "--out", "new", "--horizon", "9" * 30], "horizon: expected 1..10000000, got 999"),
        ([*EVALUATE, "--horizon", "9" * 30], "horizon must be at most 10,000,000 steps, got 999,"),
        (["decisions", "quadratic", *SMALL, "--horizon", "9" * 30], "horizon must be at most 10,000,000 steps"),
        (["info", "--threads", "1000000"], "--threads: expected 1..1024, got 1000000"),
        (["demo", "--quick", "--out", "dangling"], "--out: expected a folder, but this is a link to nothing"),
        (["demo", "--quick", "--out", "foreign"], "mnist.jsonl' is not the log of a run"),
        (["train", *SMALL, "--out", "{tmp}", "--lr", "-1"], "lr"),
        (["train", *SMALL, "--out", "{tmp}", "--lr", "much"], "--lr"),
        (["train", *SMALL, "--out", "{tmp}", "--horizon", "5", "--unroll", "6"], "unroll"),
        (["train", *SMALL, "--out", "{tmp}", "--hidden-size", "1000"], "hidden_size: expected 4..64"),
        (["train", *SMALL, "--out", "{tmp}", "--hidden-size", "0"], "num_layers=2, got 0"),
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
        (["demo", "--quick", "--out", "{tmp}/file"], "--out: expected a folder, but this is a file"),
        (["demo", "--quick", "--out", ""], "--out: expected the name of a folder"),
        (["info", "--threads", "9" * 30], "--threads"),
        (["fly"], "'compare', 'experiment', 'evidence', 'pretrained', 'decisions', 'import'"),
        (["evaluate", "--optimizer", "quadratic", "--problem", "quadratics"], "'conv', 'mnist', 'neural-art'"),
        ([*EVALUATE, "--option", "foo=3"], "has no option 'foo'; expected some of dim, batch, family, init_std"),
        ([*EVALUATE, "--option", "name=mnist"], "has no option 'name'; expected some of dim"),
        ([*EVALUATE, "--data", "x"], "has no option 'data'; expected some of dim"),
        ([*EVALUATE, "--option", 'dim="3"'], "dim must be a positive integer, got '3'"),
        ([*EVALUATE, "--option", "dim=[3]"], "dim must be a positive integer, got [3]"),
        ([*EVALUATE, "--option", "dim=true"], "dim must be a positive integer, got True"),
        ([*EVALUATE, "--option", "dim=1e400"], "dim must be a positive integer, got inf"),
        ([*EVALUATE, "--option", "init_std=NaN"], "init_std must be finite"),
        ([*EVALUATE, "--option", "init_std={}"], "init_std must be a number"),
        ([*EVALUATE, "--option", "family=[1]"], "family must be one of ('uniform', 'gaussian', 'ill_conditioned')"),
        ([*EVALUATE, "--option", "dim=9999999", "--option", "batch=9999999"], "--problem|error"),
        ([*EVALUATE[:4], "mnist", "--option", "hidden=3"], "hidden must be a sequence of layer widths, got 3"),
        ([*EVALUATE[:4], "mnist", "--option", "activation={}"], "activation must be one of ('sigmoid', 'relu'"),
        ([*EVALUATE[:4], "conv", "--option", "data=svhn"], "data must be one of ('fashion-mnist', 'cifar-10'"),
        ([*EVALUATE[:4], "conv", "--data", "{tmp}/none"], "none"),
        ([*EVALUATE, "--device", "tpu"], "expected cpu, cuda or cuda:N, got 'tpu'"),
        ([*EVALUATE, "--device", "meta"], "expected cpu, cuda or cuda:N, got 'meta'"),
        ([*EVALUATE, "--json", "missing/x.json"], "--json: there is no folder 'missing'"),
        ([*EVALUATE, "--json", "~/x.json"], "~ is not expanded"),
        ([*EVALUATE, "--json", ""], "--json: expected the name of a file"),
        (["evaluate", "--optimizer", "quadratc", *SMALL], "did you mean 'quadratic'?"),
        (["evaluate", "--optimizer", "nothing", *SMALL], "are fashion-conv, general, general-matrix, general-small"),
        (["evaluate", "--optimizer", "", *SMALL], "no such file"),
        (["evaluate", "--optimizer", "fashion-conv", *SMALL], "the networks are for ['conv', 'fc']"),
        (["compare", "--optimizer", "fashion-conv", *SMALL], "the networks are for ['conv', 'fc']"),
        (["compare", "--optimizer", "quadratic", *SMALL, "--plot", "x.bmp2"], "--plot: expected a file that ends in"),
        (["compare", "--optimizer", "quadratic", *SMALL, "--plot", "file/x.png"], "--plot: 'file' is not a folder"),
        (["compare", "--optimizer", "quadratic", *SMALL, "--plot", "{tmp}"], "--plot: expected a file"),
        (["decisions", "quadratc", *SMALL], "did you mean 'quadratic'?"),
        (["decisions", "fashion-conv", *SMALL], "['conv', 'fc']"),
        (["decisions", "quadratic", *SMALL, "--coordinates", "13"], "coordinates: expected at most 12, which is all"),
        (["decisions", "quadratic", *SMALL, "--coordinates", "51"], "--coordinates: expected 1..50"),
        (["decisions", "quadratic", *SMALL, "--adam-lr", "inf"], "learning_rates['adam']"),
        (["decisions", "quadratic", *SMALL, "--sgd-lr", "1", "--adam-lr", "nan"], "learning_rates['adam']"),
        (["decisions", "quadratic", *SMALL, "--sgd-lr", "-1", "--adam-lr", "1"], "learning_rates['sgd']"),
        (["decisions", "quadratic", *SMALL, "--plot", "x.abc"], "--plot: expected a file that ends in"),
        (["decisions", "quadratic", *SMALL, "--coordinates", "0"], "whole number"),
        (["experiment", "mnists"], "expected one of ('fashion-conv', 'mnist', 'mnist-"),
        (["evidence", "mnists"], "expected one of ('fashion-conv', 'mnist', 'mnist-"),
        (["evidence", "none.json"], "none.json"),
        (["evidence"], "required: NAME"),
        (["evidence", "quadratic-uniform", "--settings", "none"], "setting: expected one of ['test'], got 'none'"),
        (["evidence", "quadratic-uniform", "--ledger", "file"], "ledger: line 1 of 'file' is no entry of evidence"),
        (["evidence", "quadratic-uniform", "--ledger", "{tmp}"], "ledger: expected a file"),
        (["evidence", "quadratic-uniform", "--ledger", "x", "--out", "file"], "expected a folder, but this is a file"),
        (["evidence", "quadratic-uniform", "--ledger", "x", "--out", ""], "out: expected the name of a folder"),
        (["compare", "--optimizer", "quadratic", *SMALL, "--baselines", "lbfgs"], "choose from"),
        (["compare", "--optimizer", "quadratic", *SMALL, "--baselines"], "expected at least one argument"),
        (["experiment", "none.json"], "none.json"),
        (["experiment", "bad.json"], "not an experiment: experiment: expected an object with keys, got []"),
        (["experiment", "empty.json"], "keys missing: ['name', 'about', 'source', 'pretrained', 'problem', 'networks'"),
        (["experiment", "quadratic-uniform", "--optimizer", "fashion-conv", "--out", "new"], "for ['conv', 'fc']"),
        (["experiment", "quadratic-uniform", "--out", ""], "out: expected the name of a folder"),
        (["experiment", "quadratic-uniform", "--out", "dangling"], "out: expected a folder, but this is a link to no"),
        (["experiment", "quadratic-uniform", "--optimizer", "quadratc"], "did you mean 'quadratic'?"),
        (["experiment", "quadratic-uniform", "--out", "file"], "expected a folder, but this is a file"),
        (["experiment", "mnist", "--data", "none"], "MNIST is not complete"),
        (["experiment", "mnist", "--data", "none", "--evaluate-only", "--out", "new/out"], "MNIST is not complete"),
        (["experiment", "quadratic-uniform", "--data", "x", "--out", "new"], "has no option 'data'"),
        (["import", "none.pt", *IMPORT], "no such file"),
        (["import", "file", *IMPORT], "file"),
        (["import", "empty.pt", *IMPORT], "'empty.pt': the file is empty"),
        (["import", "empty.l2l", *IMPORT], "'empty.l2l': the file is empty"),
        (["evaluate", "--optimizer", "empty.pt", *SMALL], "not a readable safetensors file: it is empty"),
        (["import", "nested.pt", *IMPORT], "key: expected one of ['ema.net', 'model']"),
        (["import", "nested.pt", *IMPORT, "--key", "modle"], "key: expected one of ['ema.net', 'model']"),
        (["import", "list.pt", *IMPORT], "expected a state dict, got list; it holds no state dict"),
        (["import", "nested.pt", *IMPORT[:-1], "missing/x"], "--out: there is no folder 'missing'"),
        (["import", "x.l2l", *IMPORT, "--key", "model"], "--key: expected a file of torch.save"),
        (["import", "nested.pt", *IMPORT, "--key", "model", "--p", "nan"], "p: expected a number in (0, 70]"),
    ],
)
def test_mistakes_get_a_sentence(arguments, message, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("nothing of use")
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "empty.json").write_text("{}")
    for name in ("empty.pt", "empty.l2l"):
        (tmp_path / name).touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "foreign").mkdir()
    for name in ("log", "mnist"):
        (tmp_path / "foreign" / f"{name}.jsonl").write_text('{"mine": 1}\n')
    cells = nn.ModuleDict({"cell": nn.LSTMCell(2, 8), "out": nn.Linear(8, 1)}).state_dict()
    torch.save({"model": cells, "ema": {"net": cells, "decay": 0.9}, "epoch": 3}, tmp_path / "nested.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    before = contents(tmp_path)
    # Whatever is wrong is said before anything is computed.
    for module in (l2l.meta.trainer, l2l.comparison, l2l.experiments.running, evaluate_command):
        if "evaluate" in vars(module):
            monkeypatch.setattr(module, "evaluate", _checking_only(module.evaluate))
    monkeypatch.setattr(l2l.baselines, "run", _checking_only(l2l.baselines.run))
    message = message.replace("{tmp}", str(tmp_path))
    arguments = [text.replace("{tmp}", str(tmp_path)).replace("{run}", str(run_folder)) for text in arguments]
    try:
        status = cli.main(arguments)
    except SystemExit as error:  # argparse
        status = error.code
    err = capsys.readouterr().err
    assert status == 2
    assert any(each in err for each in message.split("|")) and "Traceback" not in err and "error:" in err
    # The message is one line; only argparse puts the usage above its own.
    assert err.count("\n") == 1 or err.startswith("usage:")
    assert contents(tmp_path) == before  # no empty folder, no half-written file


def _checking_only(function):
    """The function, which must fail."""

    def failing(*arguments, **options):
        function(*arguments, **options)
        pytest.fail("something was computed")

    return failing


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_nested_state_dict_is_imported_by_its_key(tmp_path):
    module = nn.ModuleDict({"cell": nn.LSTMCell(2, 8), "out": nn.Linear(8, 1)})
    torch.save({"ema": {"net": module.state_dict()}, "epoch": 3}, tmp_path / "x.pt")
    arguments = ["import", str(tmp_path / "x.pt"), *IMPORT[:-1], str(tmp_path / "x.safetensors"), "--key", "ema.net"]
    assert cli.main(arguments) == 0
    assert torch.equal(l2l.load(tmp_path / "x.safetensors").weight_out, module["out"].weight)


COMMANDS = {
    "train": ["train", *SMALL, *TRAIN, "--episodes", "2", "--out", "x", "--quiet"],
    "evaluate": ["evaluate", "--optimizer", "quadratic", *SMALL, *SHORT],
    "compare": [
        "compare",
        "--optimizer",
        "quadratic",
        *SMALL,
        *SHORT,
        "--tuning-episodes",
        "2",
        "--quiet",
        "--baselines",
        "sgd",
        "nag",
    ],
    "decisions": ["decisions", "quadratic", *SMALL, "--horizon", "3", "--seed", "7"],
    "experiment": ["experiment", "small.json", "--quiet", "--out", "x"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_device_reaches_every_task(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from tests.test_experiments import small

    small(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("l2l_fast.cli.console.device", lambda text: torch.device(text))
    calls = recorded_samples(monkeypatch)
    parser = cli._parser()
    assert parser.parse_args(COMMANDS[name]).device == torch.device("cpu")
    assert cli.main([*COMMANDS[name], "--device", "cpu:0"]) == 0
    # Only the number of problems in a task is asked without a device.
    assert calls and {call[2] for call in calls if call[:2] != (0, "test")} <= {"cpu"}
    assert {call[2] for call in calls if call[:2] == (0, "test")} <= {"cpu", "None"}


@pytest.mark.parametrize("name", COMMANDS)
def test_without_that_device_it_is_said(name, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for device in ("cuda", "cuda:3"):
        with pytest.raises(SystemExit):
            cli.main([*COMMANDS[name], "--device", device])
        assert "torch sees no CUDA device" in capsys.readouterr().err


def test_splits_and_seeds_of_the_commands(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    calls = recorded_samples(monkeypatch)
    for name, test, validation in (("evaluate", {0, 1, 2}, set()), ("compare", {0, 1, 2}, {0, 1}),
                                   ("decisions", {7}, {0, 1, 2, 3, 4})):  # fmt: skip
        calls.clear()
        assert cli.main(COMMANDS[name]) == 0
        assert {seed for seed, split, _ in calls if split == "test"} == test
        assert {seed for seed, split, _ in calls if split == "validation"} == validation
        assert {split for _, split, _ in calls} <= {"test", "validation"}


@pytest.mark.parametrize("streams", ["1>&0", "1>&0 2>&0", ">&-", "2>&-"])
@pytest.mark.parametrize("command", ["info --json", "pretrained", "train", "--help"])
def test_a_reader_that_goes_away_stops_nothing(command, streams, tmp_path):
    """stdin is a pipe without a reader, which the shell puts where the output should go."""
    root = Path(__file__).parent.parent
    if command == "train":
        command = " ".join(["train", *SMALL, *TRAIN, "--episodes", "2", "--out", str(tmp_path / "x")])
    reader, writer = os.pipe()
    os.close(reader)
    # -u is not needed: what is buffered must not fail at the end either.
    line = f"{sys.executable} -m l2l_fast {command} {streams}; echo $? > {tmp_path}/status"
    result = subprocess.run(["sh", "-c", line], cwd=root, stdin=writer, capture_output=True, text=True)
    os.close(writer)
    assert (tmp_path / "status").read_text() == "0\n", result.stderr
    assert "Traceback" not in result.stderr and "Broken" not in result.stderr
    if command.startswith("train"):
        assert (tmp_path / "x" / "optimizer.safetensors").is_file()


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
        demo.DemoTask("small quadratics", Quadratic(dim=3, batch=4), 2, 2, 1, 5, claims=False),
        demo.DemoTask("small perceptron", MNIST(hidden=(3,), batch_size=8), 1, 2, 1, 3, claims=False),
    ]
    assert demo.run(small, tmp_path, progress=False, general=("softmax",)) == 0
    out = capsys.readouterr().out
    assert "'general' dropped in on networks" in out and "| softmax |" in out
    assert "not shown: that the learned optimizer beats the baselines on quadratic and mnist" in out
    assert "NOT reached" not in out
    assert out.count("learned LSTM") == 2 and "mnist-10k-embedded" in out
    assert "-m l2l_fast compare --optimizer" in out
    record = json.loads((tmp_path / "results.json").read_text())
    assert [item["problem"]["name"] for item in record["comparisons"]] == ["quadratic", "mnist"]
    assert list(record["general"]["networks"]) == ["softmax"] and record["general"]["diverged"] == {}
    for name in ("quadratic", "mnist"):
        net = l2l.load(tmp_path / f"{name}.safetensors")
        assert net.hidden_size == 20 and record_of(net)["problem"]["name"] == name
    with pytest.warns(ProtocolWarning, match="horizon: trained for 100 steps"):
        l2l.meta.evaluate(net, MNIST(hidden=(3,), batch_size=8), [0], 101)
    # A second time over the first; two episodes do not reach what a demo that claims something must reach.
    assert demo.run([replace(small[0], claims=True)], tmp_path, progress=False) == 1
    out = capsys.readouterr().out
    assert "NOT reached: the learned optimizer does not end below every baseline on quadratic" in out


@pytest.mark.parametrize(
    "learned, claims, status", [(0.05, True, 0), (0.1, True, 1), (0.2, True, 1), (0.05, False, 0), (0.2, False, 0)]
)
def test_the_status_of_a_demo(learned, claims, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_compare", lambda *_: made_up({"learned": learned, "sgd": 0.3, "nag": 0.1}))
    half = demo.DemoTask("small quadratics", Quadratic(dim=3, batch=4), 1, 2, 1, 5, claims)
    assert demo.run([half], tmp_path, progress=False) == status
    out = capsys.readouterr().out
    assert ("NOT reached" in out) == (status == 1) and ("not shown" in out) == (not claims)


def test_a_quick_demo_on_a_healthy_installation(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--quiet", "--out", str(tmp_path / "new" / "out")]) == 0
    names = {"learning_curves.png", "mnist.jsonl", "mnist.safetensors", "quadratic.jsonl", "quadratic.safetensors"}
    assert names | {"results.json"} == {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert "not shown" in capsys.readouterr().out
