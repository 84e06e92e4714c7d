"""What is shown while a run goes on: the loss and the time left, with tqdm and without, on a terminal and in a file."""

from __future__ import annotations

import io
import re
import sys

import pytest

from l2l_fast.meta.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (60, "1 min"),
        (125, "2 min 5 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h"),
        (3660, "1 h 1 min"),
        (12_345, "3 h 25 min"),
        (86_400, "1 d"),
        (190_000, "2 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch, enabled: bool = True) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    display = Progress("training", 4, 1, enabled, every=0.0)
    for episode in (2, 3, 4):
        display.update(episode, f"final loss {episode / 10}")
    display.close()
    return stream.getvalue()


def test_lines_where_nobody_watches(monkeypatch):
    lines = shown(io.StringIO(), monkeypatch).splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"training: episode 2/4, final loss 0.2, \S+ s/episode, \d+ s left", lines[0])
    assert lines[2].startswith("training: episode 4/4, final loss 0.4") and lines[2].endswith(", 0 s left")


def test_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    text = shown(Terminal(), monkeypatch)
    assert "training" in text and "4/4" in text and "final loss 0.4" in text and "\r" in text


def test_lines_on_a_terminal_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(shown(Terminal(), monkeypatch).splitlines()) == 3


def test_nothing_if_it_is_quiet(monkeypatch):
    assert shown(io.StringIO(), monkeypatch, enabled=False) == shown(Terminal(), monkeypatch, enabled=False) == ""
