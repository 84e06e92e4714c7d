"""The suite in one call: a contender, its runs kept in a folder if one is given, the baselines of the package."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ...kernels.checks import integer
from .contenders import Contender, parse
from .curves import Run
from .keeping import Keeper
from .material import Folder
from .networks import choose
from .networks import seeds as test_seeds
from .outcome import Outcome, measure
from .store import SHIPPED, Key, Store
from .tuning import Baselines

STEPS = (1000, 10_000)
SEEDS = 3
MIN_STEPS = 20  # so that the last 5 % are a step

OnRun = Callable[[Key, Run], None]


def checked_steps(steps: int) -> int:
    """``steps`` as an int; TypeError, ValueError if it is none or too few for a final loss."""
    return integer("steps", steps, MIN_STEPS)


def baselines(
    folder: Folder, out: str | os.PathLike[str] | None = None, tune: bool = False, on_run: OnRun | None = None
) -> Baselines:
    """The package's baselines, and those in ``out/baselines.jsonl``; with ``tune`` what is missing is measured and
    added there."""
    path = None if out is None else Path(out) / "baselines.jsonl"
    return Baselines(Keeper(Store(path, [SHIPPED]), folder, frozen=not tune, on_run=on_run))


def evaluate(
    contender: Contender | str,
    steps: int = 1000,
    *,
    networks: Iterable[str] | None = None,
    seeds: int = SEEDS,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    tune: bool = False,
    on_run: OnRun | None = None,
) -> Outcome:
    """Measure a contender.

    Args:
        contender: or a text that names one, see :func:`~.contenders.parse`.
        steps: of every run; the package has baselines for 1,000 and 10,000.
        networks: some of the suite's, by name; default: all.
        seeds: how many; the package's baselines have three.
        data: see :meth:`~.material.Folder.named`.
        out: a folder where runs are kept, so that the same call goes on from them.
        tune: measure the baselines that are missing.
        on_run: told of every run that was made.

    Raises:
        ValueError, TypeError: an argument out of range; :class:`~.keeping.MissingRun` (a ValueError) where Adam's
            baselines are missing and ``tune`` is False. FileNotFoundError: no such file or data set.
    """
    contender = parse(contender) if isinstance(contender, str) else contender
    steps, chosen = checked_steps(steps), choose(networks)
    folder, count = Folder.named(data), test_seeds(integer("seeds", seeds, 1))
    keeper = Keeper(Store(None if out is None else Path(out) / "contenders.jsonl"), folder, on_run=on_run)
    return measure(contender, chosen, steps, count, baselines(folder, out, tune, on_run), keeper)
