"""Runs that were made, kept in files of JSON lines: what a stopped suite goes on from, and the package's baselines.

A line is a run under its key: all that it depends on. Lines are only ever added; one that was cut off where a process
was killed, and whatever lies behind it, is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import lzma
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...networks import writing
from .curves import Run

SHIPPED = Path(__file__).parent / "baselines.jsonl.xz"
_FORMAT = 1  # of lines and of what a run is: another number forgets all files


@dataclass(frozen=True)
class Key:
    """All that a run depends on.

    Attributes:
        network, version, data: the suite's network, its definition's version, the data set that it was given.
        optimizer: a baseline's rule ("adam"), or a contender's identity, its file's digest included.
        options: of a baseline: ``{"lr": 0.001}``.
        schedule: of the rate.
        seed, steps: of the run.
        search: it was made while tuning: may have been given up early.
    """

    network: str
    version: int
    data: str
    optimizer: str
    options: dict[str, float]
    schedule: str
    seed: int
    steps: int
    search: bool = False

    def text(self) -> str:
        """As JSON, the same for equal keys."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass
class Store:
    """Runs by key, from read-only files and one that is added to.

    Args:
        path: the file of JSON lines to read and add to; None: nothing is written.
        shipped: further files, read only, ``.xz`` or plain.

    Raises:
        ValueError: ``path`` holds something else.
    """

    path: Path | None = None
    shipped: Iterable[Path] = ()
    found: dict[str, Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self.shipped:
            if path.is_file():
                content = path.read_bytes()
                self._read((lzma.decompress(content) if path.suffix == ".xz" else content).decode(), path)
        if self.path is not None and self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            whole = self._read(text, self.path)
            if whole != text:
                writing.write_atomically(self.path, whole)

    def get(self, key: Key) -> Run | None:
        """The run of that key, if there is one."""
        return self.found.get(key.text())

    def add(self, key: Key, run: Run, write: bool = True) -> Run:
        """Keep a run, what a search has made without its curve; returns it with the digits that are kept."""
        line = _line(key, run)
        kept = _run(json.loads(line))
        if not write:
            return kept
        self.found[key.text()] = kept
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        return kept

    def _read(self, text: str, path: Path) -> str:
        """Take in the lines of a file; returns those that are whole."""
        good: list[str] = []
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                if entry["format"] == _FORMAT:
                    self.found[Key(**entry["key"]).text()] = _run(entry)
            except (ValueError, KeyError, TypeError):
                if not good:
                    raise ValueError(f"{str(path)!r} holds something else than runs of the suite") from None
                break
            good.append(line)
        return "".join(line + "\n" for line in good)


def ship(source: str | os.PathLike[str], target: Path = SHIPPED) -> int:
    """Write the runs of a file of JSON lines as the package's, sorted and compressed; returns how many there are."""
    lines = sorted(filter(None, Path(source).read_text(encoding="utf-8").splitlines()))
    target.write_bytes(lzma.compress("".join(line + "\n" for line in lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    return len(lines)


def _line(key: Key, run: Run) -> str:
    entry: dict[str, Any] = {"format": _FORMAT, "key": asdict(key)}
    entry.update(start=_number(run.start), final=_number(run.final), seconds=_number(run.seconds, 3))
    entry["early"] = {str(step): _number(value) for step, value in run.early.items()}
    if not key.search:
        entry["curve"] = [_number(value, 4) for value in run.curve]
    return json.dumps(entry, separators=(",", ":"))


def _number(value: float, digits: int = 7) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _run(entry: dict[str, Any]) -> Run:
    def value(kept: float | None) -> float:
        return math.inf if kept is None else float(kept)

    early = {int(step): value(kept) for step, kept in entry["early"].items()}
    curve = tuple(map(value, entry.get("curve", ())))
    return Run(entry["key"]["steps"], value(entry["start"]), value(entry["final"]), early, curve, entry["seconds"])
