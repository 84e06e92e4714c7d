"""The rows of the comparison, as one table of text or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One measure at one size, number of threads and instruction set; ``values`` are medians in ``unit``."""

    measure: str
    n: int | None
    threads: int
    isa: str
    unit: str
    values: dict[str, float | None]  # "eager", "compile", "fused", "adam"
    multiply_adds: float | None = None  # of the fused contender, per coordinate (and step)
    bytes: float | None = None  # likewise: read and written, if every byte moves once
    peak: float | None = None  # measured multiply-adds per second, in as many threads
    bandwidth: float | None = None  # measured bytes per second of a copy
    notes: list[str] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def times_faster(self, other: str) -> float | None:
        """How many times less than ``other`` the fused contender needs."""
        a, b = self.values.get(other), self.values.get("fused")
        return a / b if a and b else None

    def rate(self) -> float | None:
        """Multiply-adds per second reached."""
        fused = self.values.get("fused")
        if self.unit == "Gmadd/s":
            return fused * 1e9 if fused else None
        return self.multiply_adds / fused * 1e9 if self.unit == "ns" and self.multiply_adds and fused else None

    def traffic(self) -> float | None:
        """Bytes per second moved."""
        fused = self.values.get("fused")
        return self.bytes / fused * 1e9 if self.unit == "ns" and self.bytes and fused else None

    def derived(self) -> dict[str, float | None]:
        """The columns that follow from the measured ones."""
        return {
            "times_eager": self.times_faster("eager"),
            "times_compile": self.times_faster("compile"),
            "multiply_adds_per_second": self.rate(),
            "fraction_of_fma_peak": _fraction(self.rate(), self.peak),
            "bytes_per_second": self.traffic(),
            "fraction_of_copy_bandwidth": _fraction(self.traffic(), self.bandwidth),
        }

    def as_json(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k not in ("values", "notes", "samples")}
        return {**own, **self.values, **self.derived(), "notes": self.notes, "samples": self.samples}


_HEADER = (
    *("measure", "N", "threads", "isa", "unit", "eager", "compile", "fused", "x eager", "x compile"),
    *("madds", "Gmadd/s", "of peak", "GB/s", "of copy", "Adam", "note"),
)
_LEFT = ("measure", "isa", "unit", "note")


def render(rows: Sequence[Row]) -> str:
    """The table in Markdown, columns aligned, those without an entry left out; its notes below."""
    notes: list[str] = list(dict.fromkeys(note for row in rows for note in row.notes))
    lines = [_HEADER, *[_cells(row, [notes.index(note) + 1 for note in row.notes]) for row in rows]]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    left = [column[0] in _LEFT for column in columns]

    def text(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if at_left else c.rjust(w) for c, w, at_left in zip(cells, widths, left, strict=True)]
        return "| " + " | ".join(padded) + " |"

    marks = ["-" * (w + 2) if at_left else "-" * (w + 1) + ":" for w, at_left in zip(widths, left, strict=True)]
    header, *body = zip(*columns, strict=True) if columns else [()]
    legend = [f"{k}. {note}" for k, note in enumerate(notes, 1)]
    return "\n".join([text(header), f"|{'|'.join(marks)}|", *map(text, body), *([""] if legend else []), *legend])


def _cells(row: Row, notes: Sequence[int]) -> tuple[str, ...]:
    d = row.derived()
    rate, traffic = d["multiply_adds_per_second"], d["bytes_per_second"]
    return (
        row.measure,
        "" if row.n is None else _size(row.n),
        str(row.threads),
        row.isa,
        row.unit,
        *(_number(row.values.get(name)) for name in ("eager", "compile", "fused")),
        _number(d["times_eager"]),
        _number(d["times_compile"]),
        "" if row.multiply_adds is None else f"{row.multiply_adds:.0f}",
        _number(rate and rate / 1e9),
        _percent(d["fraction_of_fma_peak"]),
        _number(traffic and traffic / 1e9),
        _percent(d["fraction_of_copy_bandwidth"]),
        _number(row.values.get("adam")),
        " ".join(map(str, notes)),
    )


def _fraction(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None


def _number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f} %"


def _size(n: int) -> str:
    exponent = len(str(n)) - 1
    return f"1e{exponent}" if n == 10**exponent and n >= 1000 else f"{n:,}"
