"""The benchmark's page is made from what bench wrote; the one in docs/ is what comes of docs/performance.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import page

DOCS = Path(__file__).parent.parent / "docs"
RUN = Path(__file__).parent / "data" / "bench_quick.json"  # bench --quick --sizes 1000 --contenders eager fused
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="a copy of the sources alone")


@pytest.fixture
def copy(tmp_path):
    for name in ("performance.md", "performance.json"):
        shutil.copyfile(DOCS / name, tmp_path / name)
    return tmp_path / "performance.md"


def test_the_page_shows_the_stored_run(copy):
    assert page.main(["--page", str(copy)]) == 0
    assert copy.read_text() == (DOCS / "performance.md").read_text(), "run python -m bench.page"
    assert copy.with_suffix(".json").read_text() == (DOCS / "performance.json").read_text()
    assert copy.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_makes_the_page(copy):
    before = copy.read_text()
    assert page.main([str(RUN), "--page", str(copy)]) == 0
    after, run = copy.read_text(), json.loads(RUN.read_text())
    for part in (0, -1):  # what is beside the measured part stays
        end = page.BEGIN if part == 0 else page.END
        assert after.split(end)[part] == before.split(end)[part]
    measured = after.split(page.BEGIN)[1].split(page.END)[0]
    assert "1,000,000" not in measured and run["machine"]["command"] in measured
    step = next(row for row in run["rows"] if row["measure"] == "step")
    line = next(line for line in measured.splitlines() if line.startswith("| avx512"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:5] == ["1,000", "1", page.number(step["eager"]), f"**{page.number(step['fused'])}**"]
    assert cells[5] == f"{step['times_eager']:.1f}" and "`torch.compile`" not in measured
    assert measured.count("| MNIST episode, ms |") == 2
    stored = json.loads(copy.with_suffix(".json").read_text())
    assert len(stored["rows"]) == len(run["rows"]) and all("samples" not in row for row in stored["rows"])
    first = copy.read_text()
    assert page.main(["--page", str(copy)]) == 0 and copy.read_text() == first  # again, from what was kept


def test_the_baseline_that_is_faster_is_in_bold():
    row = {"measure": "step", "eager": 1.0, "compile": 3.0, "fused": 2.0, "times_eager": 0.5, "times_compile": 1.5}
    assert page.cells(row) == ["**1**", "3", "2", "0.5", "1.5"]


def test_the_figure_has_a_panel_for_each_measure():
    run = json.loads(RUN.read_text())
    panels = page.figure(run).axes
    assert [len(axes.patches) for axes in panels] == [2, 2, 2, 2]
    segment = [row for row in run["rows"] if row["measure"] == "segment"][0]
    assert sorted(bar.get_width() for bar in panels[1].patches) == sorted([segment["eager"], segment["fused"]])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"machine": {}, "rows": [{"measure": "step"}]}'])
def test_other_files_are_refused_and_nothing_is_written(copy, tmp_path, capsys, content):
    other = tmp_path / "other.json"
    other.write_text(content)
    before = copy.read_text()
    assert page.main([str(other), "--page", str(copy)]) == 2
    assert "run: expected what `python -m l2l_fast bench --json FILE` writes" in capsys.readouterr().err
    assert copy.read_text() == before
    copy.write_text("no markers")
    assert page.main([str(RUN), "--page", str(copy)]) == 2
    assert "page: expected the markers" in capsys.readouterr().err and copy.read_text() == "no markers"
