"""Several baselines, tuned on validation tasks, on the same fresh test tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...problems import sealed
from ...problems.base import Problem, seeds_of
from .rules import NAMES, check_name
from .running import run
from .searching import Search, search


@dataclass(frozen=True)
class Baseline:
    """A tuned optimizer's result: its search, and its losses (see ``run``) on the test tasks."""

    search: Search
    losses: torch.Tensor


def compare(
    problem: Problem,
    horizon: int,
    seeds: Iterable[int],
    *,
    names: Iterable[str] = NAMES,
    tuning_seeds: Iterable[int] = range(10),
    search_options: Mapping[str, Any] | None = None,
    split: str = "test",
    device: torch.device | str | None = None,
    cache: str | os.PathLike[str] | None = None,
    on_trial: Callable[[str, float, float], None] | None = None,
) -> dict[str, Baseline]:
    """Tune each optimizer on validation tasks (``tuning_seeds``), then run it on the tasks
    ``seeds`` of ``split``.

    Args:
        search_options: further arguments of :func:`search`.
        cache: a folder that keeps the searches' trials, a file for each name.
        on_trial: called with (name, learning rate, mean final loss) after every trial of a search.

    Raises:
        ValueError, RuntimeError: see ``search`` and ``run``.
    """
    seeds, tuning_seeds = seeds_of("seeds", seeds), seeds_of("tuning_seeds", tuning_seeds)
    for seed in seeds:
        sealed.check(seed)  # now, not after the searches
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names: expected some of {NAMES}, got {names!r}")
    names = list(names)
    if not names:
        raise ValueError(f"names: expected at least one of {NAMES}, got none")
    for name in names:
        check_name(name)
    results = {}
    for name in names:
        report = None if on_trial is None else _bind(on_trial, name)
        kept = None if cache is None else Path(os.fsdecode(cache)) / f"{name}.jsonl"
        options = {**(search_options or {}), "cache": kept, "device": device, "on_trial": report}
        found = search(problem, name, horizon, seeds=tuning_seeds, **options)
        losses = run(
            problem,
            name,
            found.lr,
            seeds,
            horizon,
            options=found.options,
            schedule=found.schedule,
            split=split,
            device=device,
        )
        results[name] = Baseline(found, losses)
    return results


def _bind(on_trial: Callable[[str, float, float], None], name: str) -> Callable[[float, float], None]:
    return lambda lr, loss: on_trial(name, lr, loss)
