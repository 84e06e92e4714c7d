"""The evaluation suite: how good a general-purpose optimizer is on networks that it was not made for.

Sixteen small networks, three seeds each, 1,000 and 10,000 steps, beside Adam, AdamW, NAG and Muon tuned for each
network::

    python -m l2l_fast suite mnist-mlp torch.optim.RMSprop:lr=1e-3

In Python, with any function ``(parameters, total_steps) -> Optimizer``::

    outcome = suite.evaluate(suite.Contender("mine", make), steps=1000)
    print(suite.text([outcome]))
"""

from __future__ import annotations

from .contenders import Contender, parse
from .evaluating import baselines, evaluate
from .keeping import Keeper, MissingRun
from .material import Folder
from .networks import NETWORKS, Network, choose, seeds
from .outcome import Outcome, measure
from .report import network_table, text
from .store import Store, ship
from .tuning import Baselines

__all__ = [
    "NETWORKS",
    "Baselines",
    "Contender",
    "Folder",
    "Keeper",
    "MissingRun",
    "Network",
    "Outcome",
    "Store",
    "baselines",
    "choose",
    "evaluate",
    "measure",
    "network_table",
    "parse",
    "seeds",
    "ship",
    "text",
]
