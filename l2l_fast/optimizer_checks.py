"""What LearnedOptimizer checks before it writes anything."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import joint, ops
from .gac_ops import check_groups
from .joint import Reduce
from .memory import NTMBFGS
from .network import CoordinatewiseLSTM


def check_options(group: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, naming the option, unless the options of a parameter group are valid."""
    if group["network"] is None:
        raise ValueError("network: expected a CoordinatewiseLSTM for every parameter group, got None")
    if isinstance(group["network"], (nn.ModuleDict, Mapping)):
        kinds = list(group["network"].keys())
        example = ", ".join(f'{{"params": ..., "network": net[{kind!r}]}}' for kind in kinds[:3])
        raise TypeError(
            f"network: expected a CoordinatewiseLSTM, got one per kind of parameter, {kinds}: give every kind a "
            f"group of its own, LearnedOptimizer([{example}])"
        )
    if not isinstance(group["network"], CoordinatewiseLSTM):
        raise TypeError(f"network: expected a CoordinatewiseLSTM, got {type(group['network']).__name__}")
    joint.check_network(group["network"])
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and name == "lr":
            if value.numel() != 1:
                raise ValueError(f"lr: expected a number or a tensor with one element, got shape {tuple(value.shape)}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not 0.0 <= (float(value) if isinstance(value, Tensor) else value) <= sys.float_info.max:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"maximize: expected a bool, got {group['maximize']!r}")


def check_problems(group: Mapping[str, Any], reduce: Reduce | None) -> None:
    """Raise ValueError unless every parameter holds the group's number of problems side by side."""
    check_groups(group["groups"], 0)
    if not group["network"].communicates:
        return
    for param in group["params"]:
        check_groups(group["groups"], param.numel())
    if reduce is not None and isinstance(group["network"], NTMBFGS):
        raise NotImplementedError("process_group: the memory of NTMBFGS cannot be sharded")


def check_devices(param: Tensor, grad: Tensor, phi: Tensor, fused: bool, kernel: str) -> None:
    """Raise unless all are on one device, for which there is a kernel."""
    if not param.device == grad.device == phi.device:
        raise ValueError(
            f"params, their gradients and the network must be on one device, got {param.device}, {grad.device} and "
            f"{phi.device}"
        )
    if fused:
        ops.require_kernel(kernel, param.device)
