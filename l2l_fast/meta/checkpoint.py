"""Checkpoints of a meta-training run: one safetensors file with everything that its continuation depends on.

Tensors: ``net.*`` and ``best.*`` (parameters of the present and of the best network), ``adam.{parameter}.{slot}``,
and ``estimator.*``, what the estimator of the meta-gradient carries from episode to episode (nothing, for most); where
the parameters are not the weights (pruned, parametrized, normalised), also ``effective.*``, the best network's weights
themselves, of which a network is made without knowing how they came about. The metadata holds JSON: the settings, which
a resuming trainer must share, and the counters. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..networks import effective, files
from ..networks.record import attach, record_of
from ..networks.several import Networks, build, members
from .estimators import Estimator

FORMAT = files.CHECKPOINT_FORMAT
VERSION = "1"


@dataclass
class Counters:
    """Where a run is: finished episodes, meta-updates left out because their gradient was not finite, and what is known
    of the best network."""

    episode: int = 0
    skipped_updates: int = 0
    best_episode: int | None = None
    best_loss: float | None = None
    validations_since_best: int = 0
    stopped: bool = False
    planned: int | None = None  # episodes that the last call of fit asked for

    def validated(self, loss: float, patience: int | None) -> bool:
        """Count a validation; whether it is the best so far, which one that is not finite never is."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_episode, self.validations_since_best = loss, self.episode, 0
            return True
        self.validations_since_best += 1
        self.stopped = patience is not None and self.validations_since_best >= patience
        return False


@dataclass(frozen=True)
class Complete:
    """A run after a complete episode, in memory: what an interrupted one goes back to. ``adam`` as in a file."""

    net: dict[str, Tensor]
    adam: dict[str, Tensor]
    estimator: dict[str, Tensor]
    best: dict[str, Tensor] | None
    counters: Counters
    record: dict[str, Any] | None  # that the network carries

    def tensors(self) -> dict[str, Tensor]:
        """As in a file, but for ``effective``."""
        parts = {"net": self.net, "best": self.best or {}, "estimator": self.estimator}
        found = {f"{part}.{name}": value for part, each in parts.items() for name, value in each.items()}
        return {**found, **self.adam}


@dataclass
class Checkpoint:
    """The contents of a file."""

    settings: dict[str, Any]
    counters: Counters
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below ``prefix``, without it."""
        start = prefix + "."
        return {name[len(start) :]: value for name, value in self.tensors.items() if name.startswith(start)}


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write atomically: a crash at any moment leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    seen: set[int] = set()
    for name, value in tensors.items():
        # Tied parameters have several names, and the format knows no tensors that share memory.
        place = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if place in seen else value
        seen.add(place)
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "settings": json.dumps(checkpoint.settings),
        "counters": json.dumps(asdict(checkpoint.counters)),
    }
    files.write_tensors(path, tensors, metadata)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read what :func:`write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or is not a checkpoint.
    """
    try:
        path = Path(os.fsdecode(path))
    except TypeError:
        raise TypeError(f"path: expected the path of a checkpoint, got {path!r}") from None
    if not path.is_file():
        raise FileNotFoundError(f"path: no such checkpoint: {str(path)!r}")
    metadata, tensors = files.read(path)
    found = metadata.get("format"), metadata.get("format_version")
    if found != (FORMAT, VERSION):
        raise ValueError(f"{str(path)!r}: expected a checkpoint ({FORMAT!r}, version {VERSION!r}), got {found}")
    try:
        counters = Counters(**json.loads(metadata["counters"]))
        return Checkpoint(json.loads(metadata["settings"]), counters, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r}: damaged metadata: {error}") from error


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether the file is a readable checkpoint (and not, say, a network's own file)."""
    try:
        return files.read(path, tensors=False)[0].get("format") == FORMAT
    except (OSError, ValueError):
        return False


def load_best(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Networks:
    """The best network of a checkpoint (the present one if nothing was validated yet).

    Raises:
        FileNotFoundError, ValueError: see :func:`read`.
    """
    checkpoint = read(path)
    weights = checkpoint.part("effective") or checkpoint.part("best") or checkpoint.part("net")
    if not weights:
        raise ValueError(f"{str(path)!r}: the checkpoint holds no network")
    try:
        dtype = next(iter(weights.values())).dtype
        net = build(checkpoint.settings["network"], device=device, dtype=dtype)
        net.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r}: the checkpoint's network cannot be built: {error}") from error
    attach(net, record(checkpoint.settings, checkpoint.counters))
    return net


def effective_tensors(net: Networks) -> dict[str, Tensor]:
    """The part ``effective`` of a checkpoint whose best network is ``net``; nothing where weights alone would not make
    it."""
    found: dict[str, Tensor] = {}
    for key, member in members(net).items():
        if effective.strangers(member):
            return {}
        start = f"effective.{key}." if key else "effective."
        found.update((start + name, value) for name, value in effective.weights(member).items())
    return found


def record(settings: dict[str, Any], counters: Counters) -> dict[str, Any]:
    """What the best network of a run remembers of its training, see :mod:`l2l_fast.networks.record`."""
    progress = {
        "episodes": counters.episode,
        "best_episode": counters.best_episode,
        "validation_loss": counters.best_loss,
    }
    return {**settings, **progress}


def adam_tensors(net: Networks, adam: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's slots by parameter name."""
    return {
        f"adam.{name}.{slot}": value
        for name, parameter in net.named_parameters()
        for slot, value in adam.state.get(parameter, {}).items()
    }


def restore_adam(net: Networks, adam: torch.optim.Adam, slots: dict[str, Tensor]) -> None:
    """Put back what :func:`adam_tensors` took; before the first update that was nothing.

    Raises:
        ValueError: see :func:`adam_state`; nothing has been changed then.
    """
    state = adam_state(net, slots)
    adam.state.clear()
    for parameter, own in state.items():
        adam.state[parameter] = own


def adam_state(net: Networks, slots: dict[str, Tensor]) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Adam's state by parameter, of what :func:`adam_tensors` took.

    Raises:
        ValueError: the slots do not fit the network.
    """
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    remaining = dict(slots)
    for name, parameter in net.named_parameters() if slots else ():
        if not parameter.requires_grad:
            continue
        entry = {slot: remaining.pop(f"{name}.{slot}", None) for slot in ("step", "exp_avg", "exp_avg_sq")}
        for slot, value in entry.items():
            expected = torch.Size() if slot == "step" else parameter.shape
            if value is None or value.shape != expected:
                raise ValueError(
                    f"checkpoint: the meta-optimizer's {name}.{slot} is missing or does not fit the network"
                )
        # In the parameter's own strides: Adam's fused kernel walks through memory, and a file's tensors are contiguous.
        state[parameter] = {
            slot: value.to(parameter.device) if slot == "step" else torch.empty_like(parameter).detach().copy_(value)
            for slot, value in entry.items()
            if value is not None
        }
    if remaining:
        raise ValueError(f"checkpoint: unknown tensors of the meta-optimizer: {sorted(remaining)}")
    return state


def capture(
    net: Networks,
    adam: torch.optim.Adam,
    estimator: Estimator,
    best: dict[str, Tensor] | None,
    counters: Counters,
) -> Complete:
    """A copy of where a run is; ``best`` is never changed, only replaced, and needs no copy."""
    weights = {name: value.detach().clone() for name, value in net.state_dict().items()}
    slots = {name: value.clone() for name, value in adam_tensors(net, adam).items()}
    return Complete(weights, slots, estimator.state_dict(), best, replace(counters), record_of(net))


def put_back(
    complete: Complete, net: Networks, adam: torch.optim.Adam, estimator: Estimator
) -> tuple[dict[str, Tensor] | None, Counters]:
    """Back to what :func:`capture` saw; returns its ``best`` and its counters."""
    net.load_state_dict(complete.net)
    restore_adam(net, adam, {name.removeprefix("adam."): value.clone() for name, value in complete.adam.items()})
    adam.zero_grad()
    estimator.load_state_dict({name: value.clone() for name, value in complete.estimator.items()})
    attach(net, complete.record)
    return complete.best, replace(complete.counters)


def check_same_run(path: str | os.PathLike[str], saved: Checkpoint, settings: dict[str, Any], net: Networks) -> None:
    """Raise ValueError, listing what differs, unless the checkpoint is of a run with these settings and such a
    network."""
    different = differences(saved.settings, settings)
    if different:
        raise ValueError(f"{os.fspath(path)!r} belongs to another run:\n  " + "\n  ".join(different))
    expected = {name: value.shape for name, value in net.state_dict().items()}
    for part in ("net", "best"):
        weights = saved.part(part)
        if (weights or part == "net") and {name: value.shape for name, value in weights.items()} != expected:
            raise ValueError(f"{os.fspath(path)!r}: the tensors of {part!r} do not fit the network")


def differences(saved: Any, current: Any, path: str = "") -> list[str]:
    """Where two JSON-able values differ, one line each."""
    if isinstance(saved, dict) and isinstance(current, dict):
        lines = []
        for key in sorted({*saved, *current}):
            where = f"{path}.{key}" if path else str(key)
            lines += differences(saved.get(key), current.get(key), where)
        return lines
    return [] if saved == current else [f"{path}: the checkpoint has {saved!r}, this trainer {current!r}"]
