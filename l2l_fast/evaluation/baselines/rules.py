"""The hand-written optimizers, and what a practitioner would tune of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ...kernels.checks import as_float, chosen
from .muon import Muon


@dataclass(frozen=True)
class Option:
    """A hyper-parameter besides the learning rate.

    Attributes:
        name: as tables and ``make_optimizer`` have it.
        default: Torch7's, so the paper's, where that has the optimizer.
        values: all that a search may try, in rising order.
        first: of which it tries these to begin with, whatever it finds.
        open_below, open_above: the best may be the lowest (highest) value: beyond it the optimizer turns into another
            of the list, or nothing changes any more.
    """

    name: str
    default: float
    values: tuple[float, ...]
    first: tuple[float, ...]
    open_below: bool = False
    open_above: bool = False


@dataclass(frozen=True)
class Rule:
    """An optimizer: its name in tables, how it is made, what is tuned of it."""

    label: str
    make: Callable[..., Optimizer]
    options: tuple[Option, ...] = ()

    def defaults(self) -> dict[str, float]:
        """Every option's default."""
        return {option.name: option.default for option in self.options}


def _sgd(parameters: Iterable[torch.nn.Parameter], lr: float) -> Optimizer:
    return SGD(parameters, lr=lr)


def _momentum(parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float) -> Optimizer:
    return SGD(parameters, lr=lr, momentum=momentum)


def _nag(parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float) -> Optimizer:
    return SGD(parameters, lr=lr, momentum=momentum, nesterov=True)


def _rmsprop(parameters: Iterable[torch.nn.Parameter], lr: float, alpha: float, momentum: float) -> Optimizer:
    return RMSprop(parameters, lr=lr, alpha=alpha, eps=1e-8, momentum=momentum)


# Torch7 adds Adam's eps before the bias correction, PyTorch after it; at 1e-8 only gradients of that size could tell.
# The fused kernel is the same arithmetic without a Python loop.
def _adam(parameters: Iterable[torch.nn.Parameter], lr: float, beta1: float, beta2: float) -> Optimizer:
    return Adam(parameters, lr=lr, betas=(beta1, beta2), eps=1e-8, fused=True)


def _adamw(
    parameters: Iterable[torch.nn.Parameter], lr: float, beta1: float, beta2: float, weight_decay: float
) -> Optimizer:
    return AdamW(parameters, lr=lr, betas=(beta1, beta2), eps=1e-8, weight_decay=weight_decay, fused=True)


def _muon(parameters: Iterable[torch.nn.Parameter], lr: float) -> Optimizer:
    return Muon(parameters, lr=lr)


_LADDER = (0.2, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998)
_MOMENTUM = Option("momentum", 0.9, _LADDER, (0.8, 0.9, 0.95, 0.98), open_below=True)
_BETA1 = Option("beta1", 0.9, (0.0, *_LADDER), (0.8, 0.9, 0.95), open_below=True)
_AVERAGE = (0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999)  # of squares
_BETA2 = Option("beta2", 0.999, _AVERAGE, (0.95, 0.99, 0.999), open_below=True, open_above=True)

RULES: dict[str, Rule] = {
    "sgd": Rule("SGD", _sgd),
    "momentum": Rule("heavy ball", _momentum, (_MOMENTUM,)),
    "nag": Rule("NAG", _nag, (_MOMENTUM,)),
    "rmsprop": Rule(
        "RMSprop",
        _rmsprop,
        (
            Option("alpha", 0.99, _AVERAGE, (0.9, 0.99, 0.999), open_below=True, open_above=True),
            Option("momentum", 0.0, (0.0, *_LADDER), (0.0, 0.9), open_below=True),
        ),
    ),
    "adam": Rule("Adam", _adam, (_BETA1, _BETA2)),
    "adamw": Rule(
        "AdamW",
        _adamw,
        (
            Option("beta1", 0.9, _BETA1.values, (0.9, 0.95), open_below=True),
            Option("beta2", 0.999, _AVERAGE, (0.99, 0.999), open_below=True, open_above=True),
            Option("weight_decay", 0.01, (1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0), (0.01, 0.3), open_below=True),
        ),
    ),
    "muon": Rule("Muon", _muon),
}
# What comparisons on the paper's problems take. Muon is no part of them: it is there for the evaluation suite.
NAMES = tuple(name for name in RULES if name != "muon")


@dataclass(frozen=True)
class Setup:
    """Everything that is tuned of an optimizer."""

    lr: float
    options: dict[str, float] = field(default_factory=dict)
    schedule: str = "constant"

    def describe(self) -> str:
        """In words, as tables have it."""
        parts = [f"lr {self.lr:.3g}", *(f"{key.replace('_', ' ')} {value:g}" for key, value in self.options.items())]
        return ", ".join(parts + ([] if self.schedule == "constant" else [self.schedule]))


def check_name(name: str) -> None:
    """Raise ValueError if there is no baseline of that name."""
    if not chosen(name, RULES):
        raise ValueError(f"name must be one of {tuple(RULES)}, got {name!r}")


def options_of(name: str, given: Mapping[str, Any] | None) -> dict[str, float]:
    """All options of a baseline: those given, the others' defaults.

    Raises:
        ValueError: an option that it does not have, or one that is not in [0, 1) (``weight_decay``: not >= 0).
        TypeError: not a mapping, or a value that is not a number.
    """
    rule = RULES[name]
    if given is None:
        return rule.defaults()
    if not isinstance(given, Mapping):
        raise TypeError(f"options: expected a mapping such as {{'momentum': 0.9}}, got {given!r}")
    found = rule.defaults()
    for key, value in given.items():
        if key not in found:
            raise ValueError(f"options: {name} has {list(found) or 'none'}, got {key!r}")
        number = as_float(value)
        if number is None:
            raise TypeError(f"options: {key} must be a number, got {value!r}")
        if not 0.0 <= number < (math.inf if key == "weight_decay" else 1.0):
            raise ValueError(f"options: {key} out of range, got {value!r}")
        found[key] = number
    return found


def make_optimizer(name: str, parameters: Iterable[torch.nn.Parameter], lr: float, **options: float) -> Optimizer:
    """The ``torch.optim`` optimizer "sgd", "momentum" (heavy ball), "nag", "rmsprop", "adam" or "adamw"; or
    :class:`~.muon.Muon`, "muon".

    Args:
        options: ``momentum``; of RMSprop ``alpha`` and ``momentum``; of Adam ``beta1`` and ``beta2``, of AdamW
            ``weight_decay`` too. Default: Torch7's, which are the paper's.

    Raises:
        ValueError: there is no baseline of that name, ``lr`` is not positive and finite, or an option is out of range.
        TypeError: ``lr`` or an option is not a number.
    """
    check_name(name)
    number = as_float(lr)
    if number is None:
        raise TypeError(f"lr must be a number, got {lr!r}")
    if not 0.0 < number < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    return RULES[name].make(parameters, number, **options_of(name, options))
