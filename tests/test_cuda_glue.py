"""The CUDA operators' glue, which runs on a GPU only, read as text: an order of things that the CPU's tests see run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
GLUE = ("step", "gac_step", "backward", "gac_backward")


def functions(path: Path) -> dict[str, str]:
    """The bodies of a file's functions by name: from the line that starts one to the brace in the first column."""
    found = re.findall(r"^[\w:<>, ]+ (\w+)\([^;{]*\{\n(.*?)^\}", path.read_text(), re.DOTALL | re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["lstm_step_", "gac_step_"])
def test_versions_are_counted_before_anything_is_written(folder, name):
    """A tensor made under inference mode is refused by that, and must not have been written by then."""
    file = "step" if name == "lstm_step_" else "gac_step"
    body = functions(CSRC / folder / f"{file}.{'cu' if folder == 'cuda' else 'cpp'}")[name]
    assert body.count("mark_written(params, states, {") == 1 and "bump_version" not in body
    begin = body.index("mark_written")
    checks = [match.start() for match in re.finditer(r"check_(?!only|launch)\w+\(", body)]
    writes = [match.start() for match in re.finditer(r"mutable_data_ptr|run_\w+\(|parallel_for|run_layer|Memset", body)]
    assert checks and writes and max(checks) < body.index("if (check_only) return") < begin < min(writes)


@pytest.mark.parametrize("file", sorted(path.name for path in CSRC.glob("c*/*.c*") if path.suffix in (".cu", ".cpp")))
def test_lazy_negations_are_resolved(file):
    """contiguous() returns a contiguous tensor as it is, with the minus sign that is still to be applied."""
    (path,) = CSRC.glob(f"c*/{file}")
    for argument in ("phi", "grad", "grad_update", r"grads\[k\]"):
        assert not re.search(rf"(?<![\w.]){argument}\.contiguous\(\)", path.read_text()), argument


def test_operators_write_nothing_but_what_these_two_mark():
    for name in GLUE:
        for function, body in functions(CSRC / "cuda" / f"{name}.cu").items():
            assert ("mark_written" in body) == (function in ("lstm_step_", "gac_step_")), function
