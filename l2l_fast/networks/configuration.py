"""What a network may be: the constructor's arguments, checked, as one configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..kernels import checks
from ..kernels.config import AVERAGES, BETA_BOUNDS, FEATURES, Config


def checked_config(
    hidden_size: Any,
    num_layers: Any,
    preprocess: Any,
    p: Any,
    output_scale: Any,
    gac_cells: Any,
    extra_inputs: Any,
    num_outputs: Any,
    tensor_inputs: Any,
    betas: Any,
) -> Config:
    """The configuration of a network; TypeError or ValueError, naming the argument, if there is none such."""
    # What is kept are plain Python numbers, whatever came: they go into JSON, pickles and the operators' schemas.
    preprocess = checks.choice("preprocess", preprocess, tuple(FEATURES))
    # Without layers an update is made of moving averages alone.
    num_layers = checks.integer("num_layers", num_layers, 0 if preprocess in AVERAGES else 1, 4)
    hidden_size = checks.integer("hidden_size", hidden_size)
    if not (4 <= hidden_size <= 64 if num_layers else hidden_size == 0):
        expected = "4..64" if num_layers else "0"
        raise ValueError(f"hidden_size: expected {expected} with num_layers={num_layers}, got {hidden_size}")
    gac_cells = checks.integer("gac_cells", gac_cells, 0, hidden_size)
    extra_inputs = checks.integer("extra_inputs", extra_inputs, 0, 16)
    num_outputs = checks.integer("num_outputs", num_outputs, 1, 16)
    # Both are used in float32. The kernels count denormal gradients as zero: e^p must leave those negligible.
    limits = torch.finfo(torch.float32)
    p = checks.real("p", p, limits.tiny, 70.0, expected="a number in (0, 70]")
    output_scale = checks.real(
        "output_scale", output_scale, -limits.max, limits.max, expected="a finite float32 number"
    )
    config = Config(hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs)
    return _with_normalized(config, tensor_inputs, betas)


def _with_normalized(config: Config, tensor_inputs: Any, betas: Any) -> Config:
    """With what only a normalized network has."""
    tensor_inputs = checks.integer("tensor_inputs", tensor_inputs, 0, 16)
    if not config.averages:
        for name, value in (("tensor_inputs", tensor_inputs or None), ("betas", betas)):
            if value is not None:
                raise ValueError(f'{name}: only of a network with preprocess="normalized", got {config.preprocess!r}')
        return config
    for name, value, expected in (
        ("gac_cells", config.gac_cells, 0),
        ("extra_inputs", config.extra_inputs, 0),
        ("num_outputs", config.num_outputs, 1),
    ):
        if value != expected:
            raise ValueError(f'{name}: expected {expected} with preprocess="normalized", got {value}')
    if betas is not None:
        if isinstance(betas, (str, bytes)) or not isinstance(betas, Iterable):
            raise TypeError(f"betas: expected four numbers (of m1, m2, v1, v2), got {betas!r}")
        given = list(betas)
        if len(given) != config.averages:
            raise ValueError(f"betas: expected four numbers (of m1, m2, v1, v2), got {len(given)}")
        betas = tuple(checks.real(f"betas[{k}]", beta, *BETA_BOUNDS) for k, beta in enumerate(given))
    return replace(config, tensor_inputs=tensor_inputs, betas=betas)
