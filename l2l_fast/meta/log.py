"""The training log: JSON lines, appended atomically; a resume cuts it back to the checkpoint, so nothing is doubled."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from ..networks import writing


class TrainingLog:
    """A file of JSON objects, one per line, each with an ``"event"`` and (but for the first) an ``"episode"``.

    Every line is one ``write`` to a file opened for appending, so a killed process leaves whole lines. Numbers that
    JSON does not have (infinity, NaN) are null.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        writing.check_writable(path, "log", make_folder=True)  # after an episode would be late
        self.path = Path(os.fsdecode(path))

    def is_empty(self) -> bool:
        """Whether there is nothing in it yet (or no such file)."""
        return not self.path.exists() or self.path.stat().st_size == 0

    def check_unused(self) -> None:
        """Raise ValueError if there is something in it."""
        if not self.is_empty():
            raise ValueError(
                f"log: {str(self.path)!r} already holds a run; resume that one from its checkpoint or give another file"
            )

    def remove(self, finished: bool = False) -> bool:
        """Remove the file if a run of this package wrote it and nothing but its settings is in it; with ``finished``,
        whatever such a run wrote. Returns whether there was one. See :meth:`check_removable`."""
        self.check_removable(finished)
        there = os.path.lexists(self.path) and not self.path.is_symlink()
        if there:
            self.path.unlink()
        return there

    def check_removable(self, finished: bool = False) -> None:
        """Raise ValueError unless :meth:`remove` would do it: what is not a run's log is somebody's, and so are the
        episodes of a run that cannot be made again."""
        if self.is_empty():
            return
        self.check_ours()
        with open(self.path, "rb") as file:
            events = [_event(line) for line in file]
        episodes = events.count("episode")
        if episodes and not finished:
            raise ValueError(
                f"{str(self.path)!r} holds {episodes} episodes of a run whose checkpoint is gone, and a new one would "
                "take their place; move it away or name another folder"
            )

    def check_same_run(self, settings: dict[str, Any]) -> None:
        """Raise ValueError unless it is empty or the log of a run with these settings."""
        self.check_ours()
        if self.is_empty():
            return
        with open(self.path, "rb") as file:
            line = file.readline()
        if not line.endswith(b"\n"):
            return  # torn, and with it all of the log
        former, present = json.loads(line), json.loads(json.dumps(_plain(settings)))
        different = _other(former, present)
        if different:
            raise ValueError(
                f"log: {str(self.path)!r} is that of another run (other {', '.join(different)}), whose lines would be "
                "dropped; give the one of this run, or a new file"
            )

    def check_ours(self) -> None:
        """Raise ValueError if there is something in it that no run of this package wrote."""
        if self.is_empty():
            return
        with open(self.path, "rb") as file:
            first = file.readline(1 << 20)
        torn = first.startswith(_BEGINNING[: len(first)]) and not first.endswith(b"\n")  # by a crash of the machine
        if not (torn or _event(first) == "settings"):
            raise ValueError(
                f"{str(self.path)!r} is not the log of a run, and one would be written there; move it away or give "
                "another place"
            )

    def append(self, record: dict[str, Any]) -> None:
        """Add a line."""
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = line.encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            begin = os.fstat(descriptor).st_size
            written = os.write(descriptor, content)
            if written != len(content):  # a disk that is full now: the rest would say so, or be torn from its line
                os.ftruncate(descriptor, begin)
                raise OSError(errno.ENOSPC, "log: cannot be written: the disk is full", str(self.path))
        finally:
            os.close(descriptor)

    def flush(self) -> None:
        """Called when a run ends or is interrupted; every line is in the file already."""

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


_BEGINNING = b'{"event": "settings"'


def _event(line: bytes) -> Any:
    try:
        return json.loads(line).get("event")
    except (ValueError, AttributeError, RecursionError):
        return None


def _other(former: dict[str, Any], present: dict[str, Any], within: str = "") -> list[str]:
    """Which of the present settings are others in a log. What is not there counts as None; what is there beside them is
    somebody's."""
    found = []
    for key, value in present.items():
        old = former.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _other(old, value, f"{within}{key}.")
        elif old != value:
            found.append(within + key)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
