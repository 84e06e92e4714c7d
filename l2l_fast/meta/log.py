"""The training log: JSON lines, appended atomically; a resume cuts it back to the checkpoint, so nothing is doubled."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class TrainingLog:
    """A file of JSON objects, one per line, each with an ``"event"`` and (but for the first) an ``"episode"``.

    Every line is one ``write`` to a file opened for appending, so a killed process leaves whole lines. Numbers that
    JSON does not have (infinity, NaN) are null.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def is_empty(self) -> bool:
        """Whether there is nothing in it yet (or no such file)."""
        return not self.path.exists() or self.path.stat().st_size == 0

    def check_unused(self) -> None:
        """Raise ValueError if there is something in it."""
        if not self.is_empty():
            raise ValueError(
                f"log: {str(self.path)!r} already holds a run; resume that one from its checkpoint or give another file"
            )

    def append(self, record: dict[str, Any]) -> None:
        """Add a line."""
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def cut_back(self, episode: int) -> None:
        """Drop what was written after the checkpoint at ``episode``: the resumed run will write it again."""
        if self.is_empty():
            return
        keep = 0
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    if not line.endswith(b"\n") or record.get("episode", 0) > episode:
                        break
                except (ValueError, AttributeError):
                    break  # a line torn by a crash of the machine
                keep += len(line)
        os.truncate(self.path, keep)

    def records(self) -> list[dict[str, Any]]:
        """All lines, parsed."""
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
