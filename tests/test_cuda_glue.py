"""What surrounds the kernels of every device, read as text: orders of things that tests see run on the CPU only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
OPERATORS = CSRC / "ops" / "operators.cpp"
SOURCES = sorted(path for path in CSRC.rglob("*.*") if path.suffix in (".cu", ".cuh", ".cpp", ".h"))


def functions(path: Path) -> dict[str, str]:
    """The bodies of a file's functions by name: from the line that starts one to the brace in the first column."""
    found = re.findall(r"^[\w:<>, ]+ (\w+)\([^;{]*\{\n(.*?)^\}", path.read_text(), re.DOTALL | re.MULTILINE)
    return dict(found)


def test_versions_are_counted_before_anything_is_written():
    """A tensor made under inference mode is refused by that, and must not have been written by then."""
    body = functions(OPERATORS)["step_"]
    assert body.count("mark_written(arguments)") == 1 and "bump_version" not in body
    begin = body.index("mark_written")
    checks = [match.start() for match in re.finditer(r"check_(?!only)\w+\(|backend_of\(|make_config\(", body)]
    writes = [match.start() for match in re.finditer(r"mutable_data_ptr|backend\.step\(|zero_\(", body)]
    assert checks and writes and max(checks) < body.index("if (check_only) return") < begin < min(writes)


def test_operators_write_nothing_but_what_this_one_marks():
    bodies = functions(OPERATORS)
    assert {"step", "step_backward", "step_", "segment_backward"} <= set(bodies)
    for function, body in bodies.items():
        assert ("mark_written" in body) == (function == "step_"), function


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_versions_are_counted_in_one_place(path):
    text = path.read_text()
    assert ("bump_version" in text) == (path.name == "arguments.cpp")
    assert "mark_written" not in text or path.parent.name == "ops"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_lazy_negations_are_resolved(path):
    """contiguous() returns a contiguous tensor as it is, with the minus sign that is still to be applied."""
    for argument in ("phi", "grad", "grad_out", r"grads\[k\]"):
        assert not re.search(rf"(?<![\w.]){argument}\.contiguous\(\)", path.read_text()), argument


def test_backends_get_neither_a_lazy_negation_nor_strides_of_phi():
    """What the calls of operators.cpp are given, in the places that do not check for it."""
    text, bodies = OPERATORS.read_text(), functions(OPERATORS)
    assert "phi.resolve_neg().contiguous()" in text and text.count(".contiguous()") == 1
    for name in ("step", "step_backward", "step_", "segment_backward"):
        body = bodies[name]
        assert "dense(phi)" in body, name
        if name != "segment_backward":
            assert "resolve_neg()" in body, name
