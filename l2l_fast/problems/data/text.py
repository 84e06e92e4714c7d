"""Two public-domain texts in the package, as symbols: English prose of 1901 and, of another kind, of about 1395.

``asv-genesis-luke``: Genesis and Luke in the American Standard Version; ``wycliffe-john``: John in Wycliffe's Bible.
Sources, changes and checksums are in ``l2l_fast/problems/data/text/README.md``.

A text is cut into blocks of 2,048 characters. Of every six neighbouring blocks four are for training, one is for
validation and one for test, so that the splits are disjoint and alike; nothing is read across two blocks.
"""

from __future__ import annotations

import hashlib
import lzma
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TEXTS = {
    "asv-genesis-luke": "546065d32d4cd834615a8c2e690f1000acd9df02ccbe496ee42c7caedb4d581f",
    "wycliffe-john": "8c967be28f93341ea2ffddb6f2341ec7771a00b03fe00d5bab811e3e0e38000f",
}
BLOCK = 2048
# Case is folded: capitals would add a third to the vocabulary and are 3 % of the characters. The last symbol stands
# for every character that is not listed.
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz.,:;'?!-()"
VOCABULARY = len(ALPHABET) + 1
_PARTS = {"train": (0, 1, 2, 4), "validation": (3,), "test": (5,)}
_FOLDER = Path(__file__).parent / "text"

_loaded: dict[str, Text] = {}
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Text:
    """A text as symbols: ``splits[split]`` int64 ``[blocks, 2048]`` with values below ``VOCABULARY``. One per process,
    never written to; copies are the same object and pickles hold its name alone."""

    name: str
    splits: dict[str, Tensor]

    def split(self, split: str) -> Tensor:
        """The blocks of "train", "validation" or "test"; ValueError if there is no such split."""
        if split not in self.splits:
            raise ValueError(f"split must be one of {tuple(self.splits)}, got {split!r}")
        return self.splits[split]

    def __deepcopy__(self, memo: dict[int, Any]) -> Text:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return load_text, (self.name,)


def load_text(name: str = "asv-genesis-luke") -> Text:
    """A text of the package; read, checked and kept in memory once per process.

    Raises:
        ValueError: there is no text of that name, or its file is damaged (SHA-256 of its uncompressed contents).
        FileNotFoundError: its file is missing.
    """
    if not isinstance(name, str) or name not in TEXTS:
        raise ValueError(f"name must be one of {tuple(TEXTS)}, got {name!r}")
    with _lock:
        if name not in _loaded:
            symbols = encode(_read_checked(_FOLDER / f"{name}.txt.xz", TEXTS[name]))
            blocks = symbols[: len(symbols) // BLOCK * BLOCK].view(-1, BLOCK)
            place = torch.arange(len(blocks), device="cpu") % 6
            splits = {
                split: blocks[torch.isin(place, torch.tensor(parts, device="cpu"))].contiguous()
                for split, parts in _PARTS.items()
            }
            _loaded[name] = Text(name, splits)
        return _loaded[name]


def encode(text: str) -> Tensor:
    """Symbols int64 ``[characters]`` of a text in ASCII; case is folded, what the alphabet lacks is the last symbol.

    Raises:
        ValueError: a character is not ASCII.
    """
    try:
        codes = np.frombuffer(text.lower().encode("ascii"), dtype=np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be ASCII, got {text[error.start]!r} at {error.start}") from None
    table = np.full(128, len(ALPHABET), dtype=np.int64)
    for symbol, character in enumerate(ALPHABET):
        table[ord(character)] = symbol
    return torch.from_numpy(table[codes])


def decode(symbols: Tensor) -> str:
    """The characters of ``symbols`` int64 ``[n]``; the last symbol is "~"."""
    return "".join((ALPHABET + "~")[symbol] for symbol in symbols.tolist())


def _read_checked(path: Path, sha256: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: a text of the package is missing; install it again")
    try:
        contents = lzma.decompress(path.read_bytes())
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    found = hashlib.sha256(contents).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: the SHA-256 of its uncompressed contents is {found}, expected {sha256}")
    return contents.decode("ascii")
