"""The suite's baselines: Adam, AdamW, NAG and Muon, tuned network by network, and their runs on the test seeds.

- Rates are half decades. At up to 1,000 steps Adam (constant and cosine) is tried at all of 1e-5..1e-1 and NAG
  (constant) at all of 1e-4..1e1; beyond an end that is the best, further rates follow until a neighbour is worse.
- The other searches begin at a rate found before and walk until both neighbours are worse: AdamW and Muon at Adam's,
  NAG with cosine at NAG's, and everything else at more than 1,000 steps at the best of 1,000.
- All on TUNING_SEED, for the lowest final loss. Hopeless runs are given up.
- AdamW has weight decay 0.01, NAG momentum 0.9, betas are torch's; Muon is that of :class:`~..baselines.muon.Muon`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from ..baselines.rules import RULES, make_optimizer
from .curves import Run
from .keeping import Keeper
from .networks import TUNING_SEED, Network

SWEPT_STEPS = 1000  # searches of longer runs begin where this one ended
_SWEEPS = {"adam": (-10, -2), "nag": (-8, 2)}  # in half decades: 1e-5..1e-1, 1e-4..1e1
_LIMITS = (-14, 6)  # no rate beyond 1e-7 and 1e3


@dataclass(frozen=True)
class Setting:
    """A hand-written optimizer: its rule ("adam", "adamw", "nag", "muon"), schedule and rate."""

    rule: str
    schedule: str
    lr: float

    def __call__(self, parameters: Iterable[nn.Parameter], steps: int) -> Optimizer:
        return make_optimizer(self.rule, parameters, self.lr)

    def describe(self) -> str:
        """As tables have it."""
        return f"{RULES[self.rule].label} {self.lr:.3g}" + ("" if self.schedule == "constant" else f" {self.schedule}")


@dataclass(frozen=True)
class Tuned:
    """What a search has found; ``edge``: the best rate had no worse neighbour on one side."""

    setting: Setting
    final: float
    edge: bool
    tried: dict[float, float]


def rate(half_decade: int) -> float:
    """10^(half_decade / 2), to three digits: 0.001, 0.00316."""
    return float(f"{10 ** (half_decade / 2):.3g}")


# The order in which they are measured, so that what matters most is there first.
STAGES: tuple[tuple[str, str], ...] = (
    ("adam", "constant"),
    ("adam", "cosine"),
    ("adamw", "cosine"),
    ("adamw", "constant"),
    ("nag", "constant"),
    ("nag", "cosine"),
    ("muon", "cosine"),
    ("muon", "constant"),
)
USUAL = Setting("adam", "constant", 1e-3)


@dataclass
class Baselines:
    """Finds and runs the baselines; the keeper says whether what is missing is made."""

    keeper: Keeper

    def measure(self, network: Network, setting: Setting, seed: int, steps: int) -> Run:
        """The setting's run from that seed; from TUNING_SEED one of a search."""
        return self.keeper.run(
            network,
            seed,
            steps,
            setting,
            setting.rule,
            options={"lr": setting.lr},
            schedule=setting.schedule,
            search=seed == TUNING_SEED,
        )

    def search(self, network: Network, rule: str, schedule: str, steps: int) -> Tuned:
        """The best rate on the tuning seed."""
        tried: dict[int, float] = {}

        def final(half: int) -> float:
            if half not in tried:
                setting = Setting(rule, schedule, rate(half))
                tried[half] = self.measure(network, setting, TUNING_SEED, steps).final
            return tried[half]

        begin = self._begin(network, rule, schedule, steps)
        if begin is None:
            low, high = _SWEEPS[rule]
            begin = min(range(low, high + 1), key=final)
        final(begin)
        best = _walk(begin, final, tried)
        setting = Setting(rule, schedule, rate(best))
        edge = not all(half in tried and tried[half] > tried[best] for half in (best - 1, best + 1))
        return Tuned(setting, tried[best], edge, {rate(half): tried[half] for half in sorted(tried)})

    def _begin(self, network: Network, rule: str, schedule: str, steps: int) -> int | None:
        """Where a search begins, in half decades; None: with a sweep."""
        if rule in ("adamw", "muon"):
            known = self.search(network, "adam", schedule, steps)
        elif steps > SWEPT_STEPS:
            known = self.search(network, rule, schedule, SWEPT_STEPS)
        elif rule == "nag" and schedule != "constant":
            known = self.search(network, rule, "constant", steps)
        else:
            return None
        return round(2 * math.log10(known.setting.lr))

    def tested(self, network: Network, rule: str, schedule: str, steps: int, seeds: Iterable[int]) -> list[Run]:
        """The tuned setting's runs on the test seeds."""
        setting = self.search(network, rule, schedule, steps).setting
        return [self.measure(network, setting, seed, steps) for seed in seeds]

    def usual(self, network: Network, steps: int, seeds: Iterable[int]) -> list[Run]:
        """The runs of Adam at 1e-3, as nobody has tuned it."""
        return [self.measure(network, USUAL, seed, steps) for seed in seeds]

    def everything(
        self, networks: Iterable[Network], lengths: Iterable[int], seeds: Iterable[int]
    ) -> Iterator[tuple[int, str, str, Network]]:
        """Make all that is missing, stage by stage for all networks; yields what is done."""
        networks, seeds = list(networks), list(seeds)
        for steps in sorted(lengths):
            for rule, schedule in STAGES:
                for network in networks:
                    self.tested(network, rule, schedule, steps, seeds)
                    if (rule, schedule) == STAGES[0]:
                        self.usual(network, steps, seeds)
                    yield steps, rule, schedule, network


def _walk(best: int, final: Callable[[int], float], tried: dict[int, float]) -> int:
    """From ``best`` towards lower finals until both neighbours are worse; down first, which is where longer runs go."""
    moved = True
    while moved:
        moved = False
        for neighbour in (best - 1, best + 1):
            if _LIMITS[0] <= neighbour <= _LIMITS[1] and final(neighbour) < final(best):
                best, moved = neighbour, True
                break
    return best
