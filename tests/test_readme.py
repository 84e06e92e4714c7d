"""The code of the README and of docs/ is run, their commands are at least parsed, and their links lead somewhere.

Python blocks of a page run one after the other in one namespace and one folder, as a reader would run them. What they
leave to the reader is put in their place: the file that ``make demo`` leaves behind (an untrained network), ``loader``
(two minibatches of noise), a model and a network where a page begins with those; and long trainings are cut short.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast import baselines
from l2l_fast.cli import command_line as cli
from l2l_fast.evaluation.benchmark import command
from l2l_fast.meta import MetaTrainer, record_of

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/**/*.md"))
PATHS = [ROOT / "README.md", *PAGES, *ROOT.glob("examples/*.md"), *ROOT.glob("*.md")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
whole = pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="a copy of the sources alone")
ELSEWHERE = {"docs/distributed.md"}  # runs in tests/test_dtensor.py, on two processes


def blocks(file: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", TEXTS[file], re.M | re.S)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Where a reader sits: an empty folder, and the names that pages take for granted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_output").mkdir()
    l2l.CoordinatewiseLSTM().save("demo_output/mnist.safetensors")
    model = nn.Sequential(nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 10))
    loader = [(torch.randn(8, 784), torch.randint(10, (8,))) for _ in range(2)]
    return {"torch": torch, "l2l": l2l, "model": model, "net": l2l.load_pretrained("general"), "loader": loader}


@pytest.fixture
def short(monkeypatch):
    """``fit`` does 5 short episodes of the many, validating after every second, and evaluations are short, too."""
    fit = MetaTrainer.fit

    def shorter(self, episodes, **options):
        assert episodes in (150, 200)
        if self.episode < 5:
            self.validate_every, self.protocol = 2, self.protocol.make(6, 3)
            fit(self, 5, progress=False, **options)
            assert not torch.equal(self.net.phi(), self.best_net().phi())
        return self

    monkeypatch.setattr(MetaTrainer, "fit", shorter)
    run = baselines.run
    monkeypatch.setattr(baselines, "run", lambda *args, **more: run(*args[:4], **{**more, "horizon": 5}))


def test_the_python_blocks_of_the_readme_run(reader, short):
    code = blocks("README.md")
    assert len(code) == 2
    for block in code:
        exec(compile(block, "README.md", "exec"), reader)
        if "loader" in block:
            assert set(reader["opt"].state) == set(reader["model"].parameters())  # it has made steps
    saved = l2l.load("mine.safetensors")
    assert torch.equal(saved.phi(), reader["trainer"].best_net().phi())
    assert record_of(saved)["best_episode"] in (2, 4)


@pytest.mark.parametrize("file", [file for file in TEXTS if blocks(file) and file not in {"README.md", *ELSEWHERE}])
def test_the_python_blocks_of_a_page_run(file, reader, short, capsys):
    for block in blocks(file):
        exec(compile(block, file, "exec"), reader)
    said = capsys.readouterr().out
    if file == "docs/tutorials/deploy.md":
        first, last = map(float, re.fullmatch(r"(\S+) -> (\S+)\n", said).groups())
        assert last < first / 5
        assert [group["total_steps"] for group in reader["opt"].param_groups] == [300]
    if file == "docs/tutorials/import.md":
        assert float(said) < 1e-7
    if file == "docs/tutorials/choose.md":
        assert "trained for 100 steps, evaluated over 120" in said
    if file == "docs/tutorials/meta_train.md":
        assert reader["trainer"].episode == 5 and said.count("\n") == 2
        assert all(parameter.grad.abs().sum() > 0 for parameter in reader["net"].parameters())
    if file == "docs/results.md":
        assert isinstance(reader["memory"], l2l.NTMBFGS)


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


@pytest.mark.parametrize("file", TEXTS)
def test_options_that_a_page_names_exist(file):
    for option in re.findall(r"`(--[a-z-]+)", TEXTS[file]):
        assert option in everything_that_helps() or option in OF_OTHERS, option


OF_OTHERS = {"--no-build-isolation", "--threads", "--help"}  # options of pip and of bench's tools


def everything_that_helps() -> str:
    subparsers = cli._parser()._subparsers._group_actions[0].choices
    return "".join(parser.format_help() for parser in [cli._parser(), *subparsers.values(), command._parser()])


TARGETS = sorted(set(re.findall(r"(?:`|^    )make ([a-z-]+)\b", "".join(TEXTS.values()), re.M)) - {"must"})


@whole
@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@whole
@pytest.mark.parametrize("module", sorted(set(re.findall(r"python (?:-m )?(bench[./]\w+)", "".join(TEXTS.values())))))
def test_tools_of_bench_exist(module):
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@whole
def test_links_and_pictures_exist():
    for file, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]+?)\)", text):
            if "://" not in target:
                assert ((ROOT / file).parent / target).exists(), (file, target)
