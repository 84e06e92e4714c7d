"""Progress display: tqdm where it is installed and somebody watches, plain lines otherwise."""

from __future__ import annotations

import sys
import time


class Progress:
    """Shows how far a run is; ``update`` per episode, ``close`` at the end. Writes to stderr."""

    def __init__(self, label: str, total: int, start: int, enabled: bool, every: float = 15.0) -> None:
        self._label, self._total, self._every = label, total, every
        self._enabled = enabled
        self._begin = self._last = time.monotonic()
        self._start = start
        self._bar = None
        if enabled and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=start, desc=label, unit="episode", dynamic_ncols=True)

    def update(self, episode: int, note: str) -> None:
        """``episode`` episodes are done; ``note`` says how it goes."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(episode - self._bar.n)
        elif self._enabled and (time.monotonic() - self._last >= self._every or episode == self._total):
            self._last = time.monotonic()
            rate = (self._last - self._begin) / max(episode - self._start, 1)
            left = rate * (self._total - episode)
            print(
                f"{self._label}: episode {episode}/{self._total}, {note}, {rate:.3g} s/episode, {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """In the two largest units: "7 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    whole = round(seconds)
    for name, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def note(text: str, enabled: bool) -> None:
    """A line on stderr."""
    if enabled:
        print(text, file=sys.stderr, flush=True)
