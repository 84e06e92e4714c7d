"""The notebook of examples/: its cells run one after the other in plain Python, few tasks and steps; the outputs
that it shows are there, and of a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "decisions.ipynb"
pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="a copy of the sources alone")


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_cells_run(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("L2L_FAST_QUICK", "1")
    monkeypatch.chdir(tmp_path)
    figures, names = [], {}
    for cell in code_cells():
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
        names["show"] = figures.append
    assert names["HORIZON"] == 20 and names["torch"].get_num_threads() == 1
    assert [len(figure.axes) for figure in figures] == [1, 8, 1]  # traces and three proposals, of two coordinates
    said = capsys.readouterr().out
    assert said.count("Adam at") == 5 and said.count("learned: ") == 2
    first, last = names["curves"]["learned"][:, [0, -1]].mean(0)
    assert last < first
    assert not list(tmp_path.iterdir())


def test_the_outputs_are_those_of_a_whole_run():
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert all(cell["execution_count"] for cell in code_cells())
