"""The tables and the plot of docs/performance.md, from what `python -m l2l_fast bench --json FILE` wrote.

    python -m l2l_fast bench --sizes 1e6 --threads 2 --json run.json      # some 15 minutes on an idle machine
    python -m bench.page run.json                                         # or: make bench-page RUN=run.json

Without a file it renders docs/performance.json again, the run that the page shows. What stands between the two markers
of the page is replaced, the rest of it stays as it is; the run becomes docs/performance.json, without its samples.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2l_fast.evaluation.plots import save_figure
from l2l_fast.networks.writing import write_atomically

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- measured: by python -m bench.page, which replaces it -->", "<!-- end of measured -->"
CONTENDERS = ("eager", "compile", "fused")
META = {
    "segment": "unrolled step, ns per coordinate",
    "segment memory": "peak memory of a segment, bytes per coordinate",
    "MNIST episode": "MNIST episode, ms",
}
COLORS = {"eager": "#999999", "compile": "#56b4e9", "fused": "#d55e00"}
Rows = Sequence[dict[str, Any]]


def read(path: Path) -> dict[str, Any]:
    """A run. ValueError if the file holds something else."""
    try:
        run = json.loads(path.read_text())
        lacking = {"measure", "n", "threads", "isa", "unit"} - set.intersection(*(set(row) for row in run["rows"]))
        assert isinstance(run["machine"], dict) and not lacking
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError, AssertionError) as error:
        expected = "expected what `python -m l2l_fast bench --json FILE` writes"
        raise ValueError(f"run: {expected}, got {path} ({type(error).__name__})") from None
    return run


def number(x: float | None, strong: bool = False) -> str:
    if x is None:
        return ""
    text = f"{x:,.0f}" if abs(x) >= 1e4 else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return f"**{text}**" if strong else text


def times(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}"


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f} %"


def cells(row: dict[str, Any]) -> list[str]:
    """Of a row what both tables have: three contenders, the fastest in bold, and how many times fused is faster."""
    best = min((row[name] for name in CONTENDERS if row.get(name) is not None), default=None)
    measured = [number(row.get(name), row.get(name) == best) for name in CONTENDERS]
    return [*measured, times(row.get("times_eager")), times(row.get("times_compile"))]


def place(row: dict[str, Any]) -> list[str]:
    sizes = "" if row["n"] is None else f"{row['n']:,}"
    return [row["isa"], sizes, str(row["threads"])]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns without an entry are left out."""
    kept = [k for k, name in enumerate(header) if k == 0 or any(row[k] for row in rows)]
    marks = "|".join("---:" if k and header[k] != "kernels" else "---" for k in kept)
    lines = [[header[k] for k in kept], *[[row[k] for k in kept] for row in rows]]
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, f"|{marks}|", *others])


def step_table(rows: Rows) -> str:
    header = ["step, ns per coordinate", "N", "threads", "eager `nn.LSTMCell`", "`torch.compile`", "fused", "x eager"]
    header += ["x compile", "of FMA peak", "of copy bandwidth", "Adam, for scale"]
    shares = ("fraction_of_fma_peak", "fraction_of_copy_bandwidth")
    steps = [row for row in rows if row["measure"] == "step"]
    lines = [[*place(r), *cells(r), *(percent(r.get(k)) for k in shares), number(r.get("adam"))] for r in steps]
    return table(header, lines)


def meta_table(rows: Rows) -> str:
    header = ["meta-training", "kernels", "N", "threads", "eager BPTT", "`torch.compile`", "fused", "x eager"]
    header += ["x compile", "of FMA peak"]
    of = [row for row in rows if row["measure"] in META]
    lines = [[META[r["measure"]], *place(r), *cells(r), percent(r.get("fraction_of_fma_peak"))] for r in of]
    return table(header, lines)


def products_table(rows: Rows) -> str:
    """How near to the peak the matrix products alone come, for all instruction sets."""
    of = [row for row in rows if row["unit"] == "Gmadd/s"]
    lines = [[r["measure"].removeprefix("products: "), *place(r), percent(r.get("fraction_of_fma_peak"))] for r in of]
    return table(["matrix products alone", "kernels", "N", "threads", "of FMA peak"], lines) if of else ""


def text(run: dict[str, Any], plot: str) -> str:
    """What stands between the markers."""
    rows, machine = run["rows"], run["machine"]
    shown = [row for row in rows if row["measure"] == "step" or row["measure"] in META]
    about = ", ".join(machine[key] for key in ("processor", "versions") if key in machine)
    commands = "".join(f"    {line}\n" for line in machine["command"].splitlines())
    parts = [f"On {about}:\n\n{commands}", step_table(rows), products_table(rows), meta_table(rows)]
    notes = dict.fromkeys(f"{META.get(r['measure'], 'step')}: {note}" for r in shown for note in r.get("notes", ()))
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    parts.append(f"![Step, unrolled step and memory of eager PyTorch, torch.compile and the fused kernels]({plot})")
    return "\n\n".join(part.rstrip("\n") for part in parts if part)


def largest(rows: Rows, measure: str) -> dict[str, Any] | None:
    """The row of a measure at the largest N, in the most threads, by the first instruction set that was measured."""
    of = [row for row in rows if row["measure"] == measure and any(row.get(name) for name in CONTENDERS)]
    return max(of, key=lambda row: (row["n"] or 0, row["threads"])) if of else None


def figure(run: dict[str, Any]) -> Any:
    """A panel of bars, on logarithmic axes, for each of step, unrolled step and memory."""
    from matplotlib.figure import Figure

    titles = {"step": "step, ns per coordinate", **META}
    panels = [(titles[name], row) for name in titles if (row := largest(run["rows"], name)) is not None]
    lines = -(-len(panels) // 2)
    result = Figure(figsize=(8.0, 1.6 * lines), layout="constrained")
    for k, (title, row) in enumerate(panels):
        axes = result.add_subplot(lines, 2, k + 1)
        names = [name for name in reversed(CONTENDERS) if row.get(name) is not None]
        bars = axes.barh(names, [row[name] for name in names], color=[COLORS[name] for name in names])
        axes.bar_label(bars, [number(row[name]) for name in names], padding=3, fontsize=9)
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(1, 30 * max(row[name] for name in names))
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return result


def render(run: dict[str, Any], page: Path, plot: Path) -> None:
    """Replace what is between the markers of ``page``, and draw ``plot``. ValueError if there are no markers."""
    old = page.read_text()
    found = re.search(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", old, re.S)
    if found is None:
        raise ValueError(f"page: expected the markers {BEGIN!r} and {END!r} in {page}")
    save_figure(figure(run), plot, dpi=150)
    new = text(run, plot.name)
    write_atomically(page, f"{old[: found.start()]}\n{new}\n\n{old[found.end() :]}", "page")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="a file of bench --json (docs/performance.json)")
    parser.add_argument("--page", type=Path, default=DOCS / "performance.md", metavar="FILE")
    arguments = parser.parse_args(argv)
    page = arguments.page
    kept = page.with_suffix(".json")
    try:
        run = read(arguments.run or kept)
        render(run, page, page.with_suffix(".png"))
    except (OSError, ValueError) as error:
        print(f"bench.page: {error}", file=sys.stderr)
        return 2
    rows = [{key: value for key, value in row.items() if key != "samples"} for row in run["rows"]]
    write_atomically(kept, json.dumps({**run, "rows": rows}, indent=1) + "\n", "run")
    print(f"written: {page}, {page.with_suffix('.png').name}, {kept.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
