"""Test tasks that nobody has looked at: seeds that only an entry in the ledger of evidence opens.

Results on tasks that were seen while an optimizer was made are too good, even if no single choice was made on them. So
every release has a range of seeds of its own, which :meth:`Problem.sample` refuses to everybody, whatever the split,
but to the one command that writes down what it evaluates (:mod:`l2l_fast.evaluation.experiments.evidence`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# In order; a release gets a new range by being added here. The draft's was spent while the measuring was made.
RELEASES = ("0.2-draft", "0.2")
_FIRST = 1 << 64  # above all that a trainer draws (meta.protocol.episode_seed)
_EACH = 1_000_000  # seeds of one release

_open: ContextVar[str | None] = ContextVar("l2l_fast_sealed_open", default=None)


class SealedError(ValueError):
    """A sealed test task was asked for outside of the command that records it."""


def seeds(count: int, release: str = RELEASES[-1]) -> range:
    """The first ``count`` sealed seeds of a release.

    Raises:
        ValueError: there is no such release, or it has not so many.
    """
    if release not in RELEASES:
        raise ValueError(f"release: expected one of {RELEASES}, got {release!r}")
    if not 0 < count <= _EACH:
        raise ValueError(f"count: expected 1..{_EACH} sealed tasks, got {count!r}")
    first = _FIRST + _EACH * RELEASES.index(release)
    return range(first, first + count)


def release_of(seed: int) -> str | None:
    """The release whose sealed range holds ``seed``; "" of one still to come; None: the seed is not sealed."""
    if seed < _FIRST:
        return None
    index = (seed - _FIRST) // _EACH
    return RELEASES[index] if index < len(RELEASES) else ""


def check(seed: int) -> None:
    """Raise SealedError if the task ``seed`` is sealed and its release not open."""
    release = release_of(seed)
    if release is not None and release != _open.get():
        raise SealedError(
            f"seed {seed} is a sealed test task{f' of release {release}' if release else ''}: it serves to measure a "
            "finished optimizer once, by `python -m l2l_fast evidence`, and nothing may be chosen on it; take seeds "
            f"below {_FIRST} and the split 'validation' to choose, 'test' to look"
        )


def refuse(seed: int) -> None:
    """Raise SealedError if the task ``seed`` is sealed, opened or not: for whatever chooses."""
    if release_of(seed) is not None:
        raise SealedError(f"seed {seed} is a sealed test task: nothing may be chosen on it")


@contextmanager
def opened(release: str) -> Iterator[None]:
    """Inside, the sealed tasks of that release can be sampled: for the command that writes the ledger."""
    if release not in RELEASES:
        raise ValueError(f"release: expected one of {RELEASES}, got {release!r}")
    token = _open.set(release)
    try:
        yield
    finally:
        _open.reset(token)
