"""Which network moves which parameter group.

``param_groups`` must stay what every tool around torch.optim takes them for: plain data that ``torch.load`` reads with
``weights_only=True``. So a group carries a description of its network, ``{"id": 0, "hidden_size": 20, ...}``, and the
networks themselves are kept here. A network that is assigned to ``group["network"]`` is taken in at the next look, and
so is what is assigned under an option's former name.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..kernels import renamed
from ..networks.lstm import CoordinatewiseLSTM

# A state that was written by a network which differs in one of these means something else.
STRUCTURE = {
    *("type", "hidden_size", "num_layers"),
    *("read_heads", "write_heads", "memory", "history", "initial", "add_read", "heads"),
}


class Registry:
    """The networks of an optimizer, each once, and the description by which groups name them."""

    def __init__(self) -> None:
        self.networks: list[CoordinatewiseLSTM] = []
        self.descriptions: list[dict[str, Any]] = []

    def describe(self, network: Any) -> dict[str, Any]:
        """The description of a network, which is taken in if it is new.

        Raises:
            TypeError, ValueError: it is none that an optimizer can drive.
        """
        check_network(network)
        for known, description in zip(self.networks, self.descriptions):
            if known is network:
                return description
        self.networks.append(network)
        self.descriptions.append({"id": len(self.descriptions), **identity(network)})
        return self.descriptions[-1]

    def describes(self, description: Any) -> bool:
        """Whether it is one of these descriptions itself: an equal one may be of another optimizer's network."""
        return any(description is each for each in self.descriptions)

    def network_of(self, group: dict[str, Any]) -> CoordinatewiseLSTM:
        """The network of a parameter group.

        Raises:
            TypeError, ValueError: the group names none, or one of another configuration (its options came from the
                checkpoint of another optimizer).
        """
        if renamed.FORMER in group:
            renamed.warn(renamed.frames_to_user())
            take_in_renamed(group)
        value = group["network"]
        if type(value) is dict:
            index = value.get("id")
            if type(index) is int and 0 <= index < len(self.networks):
                if value is not self.descriptions[index]:
                    check_same_network(value, self.networks[index], "network")
                    group["network"] = self.descriptions[index]
                return self.networks[index]
            raise ValueError(f"network: expected one of this optimizer's {len(self.networks)}, got {value!r}")
        group["network"] = self.describe(value)
        return self.networks[group["network"]["id"]]


def take_in_renamed(group: dict[str, Any]) -> None:
    """Give a group's options their present names. A former one beside the present one was written later: by a program
    that knows no other, or by an earlier release that had loaded both."""
    if renamed.FORMER in group:
        group[renamed.PRESENT] = group.pop(renamed.FORMER)


def adopted(description: Mapping[str, Any], default: CoordinatewiseLSTM | None) -> CoordinatewiseLSTM:
    """The network of a group that another optimizer had, whose description does not say where that is: ``default``.

    Raises:
        ValueError: there is none, or it is of other options.
    """
    options = {key: value for key, value in description.items() if key not in ("id", "digest")}
    if default is None or options != identity(default):
        raise ValueError(
            "network: expected a network in a new group ({'params': ..., 'network': net}), got a description that is "
            f"none of this optimizer's own, and holds no weights: {dict(description)!r}"
        )
    return default


def check_network(network: Any) -> None:
    """Raise TypeError or ValueError unless ``network`` is one network that an optimizer can drive."""
    if network is None:
        raise ValueError("network: expected a CoordinatewiseLSTM for every parameter group, got None")
    if isinstance(network, (nn.ModuleDict, nn.ModuleList, list, tuple)):
        names = list(network.keys()) if isinstance(network, nn.ModuleDict) else list(range(len(network)))
        each = ", ".join(f"{{'params': ..., 'network': networks[{name!r}]}}" for name in names)
        raise TypeError(
            f"network: got {len(names)} networks ({type(network).__name__} of {names}), expected one per parameter "
            f"group; say which parameters each of them moves: LearnedOptimizer([{each}])"
        )
    if not isinstance(network, CoordinatewiseLSTM):
        hint = f"; load_pretrained({network!r}) loads one that is shipped" if isinstance(network, str) else ""
        raise TypeError(f"network: expected a CoordinatewiseLSTM, got {type(network).__name__}{hint}")
    if network.extra_inputs and not network.has_memory:
        raise ValueError(
            f"network: an optimizer cannot supply its {network.extra_inputs} extra inputs; step it yourself"
        )


def identity(network: CoordinatewiseLSTM) -> dict[str, Any]:
    """What a network computes, but for its weights; JSON-able. Networks of another kind name it in their options."""
    return {"type": "CoordinatewiseLSTM", **network.options()}


def digest(network: CoordinatewiseLSTM) -> str:
    """Tells networks of different weights apart: the start of the SHA-256 of phi in float32, and what is beside it."""
    with torch.no_grad():
        parts = [network.phi(), *network.beside_phi()]
        content = b"".join(part.float().cpu().contiguous().numpy().tobytes() for part in parts)
    return hashlib.sha256(content).hexdigest()[:16]


def _is_same(former: Any, value: Any) -> bool:
    """Whether an option of a checkpoint, of whatever type, is the ``value`` of today."""
    if isinstance(value, list):
        return type(former) in (list, tuple) and list(former) == value
    return type(former) in (bool, int, float, str) and former == value


def check_same_network(saved: Mapping[str, Any], network: CoordinatewiseLSTM, name: str) -> None:
    """Raise ValueError if a state saved with the network described by ``saved`` means nothing to ``network``; warn if
    the optimizer will merely go on differently."""
    former = dict(saved)
    # Releases before 0.2 wrote neither the type nor the options of a memory, but only what the kernels take.
    former.setdefault("type", "NTMBFGS" if former.get("extra_inputs") else "CoordinatewiseLSTM")
    former.setdefault("gac_cells", 0)
    present = identity(network)
    for options in (former, present):
        if options["type"] == "NTMBFGS":
            options.setdefault("heads", "free")  # which is not said
    for key, value in present.items():
        if key not in former or _is_same(former[key], value):
            continue
        difference = f"{name}: saved with a network of {key}={former[key]!r}, now {key}={value!r}"
        if key in STRUCTURE:
            raise ValueError(difference)
        warnings.warn(f"{difference}: the optimizer will not continue as before", stacklevel=6)
    if former.get("digest", "") not in ("", digest(network)):
        warnings.warn(
            f"{name}: saved with a network of the same sizes and other weights: the optimizer will not continue as "
            "before",
            stacklevel=6,
        )
