"""The README's code is run, and its commands are at least parsed.

Python blocks run one after the other in one namespace and one folder, as a reader would run them. What they leave to
the reader is put in their place: the file that ``make demo`` leaves behind (an untrained network), ``loader`` (two
minibatches of noise), a convolutional model where two networks are used; and ``fit`` does 5 short episodes of the 200,
validating after every second.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.cli import command_line as cli
from l2l_fast.evaluation.benchmark import command
from l2l_fast.meta import MetaTrainer, record_of

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
whole = pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="a copy of the sources alone")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXTS["README.md"], re.M | re.S)


def test_the_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_output").mkdir()
    l2l.CoordinatewiseLSTM().save("demo_output/mnist.safetensors")
    best = []
    fit = MetaTrainer.fit

    def short(self, episodes):
        assert episodes == 200
        self.validate_every, self.protocol = 2, self.protocol.make(6, 3)
        fit(self, 3, progress=False)
        best.append(self.best_net().phi().detach())
        fit(self, 5, progress=False)
        assert not torch.equal(self.net.phi(), self.best_net().phi())

    monkeypatch.setattr(MetaTrainer, "fit", short)
    names = {"loader": [(torch.randn(8, 784), torch.randint(10, (8,))) for _ in range(2)]}
    assert len(BLOCKS) == 7
    for block in BLOCKS:
        if "fashion-conv" in block:
            names["model"] = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(3, 3))
        exec(compile(block, "README.md", "exec"), names)
        if "loader" in block:
            assert set(names["opt"].state) == set(names["model"].parameters())  # it has made steps
        if "MetaTrainer" in block:
            saved = l2l.load("mine.safetensors")
            assert torch.equal(saved.phi(), names["trainer"].best_net().phi())
            assert record_of(saved)["best_episode"] in (2, 4)
        if "backward_segment" in block:
            assert all(parameter.grad.abs().sum() > 0 for parameter in names["net"].parameters())
    assert isinstance(names["memory"], l2l.NTMBFGS) and len(names["opt"].param_groups) == 2


def commands():
    for file, text in TEXTS.items():
        for found in re.findall(r"python -m l2l_fast ((?:[^`\n]*\\\n)*[^`\n]*)", text):
            line = found.replace("\\\n", " ").split("#")[0].strip()
            if line:
                yield file, line


def variants(line: str) -> list[str]:
    """``{train, evaluate} --help`` is one command for each."""
    found = re.match(r"\{(.*?)\}(.*)", line)
    return [line] if found is None else [name.strip() + found[2] for name in found[1].split(",")]


ALL = [(file, each) for file, line in commands() for each in variants(line)]


@pytest.mark.parametrize("file, line", ALL, ids=[f"{file}: {line}" for file, line in ALL])
def test_every_command_is_one(file, line, capsys):
    words = shlex.split(line)
    parse = cli._parser().parse_args
    if words[0] == "bench":
        words, parse = words[1:], command._parser().parse_args
    elif words in (["import"], ["experiment", "NAME"]):
        words.append("--help")  # named only, not written out
    try:
        parse(words)
    except SystemExit as error:
        assert error.code == 0 and "--help" in words, capsys.readouterr().err


def test_there_are_commands_and_every_command_is_named():
    assert len(ALL) >= 8
    named = {line.split()[0] for file, line in ALL if file == "README.md"}
    assert {"train", "evaluate", "compare", "bench", "info", "demo", "experiment", "decisions", "import"} <= named
    for option in re.findall(r"`(--[a-z-]+)", TEXTS["README.md"]):
        assert option in everything_that_helps(), option


def everything_that_helps() -> str:
    subparsers = cli._parser()._subparsers._group_actions[0].choices
    return "".join(parser.format_help() for parser in [*subparsers.values(), command._parser()])


@whole
@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)\b", TEXTS["README.md"]))))
def test_make_targets_exist(target):
    if target in ("file", "the"):
        pytest.skip("a word")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@whole
def test_links_and_pictures_exist():
    for file, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]+?)\)", text):
            if "://" not in target:
                assert ((ROOT / file).parent / target).exists(), (file, target)
