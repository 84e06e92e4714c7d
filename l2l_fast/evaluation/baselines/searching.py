"""The search of a baseline's hyper-parameters, wide first, then fine.

1. The default options at a constant rate, from 1e-6 to 1e2 in half decades: the whole range, because losses have
   several minima (a plateau is one at small rates).
2. Every combination of the options' first values, around the best rate; then every schedule for each.
3. Further values of the options beside the best combination, until none beside it is better.
4. The few best combinations on all tuning tasks, the rate to an eighth of a decade; once more what is beside the
   best of them, until none beside it is better; its rate to a sixteenth of a decade.

1 to 3 see the first of the tuning tasks only. Rates go on where the best lies at an edge.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels import checks
from ...kernels.checks import positive_int
from ...problems import sealed
from ...problems.base import SPLITS, Problem, horizon_of, seeds_of
from .rules import RULES, Setup, check_name, options_of
from .schedules import SCHEDULES
from .trials import Trial, Trials

_SWEEP = (-6, 2)  # powers of ten
_AROUND = 1.5  # decades to either side, where the options differ from the default
_LIMIT = (-9.0, 5.0)
_FINALISTS = 4

Cell = tuple[tuple[float, ...], str]  # values of the options; schedule


@dataclass(frozen=True)
class Search:
    """A finished search.

    Attributes:
        name: of the optimizer.
        lr, options, schedule: its best setting.
        final: the mean final loss there over all tuning tasks, start: the mean f(theta_0).
        final_losses: of every learning rate tried with those options and that schedule on all tuning tasks, in rising
            order.
        trials: how many there were.
    """

    name: str
    lr: float
    final_losses: dict[float, float]
    options: dict[str, float]
    schedule: str
    final: float
    start: float
    trials: int

    @property
    def setup(self) -> Setup:
        """The best setting."""
        return Setup(self.lr, self.options, self.schedule)


def search(
    problem: Problem,
    name: str,
    horizon: int,
    *,
    seeds: Iterable[int] = range(10),
    options: Mapping[str, float] | None = None,
    schedules: Iterable[str] = SCHEDULES,
    points_per_decade: int = 16,
    sweep_tasks: int = 2,
    split: str = "validation",
    device: torch.device | str | None = None,
    cache: str | os.PathLike[str] | None = None,
    on_trial: Callable[[float, float], None] | None = None,
) -> Search:
    """Find the setting with the lowest mean final loss on the tasks ``seeds`` of ``split``.

    Final: the mean of the last 5 % of the losses. All settings see the same tasks. A mean with a diverged run is +inf.

    Args:
        options: fixed hyper-parameters, so that only rate and schedule are searched; default: they are searched too.
        schedules: some of "constant", "cosine", "linear", "hold".
        points_per_decade: of the learning rate, at the end.
        sweep_tasks: the first so many of ``seeds`` are used until the last stage.
        cache: a file that keeps every trial; the same search with the same file goes on where it was.
        on_trial: called with (learning rate, mean final loss) after every trial, for a progress display.

    Raises:
        ValueError, TypeError: an argument is out of range, see :func:`run`; a sealed seed, wherever that comes from; or
            ``cache`` is a file of another kind.
        RuntimeError: the best setting lies at an edge of what can be tried (rates 1e-9 to 1e5), or does not end below
            f(theta_0).
    """
    check_name(name)
    positive_int("sweep_tasks", sweep_tasks)
    horizon, seeds = horizon_of(horizon), seeds_of("seeds", seeds)
    for seed in seeds:
        sealed.refuse(seed)
    schedules = list(schedules) if isinstance(schedules, Iterable) and not isinstance(schedules, str) else [schedules]
    for each in schedules or [""]:  # none at all is an error, too
        checks.one_of("schedules", each, SCHEDULES)
    fixed = None if options is None else tuple(options_of(name, options).values())
    resolution = positive_int("points_per_decade", points_per_decade)
    checks.one_of("split", split, SPLITS)
    path = None if cache is None else Path(os.fsdecode(cache))
    trials = Trials(problem, name, horizon, seeds, split, device, path)
    searcher = _Searcher(trials, fixed, list(dict.fromkeys(schedules)), resolution, sweep_tasks, on_trial)
    return searcher.search()


class _Searcher:
    """Learning rates are whole numbers here, of ``resolution`` to a decade."""

    def __init__(
        self,
        trials: Trials,
        fixed: tuple[float, ...] | None,
        schedules: list[str],
        resolution: int,
        sweep_tasks: int,
        on_trial: Callable[[float, float], None] | None,
    ) -> None:
        self.trials, self.schedules, self.resolution, self.on_trial = trials, schedules, resolution, on_trial
        self.rule = RULES[trials.name]
        self.start = tuple(self.rule.defaults().values()) if fixed is None else fixed
        self.options = self.rule.options if fixed is None else ()
        self.few, self.all = min(sweep_tasks, len(trials.seeds)), len(trials.seeds)
        self.coarse = max(1, resolution // 2)
        self.best: dict[Cell, int] = {}  # the best rate of every combination tried, on few tasks
        # The wide sweep is made at the first of the schedules asked for, a constant rate if that is among them.
        self.first = "constant" if "constant" in schedules else schedules[0]

    def search(self) -> Search:
        self._sweep()
        for values in itertools.product(*(option.first for option in self.options)) if self.options else ():
            self._explore(values)
        self._walk()
        cell, key = self._finals()
        return self._checked(cell, key)

    # ---- stages ----

    def _sweep(self) -> None:
        """1."""
        low, high = (edge * self.resolution for edge in _SWEEP)
        cell, found, diverged = (self.start, self.first), {}, 0
        for key in range(low, high + 1, self.coarse):
            found[key] = self.score(cell, key)
            diverged = diverged + 1 if math.isinf(found[key]) else 0
            if diverged == 2 and min(found.values()) < math.inf:
                break  # larger rates diverge as well
        self.best[cell] = self.settle(cell, min(found, key=found.__getitem__), self.few)
        self._schedules(self.start, self.best[cell])

    def _explore(self, values: tuple[float, ...]) -> None:
        """2, for one combination."""
        if (values, self.first) in self.best:
            return
        centre = self.best[self.start, self.first]
        reach = round(_AROUND * self.resolution / self.coarse) * self.coarse
        found = {
            key: self.score((values, self.first), key)
            for key in range(centre - reach, centre + reach + 1, self.coarse)
            if self.within(key)
        }
        best = min(found, key=found.__getitem__)
        self.best[values, self.first] = self.settle((values, self.first), best, self.few)
        self._schedules(values, self.best[values, self.first])

    def _schedules(self, values: tuple[float, ...], key: int) -> None:
        """Every schedule with these options, from the rate ``key`` on."""
        for schedule in self.schedules:
            if (values, schedule) not in self.best:
                self.best[values, schedule] = self.settle((values, schedule), key, self.few)

    def _walk(self) -> None:
        """3."""
        seen: set[Cell] = set()
        while (cell := self._ranked()[0]) not in seen:
            seen.add(cell)
            for near in self.beside(cell):
                if near not in self.best:
                    self.best[near] = self.settle(near, self.best[cell], self.few)
            if self._ranked()[0] == cell:  # nothing beside it is better: perhaps with another schedule
                self._schedules(cell[0], self.best[cell])

    def _finals(self) -> tuple[Cell, int]:
        """4."""
        finals: dict[Cell, int] = {}
        fine = max(1, self.resolution // 8)

        def ranked() -> list[Cell]:
            return sorted(finals, key=lambda cell: self.score(cell, finals[cell], self.all))

        for cell in self._ranked()[:_FINALISTS]:
            finals[cell] = self.settle(cell, self.best[cell], self.all, fine)
        while True:
            winner = ranked()[0]
            new = [near for near in self.beside(winner) if near not in finals]
            for near in new:
                finals[near] = self.settle(near, finals[winner], self.all, fine)
            if ranked()[0] == winner:
                return winner, self.settle(winner, finals[winner], self.all, 1)

    # ---- parts of them ----

    def _ranked(self) -> list[Cell]:
        return sorted(self.best, key=lambda cell: self.score(cell, self.best[cell]))

    def climb(self, cell: Cell, key: int, step: int, tasks: int) -> int:
        """The rate that is better than its neighbours ``step`` away, uphill or down from ``key``. Among equals the
        smallest, so that it goes down where every run diverges."""
        while True:
            near = {k: self.score(cell, k, tasks) for k in (key - step, key, key + step) if self.within(k)}
            best = min(near, key=lambda k: (near[k], k))
            if best == key or not self.within(best + (best - key)):
                return best
            key = best

    def settle(self, cell: Cell, key: int, tasks: int, finest: int | None = None) -> int:
        """The best rate near ``key``, in smaller and smaller steps down to ``finest``."""
        step, finest = self.coarse, max(1, self.resolution // 4) if finest is None else finest
        while True:
            key = self.climb(cell, key, step, tasks)
            if step <= finest:
                return key
            step = max(finest, step // 2)

    def beside(self, cell: Cell) -> list[Cell]:
        """The combinations with one option's next lower or higher value."""
        values, schedule = cell
        found = []
        for k, option in enumerate(self.options):
            at = option.values.index(values[k])
            for value in option.values[max(0, at - 1) : at] + option.values[at + 1 : at + 2]:
                found.append(((*values[:k], value, *values[k + 1 :]), schedule))
        return found

    def score(self, cell: Cell, key: int, tasks: int | None = None) -> float:
        trial = self.trial(cell, key, self.few if tasks is None else tasks)
        return trial.final

    def trial(self, cell: Cell, key: int, tasks: int) -> Trial:
        before = len(self.trials.done)
        trial = self.trials(self.named(cell), cell[1], self.rate(key), tasks)
        if self.on_trial is not None and len(self.trials.done) > before:
            self.on_trial(trial.lr, trial.final)
        return trial

    def named(self, cell: Cell) -> dict[str, float]:
        return dict(zip(self.rule.defaults(), cell[0]))

    def rate(self, key: int) -> float:
        return 10.0 ** (key / self.resolution)

    def within(self, key: int) -> bool:
        return _LIMIT[0] <= key / self.resolution <= _LIMIT[1]

    def _checked(self, cell: Cell, key: int) -> Search:
        name, problem = self.trials.name, self.trials.problem.name
        found = self.trial(cell, key, self.all)
        if not (self.within(key - 1) and self.within(key + 1)) or math.isinf(found.final):
            raise RuntimeError(
                f"no best learning rate for {name} on {problem} between 1e{_LIMIT[0]:.0f} and 1e{_LIMIT[1]:.0f}: "
                f"the lowest mean final loss, {found.final:g}, is at the edge {self.rate(key):g}"
            )
        for k, option in enumerate(self.options):
            at = option.values.index(cell[0][k])
            # Over so few steps a higher momentum would forget no less: there is nothing beyond the highest.
            short = 0.0 < self.trials.horizon * (1.0 - cell[0][k]) < 0.1
            open_above = option.open_above or short
            if (at == 0 and not option.open_below) or (at == len(option.values) - 1 and not open_above):
                raise RuntimeError(
                    f"no best {option.name} for {name} on {problem}: the lowest mean final loss, {found.final:g}, is "
                    f"at the edge {cell[0][k]:g}"
                )
        if not found.final < found.start:
            raise RuntimeError(
                f"no setting of {name} on {problem} improves on theta_0: the lowest mean final loss is "
                f"{found.final:g}, f(theta_0) {found.start:g}"
            )
        rates = {
            trial.lr: trial.final
            for trial in self.trials.done.values()
            if (tuple(trial.options.values()), trial.schedule, trial.tasks) == (*cell, self.all)
        }
        return Search(
            name,
            found.lr,
            {lr: rates[lr] for lr in sorted(rates)},
            self.named(cell),
            cell[1],
            found.final,
            found.start,
            len(self.trials.done),
        )


def tune(problem: Problem, name: str, horizon: int, **options: object) -> float:
    """The best learning rate; ``search(...).lr``, with the same arguments and errors."""
    return search(problem, name, horizon, **options).lr  # type: ignore[arg-type]
