"""Trained optimizers that come with the package: ``load_pretrained("mnist-mlp")``."""

from __future__ import annotations

from typing import Any

import torch

from .. import trained
from ..shipped import alike
from ..shipped import names as names
from ..shipped import path_of as path_of


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


def trained_alike(name: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Networks trained as the pretrained optimizer ``name`` was, from other seeds: what a training run gives without a
    choice among several. By seed ("seed 3"); empty where there are none.

    Raises:
        ValueError: there is no pretrained optimizer of that name.
    """
    path_of(name)
    return {seed: trained.load(path, device) for seed, path in alike(name).items()}
