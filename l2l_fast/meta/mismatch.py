"""An evaluation under another protocol than that of the training does not pass unnoticed.

A learned optimizer is good at what it was trained for: its horizon, its minibatches, its output scale.
"""

from __future__ import annotations

import warnings
from typing import Any

from ..networks.record import record_of
from ..networks.several import Networks, config_of
from ..problems import Problem

# Options of a problem that are protocol, not task: a wider optimizee is a transfer, another minibatch is a mistake.
_PROTOCOL_OPTIONS = ("name", "family", "batch_size", "init_std")
_GENERAL = "zoo"


class ProtocolWarning(UserWarning):
    """A network is evaluated under another protocol than it was trained for."""


def mismatches(net: Networks, problem: Problem, horizon: int) -> list[str]:
    """Where an evaluation on ``problem`` over ``horizon`` steps departs from the protocol of the training, in words;
    nothing for a network without a record."""
    record = record_of(net)
    if record is None:
        return []
    lines = []
    trained, present = record.get("problem", {}), problem.config()
    general = trained.get("name") == _GENERAL  # made for problems other than its own
    for option in () if general else _PROTOCOL_OPTIONS:
        if option in trained and option in present and not _same(trained[option], present[option]):
            lines.append(f"problem's {option}: trained with {trained[option]!r}, evaluated with {present[option]!r}")
    longest = record.get("protocol", {}).get("horizon")
    if longest is not None and horizon > longest:
        lines.append(f"horizon: trained for {longest} steps, evaluated over {horizon}")
    network, now = record.get("network", {}), config_of(net)
    for option in sorted({*network} & {*now}):
        if network[option] != now[option]:
            lines.append(f"network's {option}: trained with {network[option]!r}, now {now[option]!r}")
    return lines


def warn_of_mismatch(net: Networks, problem: Problem, horizon: int) -> None:
    """Emit one :class:`ProtocolWarning` that lists all :func:`mismatches`."""
    lines = mismatches(net, problem, horizon)
    if lines:
        warnings.warn("not the protocol of the training: " + "; ".join(lines), ProtocolWarning, stacklevel=3)


def _same(trained: Any, present: Any) -> bool:
    if isinstance(trained, list) and isinstance(present, float):  # trained on a range of values
        return trained[0] <= present <= trained[-1]
    return trained == present
