"""What a network remembers of its training: the record travels with it, as an attribute, and in the metadata of its
file (:mod:`l2l_fast.networks.trained`)."""

from __future__ import annotations

from typing import Any

from .files import RECORD_ATTRIBUTE
from .several import Networks


def attach(net: Networks, record: dict[str, Any] | None) -> None:
    """Let ``net`` carry ``record`` (see :meth:`l2l_fast.MetaTrainer.record`); None: forget what it carries."""
    object.__setattr__(net, RECORD_ATTRIBUTE, record)


def record_of(net: Networks) -> dict[str, Any] | None:
    """The record that ``net`` carries; None for a network that was built, not trained."""
    return getattr(net, RECORD_ATTRIBUTE, None)
