"""What a segment keeps of the steps of one parameter group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..kernels.config import Config
from ..kernels.state import TILE, num_tiles
from ..networks.lstm import CoordinatewiseLSTM
from .sharding import local
from .tensor_features import Common


@dataclass
class Step:
    """One step of one group. The gradients are kept as the network saw them, negated by maximize: those of fused
    parameters in one flat buffer, in whole tiles, as the operator wrote them; those of exact ones in ``exact``."""

    t: int
    params: list[Tensor]
    gradients: Tensor | None
    exact: dict[Tensor, Tensor]
    lr: float
    decay: float
    sign: float
    means: Tensor | None = None  # of the global averaging cells, [num_layers, num_problems, gac_cells]
    common: Common = Common()  # of params
    exact_common: Common = Common()  # of exact

    def gradient(self, param: Tensor, tiles: Mapping[Tensor, int]) -> Tensor:
        """What was kept of the gradient of one parameter, flat."""
        if param in self.exact:
            return self.exact[param].reshape(-1)
        assert self.gradients is not None
        return self.gradients[TILE * tiles[param] :][: local(param).numel()]

    def common_of(self, params: Iterable[Tensor], exact: bool) -> Common:
        """What some of the tensors of this step had in common, each with its own coordinates."""
        places = {id(param): k for k, param in enumerate(self.exact if exact else self.params)}
        return (self.exact_common if exact else self.common).of([places[id(param)] for param in params])


class Part(NamedTuple):
    """What is back-propagated at once: ``params`` in the steps ``indices`` of a tape; ``exact`` as in
    :class:`l2l_fast.optim.batch.Batch`."""

    exact: bool
    indices: list[int]
    params: list[Tensor]


@dataclass
class Tape:
    """The steps of one parameter group, and where each parameter's tiles lie in their gradients."""

    network: CoordinatewiseLSTM
    phi: Tensor
    config: Config
    joint: bool
    num_problems: int = 1
    steps: list[Step] = field(default_factory=list)
    tiles: dict[Tensor, int] = field(default_factory=dict)
    total_tiles: int = 0

    def place(self, params: Iterable[Tensor]) -> list[int]:
        """First tile of every parameter; one that is new to the segment is appended, so no place ever changes."""
        for param in params:
            if param not in self.tiles:
                self.tiles[param] = self.total_tiles
                self.total_tiles += num_tiles(local(param).numel())
        return [self.tiles[param] for param in params]

    def parts(self) -> list[Part]:
        """The tape cut into what can be back-propagated at once: tensors that moved in the same steps, fused or exact.

        Joint steps tie all tensors together. Where the same fused ones moved in every step, one launch takes them; else
        they are one exact part, in which a step that no tensor moved in is left out, as the loss there does not reach
        any update."""
        fused = [Part(False, list(indices), params) for indices, params in self._patterns(exact=False).items()]
        if not self.joint:
            exact = self._patterns(exact=True).items()
            return fused + [Part(True, list(indices), params) for indices, params in exact]
        if len(fused) == 1 and not any(step.exact for step in self.steps):
            return fused
        indices = [k for k, step in enumerate(self.steps) if step.params or step.exact]
        moved = {param: None for k in indices for param in (*self.steps[k].params, *self.steps[k].exact)}
        return [Part(True, indices, list(moved))]

    def _patterns(self, exact: bool) -> dict[tuple[int, ...], list[Tensor]]:
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
