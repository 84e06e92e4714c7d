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

    def of(chosen: Sequence[int]) -> Tensor:
        own_params, grads, states = (list(each) for each in zip(*(moving[k] for k in chosen), strict=True))
        return operators.tensor_sums(own_params, grads, states, config, maximize, [ages[k] for k in chosen])

    if len(set(wide)) == 1:
        sums = of(range(len(moving)))
    else:  # float64 goes another way; or there is nothing
        sums = torch.empty(len(moving), 6, dtype=torch.float64, device=device)
        for kind in set(wide):
            chosen = [k for k, each in enumerate(wide) if each == kind]
            sums[chosen] = of(chosen)
    if reduce is None:
        return sums
    rows = {id(param): k for k, param in enumerate(params)}
    places = [rows[id(param)] for param in (owners or [param for param, _, _ in moving])]
    everything = torch.zeros(len(params), 6, dtype=torch.float64, device=device)
    everything[places] = sums
    reduce(everything)
    return everything[places]
