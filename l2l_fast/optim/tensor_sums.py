"""Sums over the coordinates of the tensors of a parameter group, sharded ones included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import operators
from ..kernels.config import Config
from .joint import Reduce


def sums_of(
    params: Sequence[Tensor],
    moving: Sequence[tuple[Tensor, Tensor, Tensor]],
    config: Config,
    maximize: bool,
    ages: Sequence[int],
    reduce: Reduce | None,
    owners: Sequence[Tensor] | None = None,
) -> Tensor:
    """float64 ``[moving tensors, 6]``: the sums of :func:`l2l_fast.kernels.normalized.tensor_sums`, numbers of
    coordinates included.

    Args:
        params: all of the group: with ``reduce``, which adds up over processes, every process gives a row for each, as
            one may have a gradient of its shard where another has none.
        moving: (parameter, gradient, state) of those that move; ages: of each, this step included.
        owners: which of ``params`` they are, where ``moving`` has shards of them.
    """
    device = params[0].device if params else torch.device("cpu")
    wide = [state.dtype is torch.float64 for _, _, state in moving]
    sums = torch.empty(len(moving), 6, dtype=torch.float64, device=device)
    for kind in set(wide):  # float64 goes another way
        chosen = [k for k, each in enumerate(wide) if each == kind]
        part_params, grads, states = (list(x) for x in zip(*(moving[k] for k in chosen), strict=True))
        found = operators.tensor_sums(part_params, grads, states, config, maximize, [ages[k] for k in chosen])
        if len(chosen) == len(wide):
            sums = found
        else:
            sums[chosen] = found
    if reduce is None:
        return sums
    rows = {id(param): k for k, param in enumerate(params)}
    places = [rows[id(param)] for param in (owners or [param for param, _, _ in moving])]
    everything = torch.zeros(len(params), 6, dtype=torch.float64, device=device)
    everything[places] = sums
    reduce(everything)
    return everything[places]
