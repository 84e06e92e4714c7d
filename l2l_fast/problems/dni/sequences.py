"""Copy and repeat copy, with the curriculum that measures how far back a way of training reaches (Jaderberg et al.
2017, section 3.2; the tasks are those of Graves et al. 2014)."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.checks import as_float, flag, integer, positive_int, real


class Episode(NamedTuple):
    """A minibatch of sequences of one length.

    Attributes:
        inputs: float32 ``[steps, batch, CopyTask.inputs]``.
        targets: int64 ``[steps, batch]``, the character to give out; -100 (what cross-entropy ignores) elsewhere.
        scored: number of steps that have a target.
    """

    inputs: Tensor
    targets: Tensor
    scored: int


class CopyTask:
    """Read ``length`` random characters, wait for ``gap`` steps, read a mark, then give them out, ``repeats`` times.

    A character is a one-hot input, the mark an input of its own; while characters are to be given out there is no
    input. In repeat copy the mark says how often (``repeats / 10``), and after the last copy the end sign has to come.

    Args:
        characters: how many there are.
        repeat: repeat copy.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """

    def __init__(self, characters: int = 2, repeat: bool = False) -> None:
        self.characters = positive_int("characters", characters)
        self.repeat = flag("repeat", repeat)
        self.inputs = self.characters + 1
        self.classes = self.characters + self.repeat

    def sample(self, length: int, batch: int, generator: torch.Generator, repeats: int = 1, gap: int = 0) -> Episode:
        """A minibatch; ``repeats`` other than 1 is for repeat copy; in the published tasks there is no gap.

        Raises:
            TypeError, ValueError: an argument is out of its range.
        """
        length, repeats = positive_int("length", length), positive_int("repeats", repeats)
        if repeats != 1 and not self.repeat:
            raise ValueError(f"repeats: expected 1, this is copy and not repeat copy, got {repeats}")
        batch, gap = positive_int("batch", batch), integer("gap", gap, 0)
        text = torch.randint(self.characters, (length, batch), generator=generator, device="cpu")
        scored = length * repeats + self.repeat
        start = length + gap + 1
        inputs = torch.zeros(start + scored, batch, self.inputs, dtype=torch.float32, device="cpu")
        inputs[:length].scatter_(2, text[..., None], 1.0)
        inputs[start - 1, :, -1] = repeats / 10 if self.repeat else 1.0
        targets = torch.full((start + scored, batch), -100, dtype=torch.int64, device="cpu")
        targets[start : start + length * repeats] = text.repeat(repeats, 1)
        if self.repeat:
            targets[-1] = self.characters
        return Episode(inputs, targets, scored)


class Curriculum:
    """Sequences that grow when they are solved: when the mean error of the last ``window`` minibatches of this length
    is below ``threshold`` bits per character. In repeat copy length and number of copies grow in turn.

    Attributes:
        length, repeats: of the sequences to train on now.
        solved: number of characters to give out, ``length * repeats``, of the longest solved; 0 at first.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """

    def __init__(self, repeat: bool = False, threshold: float = 0.15, window: int = 20) -> None:
        self.repeat = flag("repeat", repeat)
        self.threshold = real("threshold", threshold, above=0.0)
        self.length = self.repeats = 1
        self.solved = 0
        self._bits: deque[float] = deque(maxlen=positive_int("window", window))

    def record(self, bits: float) -> bool:
        """Take in a minibatch's error in bits per character; whether that made the sequences grow. A NaN does not.

        Raises:
            TypeError: it is not a number.
        """
        number = as_float(bits)
        if number is None:
            raise TypeError(f"bits: expected a number, got {bits!r}")
        self._bits.append(number)
        full = len(self._bits) == self._bits.maxlen
        if not full or not sum(self._bits) / len(self._bits) < self.threshold:
            return False
        self._bits.clear()
        self.solved = self.length * self.repeats
        if self.repeat and self.length > self.repeats:
            self.repeats += 1
        else:
            self.length += 1
        return True
