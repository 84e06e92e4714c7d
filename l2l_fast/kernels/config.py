"""The configuration that fixes the mathematics of one step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# Inputs of the first layer that are made of the gradient, by kind of preprocessing.
FEATURES = {"identity": 1, "log_sign": 2, "normalized": 5}
# Moving averages of the gradient that a coordinate keeps, by kind; none where it is not named.
AVERAGES = {"normalized": 4}
BETAS = (0.9, 0.99, 0.95, 0.999)
# Memories of two to a million steps: what float32 keeps accurately.
BETA_BOUNDS = (0.5, 1 - 2.0**-20)
PLAIN_FIELDS = ("hidden_size", "num_layers", "preprocess", "p", "output_scale")
SHARED_FIELDS = (*PLAIN_FIELDS, "gac_cells", "extra_inputs", "num_outputs")


@dataclass(frozen=True)
class Config:
    """What a network computes, whatever its weights; it travels whole, see ``arguments``.

    hidden_size 4..64, num_layers 1..4, preprocess "identity", "log_sign" or "normalized", p of log_sign (appendix A of
    Andrychowicz et al. 2016), output_scale (the update is multiplied by it); gac_cells 0..hidden_size: so many cells of
    every layer send out their mean over all coordinates (appendix D); extra_inputs 0..16 more inputs of the first
    layer, after the preprocessed gradient; num_outputs 1..16 rows that come out, of which the first is the update.

    Of "normalized" (:mod:`l2l_fast.kernels.normalized`) alone: tensor_inputs 0..16 numbers that all coordinates of a
    tensor have in common; betas, the decay rates of the moving averages m1, m2, v1, v2, None elsewhere. It has neither
    gac_cells nor extra_inputs, and one output; hidden_size = num_layers = 0: no LSTM, the nominal update is all.
    """

    hidden_size: int
    num_layers: int
    preprocess: str
    p: float
    output_scale: float
    gac_cells: int = 0
    extra_inputs: int = 0
    num_outputs: int = 1
    tensor_inputs: int = 0
    betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # Before anything can have seen it: JSON has lists, and the default depends on the kind.
        betas = BETAS if self.betas is None and self.averages else self.betas
        object.__setattr__(self, "betas", betas if betas is None else tuple(betas))

    @property  # not a cached one, whose lock torch.compile does not trace
    def arguments(self) -> tuple[tuple[int, ...], str, tuple[float, ...]]:
        """As every operator takes it: sizes (tensor_inputs only where there are some), preprocess, constants."""
        sizes = (self.hidden_size, self.num_layers, self.gac_cells, self.extra_inputs, self.num_outputs)
        own = (self.tensor_inputs,) if self.tensor_inputs else ()
        return (*sizes, *own), self.preprocess, (self.p, self.output_scale, *(self.betas or ()))

    @classmethod
    def from_arguments(cls, sizes: Any, preprocess: str, constants: Any) -> Config:
        """The inverse of ``arguments``."""
        hidden_size, num_layers, *others = sizes
        p, output_scale, *betas = constants
        options: dict[str, Any] = {"betas": tuple(betas) or None}
        return cls(hidden_size, num_layers, preprocess, p, output_scale, *others, **options)

    @property
    def is_plain(self) -> bool:
        """One gradient in, one update out, and every coordinate by itself: each tensor, and each tile of it, is a step
        of its own."""
        return (self.gac_cells, self.extra_inputs, self.num_outputs) == (0, 0, 1)

    @property
    def rows(self) -> int:
        """Numbers of state per coordinate: h and c of every layer, then the moving averages."""
        return 2 * self.num_layers * self.hidden_size + self.averages

    @property
    def averages(self) -> int:
        """Moving averages of the gradient in a coordinate's state."""
        return AVERAGES.get(self.preprocess, 0)

    @property
    def read_outs(self) -> int:
        """Rows of the read-out: the outputs; of "normalized" gain and correction, which make one update."""
        return 2 if self.averages else self.num_outputs

    @property
    def features(self) -> int:
        """Inputs of the first layer that are made of the gradient: two for log_sign, the gradient itself for
        identity, five for normalized."""
        return FEATURES[self.preprocess]

    def inputs(self, layer: int) -> int:
        """Inputs of a layer, its own previous h not counted."""
        return self.features + self.extra_inputs if layer == 0 else self.hidden_size

    def asdict(self) -> dict[str, Any]:
        """The fields by name, JSON-able, as files have them: of a plain network only ``PLAIN_FIELDS``, and those of
        "normalized" only where they mean something."""
        if self.averages:
            named = {field.name: getattr(self, field.name) for field in fields(self)}
            return {**named, "betas": list(self.betas or ())}
        return {name: getattr(self, name) for name in (PLAIN_FIELDS if self.is_plain else SHARED_FIELDS)}

    _asdict = asdict  # of releases before 0.2, where this was a named tuple


GacConfig = Config
"""The name that a configuration with global averaging cells had before 0.2."""
