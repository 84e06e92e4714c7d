"""Trained optimizers that come with the package: ``load_pretrained("mnist-mlp")``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import trained

_FOLDER = Path(__file__).parent
_SUFFIX = ".safetensors"


def names() -> tuple[str, ...]:
    """The names that :func:`load_pretrained` knows."""
    return tuple(sorted(path.name[: -len(_SUFFIX)] for path in _FOLDER.glob(f"*{_SUFFIX}")))


def path_of(name: str) -> Path:
    """The file of a pretrained optimizer.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"name: expected one of {names()}, got {name!r}")
    return _FOLDER / f"{name}{_SUFFIX}"


def load_pretrained(name: str, device: torch.device | str = "cpu") -> Any:
    """A trained optimizer by name: a :class:`l2l_fast.CoordinatewiseLSTM`, or an ``nn.ModuleDict`` of them where there
    is one per kind of parameter (their names are the kinds, for the groups of :class:`l2l_fast.LearnedOptimizer`).

    It carries the record of its training: :func:`l2l_fast.meta.record_of`.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    return trained.load(path_of(name), device)


def list_pretrained() -> dict[str, dict[str, Any]]:
    """What there is: for every name, the training problem (``problem``), its data set (``data``, if it has one), the
    protocol (``horizon``, ``unroll``), the length (``episodes``), how it scored (``score``: mean losses on fresh test
    tasks), and everything else that is known (``record``)."""
    found = {}
    for name in names():
        record = trained.read_record(path_of(name)) or {}
        problem, protocol = record.get("problem", {}), record.get("protocol", {})
        found[name] = {
            "problem": problem,
            "data": problem.get("data"),
            "horizon": protocol.get("horizon"),
            "unroll": protocol.get("unroll"),
            "episodes": record.get("episodes"),
            "score": record.get("score"),
            "record": record,
        }
    return found
