"""What the command line says and takes: the version, names that were meant, examples, tables, JSON, all of train's
options."""

from __future__ import annotations

import json
import shlex

import pytest

import l2l_fast as l2l
from l2l_fast.cli import command_line as cli
from l2l_fast.cli import train as train_command
from l2l_fast.cli.console import table
from l2l_fast.cli.train_options import ESTIMATOR, NETWORK, PLACES
from l2l_fast.meta import PES, Evolution
from l2l_fast.meta import checkpoint as checkpoints
from l2l_fast.networks import pretrained

SMALL = ["--problem", "quadratic", "--option", "dim=3", "--option", "batch=4"]
TRAIN = ["train", *SMALL, "--horizon", "6", "--unroll", "3", "--validate-every", "0", "--quiet", "--episodes", "2"]


def commands() -> dict[str, object]:
    return cli._parser()._subparsers._group_actions[0].choices


def refused(arguments: list[str], capsys) -> str:
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    return capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"l2l_fast {l2l.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "guess"),
    [
        (["evaluat"], "evaluate"),
        (["evaluate", "--optimizer", "quadratic", "--problem", "quadratics"], "quadratic"),
        (["evaluate", "--optimizer", "quadratic", *SMALL, "--horizn", "3"], "--horizon"),
        (["evaluate", "--optimizer", "quadratic", *SMALL, "--horizn=3"], "--horizon"),
        (["compare", "--optimizer", "quadratic", *SMALL, "--baselines", "adma"], "adam"),
        (["train", *SMALL, "--out", "x", "--estimator", "pse"], "pes"),
        (["pretrained", "genral"], "general"),
        (["evaluate", "--optimizer", "genral", *SMALL], "general"),
        (["evaluate", "--optimizer", "quadratic", *SMALL, "--option", "dmi=3"], "dim"),
        (["evaluate", "--optimizer", "quadratic", *SMALL, "--option", "family=gausian"], "gaussian"),
        (["experiment", "mnsit"], "mnist"),
        (["suite", "general", "--networks", "mlp-rleu"], "mlp-relu"),
    ],
)
def test_what_was_meant(arguments, guess, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"did you mean '{guess}'?" in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_close_to_none_is_not_guessed(capsys):
    assert "did you mean" not in refused(["xyzzy"], capsys)
    assert "usage: python -m l2l_fast info" in refused(["info", "--xyzzy"], capsys)  # of the command, not of all


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_help_ends_with_examples_that_parse(name, capsys):
    lines = commands()[name].format_help().split("example", 1)[1].splitlines()[1:]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:4] == ["python", "-m", "l2l_fast", name]
        if name == "bench":
            from l2l_fast.evaluation.benchmark import command

            command._parser().parse_args(words[4:])
        else:
            try:
                cli._parser().parse(words[3:])
            except SystemExit:
                assert "torch sees no CUDA device" in capsys.readouterr().err


def test_every_command_that_computes_on_tensors_takes_a_device():
    named = {name for name, parser in commands().items() if "--device" in parser.format_help()}
    assert named == {"train", "evaluate", "compare", "experiment", "decisions", "demo"}


def test_a_table_aligns_numbers_on_the_right():
    assert table(("name", "n"), [("a", "1,000"), ("long name", "7")], numbers=(1,)).splitlines() == [
        "name           n",
        "---------  -----",
        "a          1,000",
        "long name      7",
    ]


def test_pretrained_is_a_table(capsys):
    assert cli.main(["pretrained"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2 : 2 + len(pretrained.names())]]
    assert [row[0] for row in rows] == list(pretrained.names()) and max(map(len, lines)) < 150
    (mnist,) = [line for line in lines if line.startswith("mnist-mlp ")]
    record = pretrained.list_pretrained()["mnist-mlp"]
    assert str(record["episodes"]) in mnist and f"{record['score']['base']['step 100']:.3g} at step 100" in mnist
    assert cli.main(["pretrained", "general"]) == 0
    told = capsys.readouterr().out
    assert "suite, 10,000 steps" in told and "mnist-mlp" not in told
    assert cli.main(["pretrained", "general", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["general"]


def test_json_to_stdout_is_all_that_is_there(capsys):
    arguments = ["evaluate", "--optimizer", "quadratic", *SMALL, "--horizon", "3", "--episodes", "2"]
    assert cli.main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["test_tasks"] == 2
    assert cli.main(["experiment", "--list", "--json"]) == 0
    assert "mnist" in json.loads(capsys.readouterr().out)
    assert "--json: is of --list" in refused(["experiment", "mnist", "--json"], capsys)


def test_options_of_the_network_reach_it(tmp_path):
    options = ["--hidden-size", "5", "--num-layers", "1", "--gac-cells", "2", "--preprocess", "log_sign", "--p", "7"]
    assert cli.main([*TRAIN, *options, "--output-scale", "0.5", "--out", str(tmp_path / "a")]) == 0
    net = l2l.load(tmp_path / "a" / "optimizer.safetensors")
    assert (net.hidden_size, net.num_layers, net.gac_cells, net.preprocess) == (5, 1, 2, "log_sign")
    assert (net.p, net.output_scale) == (7.0, 0.5)
    options = ["--memory", "low_rank", "--history", "3", "--read-heads", "2", "--write-heads", "1"]
    options += ["--hidden-size", "4", "--initial", "identity", "--add-read"]
    assert cli.main([*TRAIN, *options, "--out", str(tmp_path / "b")]) == 0
    net = l2l.load(tmp_path / "b" / "optimizer.safetensors")
    assert isinstance(net, l2l.NTMBFGS) and net.add_read and (net.memory, net.initial) == ("low_rank", "identity")
    assert (net.history, net.read_heads, net.write_heads) == (3, 2, 1)


def made(arguments: list[str]) -> l2l.MetaTrainer:
    parsed = cli._parser().parse([*arguments, "--out", "unused"])
    return train_command._new(parsed)[0]


def test_options_of_the_estimator_reach_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = made([*TRAIN, "--estimator", "pes", "--pairs", "3", "--sigma", "0.02", "--betas", "0.5", "0.75"])
    assert isinstance(trainer.estimator, PES) and trainer.betas == (0.5, 0.75)
    assert (trainer.estimator.pairs, trainer.estimator.sigma) == (3, 0.02)
    zoo = ["train", "--problem", "zoo", "--option", "problems=1"]
    estimator = made([*zoo, "--shortest", "50", "--pairs", "2"]).estimator  # of the recipe: evolution
    assert isinstance(estimator, Evolution) and (estimator.shortest, estimator.pairs) == (50, 2)
    assert made([*TRAIN, "--autograd"]).autograd
    assert made([*TRAIN, "--coordinate-fraction", "0.5"]).coordinate_fraction == 0.5


@pytest.mark.parametrize(
    "options", ["--gac-cells 2", "--estimator pes", "--second-derivatives", "--autograd", "--memory low_rank"]
)
def test_a_recipe_samples_coordinates_only_where_it_can(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mnist = ["train", "--problem", "mnist", "--option", "hidden=[3]", "--horizon", "4", "--unroll", "2"]
    assert made(mnist).coordinate_fraction == 0.25
    assert made([*mnist, *options.split()]).coordinate_fraction == 1.0


def test_tasks_are_rescaled_and_the_next_command_is_of_the_problem_itself(tmp_path, capsys):
    scales = ["--scale-tensors", "0.5", "--scale-loss", "-1", "2"]
    out = str(tmp_path / "a")
    assert cli.main([*TRAIN, *scales, "--out", out]) == 0
    assert "training_scales" not in capsys.readouterr().out.splitlines()[-1]
    saved = checkpoints.read(tmp_path / "a" / "checkpoint.safetensors")
    assert saved.settings["problem"]["training_scales"] == [0.5, -1.0, 2.0]
    resume = ["train", "--out", out, "--resume", "--episodes", "3", "--quiet"]
    assert "training_scales" in refused([*resume, "--scale-tensors", "0.25"], capsys)
    assert cli.main([*resume, *scales]) == 0
    assert "training_scales" not in capsys.readouterr().out.splitlines()[-1]
    assert cli.main([*resume]) == 0


def test_a_resumed_run_keeps_its_network_and_estimator(tmp_path, capsys):
    out = ["--out", str(tmp_path / "a")]
    assert cli.main([*TRAIN, "--estimator", "pes", "--pairs", "2", "--hidden-size", "4", *out]) == 0
    resume = ["train", *out, "--resume", "--quiet", "--episodes", "3"]
    capsys.readouterr()
    for wrong, message in (
        (["--estimator", "bptt"], "--estimator bptt: the run has pes (protocol.estimator)"),
        (["--pairs", "3"], "--pairs 3: the run has 2"),
        (["--memory", "dense"], "--memory dense: the run has none"),
        (["--betas", "0.1", "0.2"], "--betas"),
    ):
        assert message in refused([*resume, *wrong], capsys)
    assert cli.main([*resume, "--estimator", "pes", "--pairs", "2", "--hidden-size", "4"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--read-heads", "2"], "read_heads: is of a network with a memory, got 2"),
        (["--pairs", "2"], "pairs: expected estimator 'pes' or 'evolution', got 'bptt'"),
        (["--estimator", "pes", "--shortest", "9"], "shortest: expected estimator 'evolution', got 'pes'"),
        (["--estimator", "pes", "--autograd"], "autograd: is of back-propagation"),
        (["--estimator", "pes", "--sigma", "-1"], "sigma: expected a positive number"),
        (["--gac-cells", "2", "--coordinate-fraction", "0.5"], "coordinate_fraction: expected 1"),
        (["--gac-cells", "2", "--scale-loss", "-1", "1"], "--scale-loss: expected a network whose coordinates do not"),
        (["--scale-loss", "1", "-1"], "--scale-tensors, --scale-loss: loss: expected two rising bounds"),
        (["--gac-cells", "99"], "gac_cells"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path, capsys):
    assert message in refused([*TRAIN, *options, "--out", str(tmp_path / "x")], capsys)
    assert not list(tmp_path.iterdir())


def test_every_place_of_an_option_is_one_of_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = made([*TRAIN, "--memory", "dense", "--hidden-size", "4"]).settings()
    evolution = made(["train", "--problem", "zoo", "--option", "problems=1"]).settings()
    for name, place in PLACES.items():
        found = evolution if name in (*ESTIMATOR, "estimator") else plain
        for key in place:
            assert key in found, name
            found = found[key]
    assert set(NETWORK) < set(PLACES)
