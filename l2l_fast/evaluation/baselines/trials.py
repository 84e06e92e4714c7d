"""What a search has tried: kept in a file, so that a search that was stopped goes on, and one that is done is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...networks import writing
from ...problems import Problem
from .rules import RULES
from .running import final_losses, run

_VERSION = 1  # of what a trial means: another number forgets all files
_HEAD = '{"search": '  # how such a file begins


@dataclass(frozen=True)
class Trial:
    """One setting of an optimizer on some of the tuning tasks.

    Attributes:
        options, schedule, lr: the setting.
        tasks: on so many tasks, the first of the tuning tasks.
        final: their mean final loss, see :func:`~.running.final_losses`; +inf if one diverged.
        start: their mean f(theta_0).
    """

    options: Mapping[str, float]
    schedule: str
    lr: float
    tasks: int
    final: float
    start: float


@dataclass
class Trials:
    """Runs trials, each once.

    ``path``: a file of JSON lines; one that was written for other tasks, or is damaged, is begun anew from where it
    ends being right. A file that is none of ours is left alone: ValueError.
    """

    problem: Problem
    name: str
    horizon: int
    seeds: Sequence[int]
    split: str
    device: torch.device | str | None = None
    path: Path | None = None
    done: dict[str, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None:
            self._read(self.path)

    def __call__(self, options: Mapping[str, float], schedule: str, lr: float, tasks: int) -> Trial:
        """The trial of that setting on the first ``tasks`` tasks."""
        key = json.dumps([list(options.values()), schedule, lr, tasks])
        if key not in self.done:
            losses = run(
                self.problem,
                self.name,
                lr,
                self.seeds[:tasks],
                self.horizon,
                options=options,
                schedule=schedule,
                split=self.split,
                device=self.device,
            )
            final, start = final_losses(losses).mean().item(), losses[:, 0].mean().item()
            self.done[key] = Trial(dict(options), schedule, lr, tasks, final, start)
            self._append(key)
        return self.done[key]

    def _header(self) -> str:
        about = [_VERSION, self.problem.config(), self.horizon, list(self.seeds), self.split, str(self.device or "cpu")]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        return json.dumps({"search": self.name, "tasks": digest})

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines, good = text.splitlines(), [self._header()]
        torn = len(lines) == 1 and not text.endswith("\n") and _HEAD.startswith(text)  # where a process was killed
        if text and not torn and not text.startswith(_HEAD):
            raise ValueError(f"cache: {str(path)!r} holds something else than the trials of a search")
        if lines[:1] == good:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                    losses: dict[str, Any] = {
                        key: math.inf if entry[key] is None else float(entry[key]) for key in ("final", "start")
                    }
                    options = dict(zip(RULES[self.name].defaults(), entry["key"][0], strict=True))
                    trial = Trial(options, *entry["key"][1:], **losses)
                except (ValueError, KeyError, TypeError):
                    break  # cut off where a process was killed
                self.done[json.dumps(entry["key"])] = trial
                good.append(line)
        whole = "\n".join(good) + "\n"
        if text != whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            writing.write_atomically(path, whole, "cache")

    def _append(self, key: str) -> None:
        if self.path is None:
            return
        trial = self.done[key]
        final, start = (value if math.isfinite(value) else None for value in (trial.final, trial.start))
        line: dict[str, Any] = {"key": json.loads(key), "final": final, "start": start}
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
