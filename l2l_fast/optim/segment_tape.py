"""What a segment records of a parameter group: its steps, and where every parameter lies in their buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.config import Config
from ..kernels.state import TILE, num_tiles
from ..networks.lstm import CoordinatewiseLSTM


@dataclass
class Step:
    """One recorded step of one group; ``g`` is what the network saw (the gradient, negated by maximize)."""

    t: int
    params: list[Tensor]
    record: Tensor | None
    exact: dict[Tensor, Tensor]
    lr: float
    decay: float
    sign: float
    means: Tensor | None = None  # of the global averaging cells, [num_layers, groups, gac_cells]

    def recorded(self, param: Tensor, tiles: Mapping[Tensor, int]) -> Tensor:
        """The recorded g of one parameter, flat."""
        if param in self.exact:
            return self.exact[param].reshape(-1)
        assert self.record is not None
        return self.record[TILE * tiles[param] :][: param.numel()]


@dataclass
class Tape:
    """The recorded steps of one parameter group, and where each parameter's tiles lie in its records."""

    network: CoordinatewiseLSTM
    phi: Tensor
    config: Config
    groups: int = 1
    steps: list[Step] = field(default_factory=list)
    tiles: dict[Tensor, int] = field(default_factory=dict)
    total_tiles: int = 0

    def place(self, params: Iterable[Tensor]) -> list[int]:
        """First tile of every parameter; one that is new to the segment is appended, so no place ever changes."""
        for param in params:
            if param not in self.tiles:
                self.tiles[param] = self.total_tiles
                self.total_tiles += num_tiles(param.numel())
        return [self.tiles[param] for param in params]

    def patterns(self, exact: bool) -> dict[tuple[int, ...], list[Tensor]]:
        """Parameters by the steps (indices into ``steps``) in which they moved; nearly always there is one pattern."""
        members: list[list[Tensor]] = [list(step.exact) if exact else step.params for step in self.steps]
        ids = [tuple(map(id, params)) for params in members]
        if ids and ids[0] and all(other == ids[0] for other in ids):
            return {tuple(range(len(members))): members[0]}
        moved: dict[Tensor, list[int]] = {}
        for index, params in enumerate(members):
            for param in params:
                moved.setdefault(param, []).append(index)
        patterns: dict[tuple[int, ...], list[Tensor]] = {}
        for param, indices in moved.items():
            patterns.setdefault(tuple(indices), []).append(param)
        return patterns
