"""Hand-written optimizers as a good practitioner tunes them: what a learned optimizer is compared with.

Heavy ball, NAG, RMSprop, Adam, AdamW and plain SGD, with learning rate, momenta or betas and schedule searched per
problem for the best *final* loss. (Andrychowicz et al. 2016, section 3, tuned the rate alone, at Torch7's defaults,
which are the defaults of ``run`` and ``make_optimizer``.) The search uses validation tasks, the comparison fresh ones.
Muon ("muon") is there for the evaluation suite; ``compare`` takes it if ``names`` has it.

Reported losses are f at ``p``, the parameters that ``torch.optim`` holds, before each update: ``losses[:, 0]`` is
f(theta_0). For NAG, ``p`` is the look-ahead point theta + momentum v at which the gradient is taken; Torch7 reports it
there too (the two formulations give the same sequence), so the paper's NAG curves are of this kind.
"""

from __future__ import annotations

from .comparing import Baseline, compare
from .rules import NAMES, RULES, Setup, make_optimizer
from .running import final_losses, final_window, run
from .schedules import SCHEDULES
from .searching import Search, search, tune

__all__ = [
    "NAMES",
    "RULES",
    "SCHEDULES",
    "Baseline",
    "Search",
    "Setup",
    "compare",
    "final_losses",
    "final_window",
    "make_optimizer",
    "run",
    "search",
    "tune",
]
