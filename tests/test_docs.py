"""The site: what pages quote is in the code, the reference has every public name, and the tools that build it do what
they say. The site itself is built by `make docs`, where a warning is an error."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import l2l_fast as l2l

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="a copy of the sources alone")


def templates() -> list[str]:
    """Every string of the package and its build, with NUL where a value stands; of C++ what stands without a value
    between."""
    found = []
    literal = r'"(?:[^"\\\n]|\\.)*"'
    for path in (path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")):
        for together in re.findall(rf"{literal}(?:[\s,]*{literal})*", path.read_text()):
            found.append("".join(each[1:-1] for each in re.findall(literal, together)))
    for path in [*(ROOT / "l2l_fast").rglob("*.py"), ROOT / "cuda_build.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [*found, (ROOT / "scripts" / "setup_venv.sh").read_text()]


def quoted() -> list[str]:
    """The messages of the page: what its first columns have in backticks that ends in no call and is a sentence."""
    cells = re.findall(r"^\| ([^|]*) \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if len(text.split()) > 3]


MESSAGES = quoted()


@pytest.fixture(scope="module")
def strings():
    return templates()


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_are_in_the_code(message, strings):
    parts = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(r"[^\n]*?".join(parts))
    assert any(pattern.search(text) for text in strings)


def test_there_are_messages():
    assert len(MESSAGES) > 35


def test_public_names_are_in_the_reference():
    pages = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    directives = set(re.findall(r"^::: (\S+)", pages, re.M))
    for name in l2l.__all__:
        assert f"`{name}`" in pages or f"`l2l_fast.{name}`" in pages, name
    for directive in directives:
        module, _, attribute = directive.rpartition(".")
        assert attribute in dir(__import__(module, fromlist=["_"])) or __import__(directive, fromlist=["_"])


def test_pages_are_in_the_navigation_once():
    named = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(named) == len(set(named))
    for name in named:
        path = ROOT / name.removeprefix("source/") if name.startswith("source/") else DOCS / name
        assert path.is_file() or path.with_suffix("").is_file(), name
