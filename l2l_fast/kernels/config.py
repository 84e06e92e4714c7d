"""The configuration that fixes the mathematics of one step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# Inputs of the first layer that are made of the gradient, by kind of preprocessing.
FEATURES = {"identity": 1, "log_sign": 2}
PLAIN_FIELDS = ("hidden_size", "num_layers", "preprocess", "p", "output_scale")


@dataclass(frozen=True)
class Config:
    """What a network computes, whatever its weights; it travels whole, see ``arguments``.

    hidden_size 4..64, num_layers 1..4, preprocess "identity" or "log_sign", p of log_sign (appendix A of Andrychowicz
    et al. 2016), output_scale (the read-out is multiplied by it); gac_cells 0..hidden_size: so many cells of every
    layer send out their mean over all coordinates (appendix D); extra_inputs 0..16 more inputs of the first layer,
    after the preprocessed gradient; num_outputs 1..16 rows of the read-out, of which the first is the update and alone
    is multiplied by output_scale.
    """

    hidden_size: int
    num_layers: int
    preprocess: str
    p: float
    output_scale: float
    gac_cells: int = 0
    extra_inputs: int = 0
    num_outputs: int = 1

    @property  # not a cached one, whose lock torch.compile does not trace
    def arguments(self) -> tuple[tuple[int, ...], str, tuple[float, float]]:
        """As every operator takes it: sizes, preprocess, constants."""
        sizes = (self.hidden_size, self.num_layers, self.gac_cells, self.extra_inputs, self.num_outputs)
        return sizes, self.preprocess, (self.p, self.output_scale)

    @classmethod
    def from_arguments(cls, sizes: Any, preprocess: str, constants: Any) -> Config:
        """The inverse of ``arguments``."""
        hidden_size, num_layers, *others = sizes
        return cls(hidden_size, num_layers, preprocess, *constants, *others)

    @property
    def is_plain(self) -> bool:
        """One input, one output, and every coordinate by itself: each tensor, and each tile of it, is a step of its
        own."""
        return (self.gac_cells, self.extra_inputs, self.num_outputs) == (0, 0, 1)

    @property
    def rows(self) -> int:
        """Numbers of state per coordinate: h and c of every layer."""
        return 2 * self.num_layers * self.hidden_size

    @property
    def features(self) -> int:
        """Inputs of the first layer that are made of the gradient: two for log_sign, the gradient itself for
        identity."""
        return FEATURES[self.preprocess]

    def inputs(self, layer: int) -> int:
        """Inputs of a layer, its own previous h not counted."""
        return self.features + self.extra_inputs if layer == 0 else self.hidden_size

    def asdict(self) -> dict[str, Any]:
        """The fields by name, JSON-able, as files have them: of a plain network only ``PLAIN_FIELDS``."""
        names = PLAIN_FIELDS if self.is_plain else tuple(field.name for field in fields(self))
        return {name: getattr(self, name) for name in names}

    _asdict = asdict  # of releases before 0.2, where this was a named tuple


GacConfig = Config
"""The name that a configuration with global averaging cells had before 0.2."""
