"""The configuration that fixes the mathematics of one step; every operator takes its fields, in this order."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Config(NamedTuple):
    """The five numbers of the plain coordinatewise LSTM (Andrychowicz et al. 2016, section 2.1).

    hidden_size 4..64, num_layers 1..4, preprocess "identity" or "log_sign", p of log_sign (appendix A of the paper),
    output_scale (the read-out is multiplied by it).
    """

    hidden_size: int
    num_layers: int
    preprocess: str
    p: float
    output_scale: float

    @property
    def gac_cells(self) -> int:
        return 0

    @property
    def extra_inputs(self) -> int:
        return 0

    @property
    def num_outputs(self) -> int:
        return 1


class GacConfig(NamedTuple):
    """:class:`Config` and what coordinates that communicate need (appendix D of the paper).

    gac_cells 0..hidden_size: so many cells of every layer send out their mean over all coordinates; extra_inputs 0..16
    more inputs of the first layer, after the preprocessed gradient; num_outputs 1..16 rows of the read-out, of which
    the first is the update and alone is multiplied by output_scale.
    """

    hidden_size: int
    num_layers: int
    preprocess: str
    p: float
    output_scale: float
    gac_cells: int
    extra_inputs: int
    num_outputs: int


AnyConfig: TypeAlias = Config | GacConfig


def make_config(
    hidden_size: int,
    num_layers: int,
    preprocess: str,
    p: float,
    output_scale: float,
    gac_cells: int = 0,
    extra_inputs: int = 0,
    num_outputs: int = 1,
) -> AnyConfig:
    """A :class:`Config` where it suffices, so that a plain network takes the plain operators; else a
    :class:`GacConfig`."""
    plain = Config(hidden_size, num_layers, preprocess, p, output_scale)
    if (gac_cells, extra_inputs, num_outputs) == (0, 0, 1):
        return plain
    return GacConfig(*plain, gac_cells, extra_inputs, num_outputs)
