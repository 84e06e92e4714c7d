"""Sequences of symbols to be continued: copying, counting, Markov chains, and characters of a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.text import VOCABULARY, load_text
from .draws import Draw
from .layers import Theta, cross_entropy
from .optimizee import Source
from .sources import Rows, Windows

SEQUENCES = 2048


@dataclass(frozen=True)
class Material:
    """What a language model is given: int64 ``[K, batch, length + 1]`` of ``symbols`` symbols.

    Only the predictions of places ``first`` and later count: what comes before cannot be known.
    """

    source: Source
    symbols: int
    length: int
    first: int
    label: str


def next_symbol_losses(logits: Tensor, symbols: Tensor, first: int) -> Tensor:
    """Cross-entropies ``[K]`` of logits ``[K, batch, length, symbols]`` for the next of symbols
    ``[K, batch, length + 1]``; the symbols from place ``first`` on count."""
    return cross_entropy(logits[:, :, first - 1 :].flatten(1, 2), symbols[:, :, first:].flatten(1))


def material(draw: Draw, split: str) -> Material:
    """Text in half the cases."""
    kind = draw.one_of((_text, _copying, _counting, _markov), (3.0, 1.0, 1.0, 1.0))
    return kind(draw, split)


def text_material(draw: Draw, split: str, name: str) -> Material:
    """Windows of a text of the package."""
    length = draw.log_whole(8, 24)
    source = Windows(load_text(name), split, _batch(draw, length), length)
    return Material(source, VOCABULARY, length, 1, f"{name}, length {length}, batch {source.batch}")


def _text(draw: Draw, split: str) -> Material:
    return text_material(draw, split, "asv-genesis-luke")


def _copying(draw: Draw, split: str) -> Material:
    """Random symbols, a delimiter, the same symbols again (Graves et al. 2014, section 4.1)."""
    symbols, half = draw.log_whole(4, 24), draw.log_whole(3, 10)
    word = draw.below(symbols, SEQUENCES, half)
    rows = torch.cat((word, torch.full((SEQUENCES, 1), symbols, device="cpu"), word), 1)
    return _rows(draw, rows, symbols + 1, half + 1, "copying")


def _counting(draw: Draw, split: str) -> Material:
    """Start and step are random: the third symbol can be known. Some symbols are replaced by random ones."""
    symbols, length = draw.log_whole(8, 32), draw.log_whole(8, 24)
    steps = min(symbols - 1, draw.log_whole(2, 8))
    start, step = draw.below(symbols, SEQUENCES, 1), 1 + draw.below(steps, SEQUENCES, 1)
    rows = (start + step * torch.arange(length + 1, device="cpu")) % symbols
    noise = draw.uniform(0.0, 0.2) if draw.chance(0.5) else 0.0
    rows = torch.where(draw.rand(*rows.shape) < noise, draw.below(symbols, *rows.shape), rows)
    return _rows(draw, rows, symbols, 2, "counting")


def _markov(draw: Draw, split: str) -> Material:
    """A chain with random transitions, from nearly uniform to nearly certain ones."""
    symbols, length = draw.log_whole(8, 32), draw.log_whole(8, 24)
    transitions = (draw.normal(symbols, symbols) * draw.log_uniform(0.7, 4.0)).softmax(1).cumsum(1)
    state = draw.below(symbols, SEQUENCES)
    states = [state]
    for place in draw.rand(length, SEQUENCES, 1):
        # The sums end just below one at times.
        state = (transitions[state] < place).sum(1).clamp_(max=symbols - 1)
        states.append(state)
    return _rows(draw, torch.stack(states, 1), symbols, 1, "Markov chain")


def _rows(draw: Draw, rows: Tensor, symbols: int, first: int, label: str) -> Material:
    length = rows.shape[1] - 1
    source = Rows((rows.contiguous(),), _batch(draw, length))
    label = f"{label}, {symbols} symbols, length {length}, batch {source.batch}"
    return Material(source, symbols, length, first, label)


def _batch(draw: Draw, length: int) -> int:
    # At most 256 symbols per problem: short sequences in large batches or long ones in small batches.
    return draw.log_whole(4, max(8, min(32, 256 // length)))


def logits(theta: Theta, name: str, hidden: Tensor) -> Tensor:
    """``[K, batch, length, symbols]`` of hidden states ``[K, batch, length, width]``, by a linear layer."""
    flat = hidden.flatten(1, 2)
    weight, bias = theta[f"{name}_weight"], theta[f"{name}_bias"]
    return torch.baddbmm(bias.unsqueeze(1), flat, weight.transpose(1, 2)).unflatten(1, hidden.shape[1:3])
