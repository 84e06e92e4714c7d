"""What surrounds the kernels of every device, read as text: orders of things that tests see run on the CPU only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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


SWITCH = "L2L_FAST_TENSOR_CORES"
PROGRAM = f"""
#include <cstdio>
#include "cuda/switches.h"
int main() {{
  try {{
    std::puts(l2l::environment_switch("{SWITCH}") ? "on" : "off");
  }} catch (const std::invalid_argument& error) {{
    std::puts(error.what());
  }}
}}
"""


def test_tensor_cores_are_off_unless_asked_for(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "switch.cpp").write_text(PROGRAM)
    program = [str(tmp_path / "switch")]
    subprocess.run([compiler, "-std=c++17", f"-I{CSRC}", str(tmp_path / "switch.cpp"), "-o", *program], check=True)
    without = {name: value for name, value in os.environ.items() if name != SWITCH}

    def said(**environment):
        return subprocess.run(program, env=without | environment, capture_output=True, text=True, check=True).stdout

    assert [said(), said(**{SWITCH: ""}), said(**{SWITCH: "0"}), said(**{SWITCH: "1"})] == ["off\n"] * 3 + ["on\n"]
    assert said(**{SWITCH: "yes"}) == f"{SWITCH}: expected 0 or 1, got 'yes'\n"


def test_only_the_backend_asks_for_tensor_cores():
    """Whoever else launches a step gets the FP32 kernels by default."""
    backend, operations = (CSRC / "cuda" / "backend.cu").read_text(), (CSRC / "cuda" / "operations.cuh").read_text()
    assert backend.count("tensor_cores_wanted()") == 2 == operations.count("bool tensor_cores = false")
    readers = [path.name for path in SOURCES if path.parent.name == "cuda" and "getenv" in path.read_text()]
    assert readers == ["switches.h"]
    assert [path.name for path in SOURCES if SWITCH in path.read_text()] == ["tensors.h"]
