"""How a state is stored: as float32, which arithmetic is done on, or in fewer bytes. The oracle of core/state_io.h.

A state that is not float32 is decoded, stepped in float32 and encoded again, tile by tile. What is stored, per layer:
h and c; and, of networks with normalized inputs, the moving averages.

========  =====================================================  ========================
type      h, c                                                   averages
========  =====================================================  ========================
bfloat16  h to the nearest, c stochastically                     stochastically
int8      ``round(127 h)``, c in steps of 2^e, stochastically    bfloat16, stochastically
========  =====================================================  ========================

e is the smallest exponent that brings the 64 numbers of one cell in one tile into -127..127; cells of one unit are
alike in all coordinates and unlike those of others, so that a step for all of a coordinate would lose the small ones.
Rounding is stochastic where a number is carried on from step to step: rounded to the nearest, it would stop where what
it gains in a step is less than half a unit in the last place. The random numbers are a function of a seed, the
coordinate and the row (a counter-based generator), and of nothing else.

In memory a bfloat16 state is ``[tiles, rows, 64]``, an int8 state ``[tiles, bytes]``: codes ``[rows of h and c, 64]``,
exponents ``[layers, hidden_size]``, filled up to 16 bytes, averages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import Config
from .state import TILE, num_tiles

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

CHUNK = 1024  # tiles that are converted at a time: some 20 MB of float32
_NAN_CODE = -128
_LOW, _HIGH = -120, 122  # of exponents
_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_GOLDEN32, _GOLDEN64 = 0x9E3779B9, 0x9E3779B97F4A7C15


def tile_shape(config: Config, dtype: torch.dtype) -> tuple[int, ...]:
    """What one tile of a state of this dtype is: ``(rows, 64)``, or the number of its bytes."""
    return (_averages_at(config) + 2 * TILE * config.averages,) if dtype is torch.int8 else (config.rows, TILE)


def zeros(numel: int, config: Config, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """The state that every coordinate starts from: zeros have the code 0 in all types."""
    return torch.zeros((num_tiles(numel), *tile_shape(config, dtype)), dtype=dtype, device=device)


def decode(data: Tensor, config: Config) -> Tensor:
    """A state as float32 ``[tiles, rows, 64]``; exact."""
    if data.dtype is not torch.int8:
        return data.float()
    tiles, rows = data.shape[0], 2 * config.num_layers * config.hidden_size
    codes = data[:, : _exponents_at(config)].view(tiles, rows, TILE)
    exponents = data[:, _exponents_at(config) :][:, : config.num_layers * config.hidden_size]
    numbers = codes.float()
    pairs = numbers.view(tiles, config.num_layers, 2, config.hidden_size, TILE)
    pairs[:, :, 0] *= _float32(1.0) / _float32(127.0)
    steps = torch.ldexp(torch.ones((), device=data.device), exponents.float())
    pairs[:, :, 1] *= steps.view(tiles, config.num_layers, config.hidden_size, 1)
    numbers[codes == _NAN_CODE] = torch.nan
    return torch.cat([numbers, decode_averages(data, config)], dim=1) if config.averages else numbers


def decode_averages(data: Tensor, config: Config) -> Tensor:
    """Only the moving averages of a state, float32 ``[tiles, averages, 64]``."""
    if data.dtype is not torch.int8:
        return data[:, config.rows - config.averages :].float()
    stored = data[:, _averages_at(config) :].contiguous().view(torch.bfloat16)
    return stored.view(data.shape[0], config.averages, TILE).float()


def encode(rows: Tensor, config: Config, dtype: torch.dtype, numel: int, seed: int | None = None) -> Tensor:
    """The inverse of :func:`decode`, which gives back what it gave.

    Args:
        rows: float32 ``[tiles, rows, 64]``. dtype: one of ``STATE_DTYPES``; or float64, of rows that are.
        numel: coordinates of the tensor; what lies beyond them does not choose a step.
        seed: of the step for this tensor (:func:`seed_of`); None rounds everything to the nearest.
    """
    if dtype in (torch.float32, torch.float64):
        return rows.to(dtype)
    out = torch.empty((rows.shape[0], *tile_shape(config, dtype)), dtype=dtype, device=rows.device)
    for begin in range(0, rows.shape[0], CHUNK):
        part = slice(begin, begin + CHUNK)
        _encode_tiles(rows[part].float(), config, numel - begin * TILE, seed, begin, out[part])
    return out


def seed_of(parameter: int, step: int, tile: int = 0, part: int = 0) -> int:
    """The seed of the ``step``-th step of an optimizer's ``parameter``-th parameter, as a signed 64-bit number.

    Args:
        tile: of the whole tensor, with which this part of it begins: the numbers are those that the whole would have.
        part: of parts that do not begin with a tile, which: each has numbers of its own. 0: the whole, or by ``tile``.
    """
    seed = (_mix64(_stream(parameter, part) + step) + _GOLDEN64 * tile) & _MASK64
    return seed - (1 << 64) if seed >> 63 else seed


@functools.cache
def _stream(parameter: int, part: int) -> int:
    stream = _mix64(parameter + 1)
    return _mix64(stream + part) if part else stream


def _encode_tiles(rows: Tensor, config: Config, numel: int, seed: int | None, first: int, out: Tensor) -> None:
    tiles, layers, hidden = rows.shape[0], config.num_layers, config.hidden_size
    pairs = rows[:, : 2 * layers * hidden].reshape(tiles, layers, 2, hidden, TILE)
    h, c = pairs[:, :, 0], pairs[:, :, 1].reshape(tiles, layers * hidden, TILE)
    averages = rows[:, 2 * layers * hidden :]
    rounded = layers * hidden + config.averages
    draws = None if seed is None else random_bits(seed, first, tiles, rounded).to(rows.device)
    draws_c = None if draws is None else draws[:, : layers * hidden]
    draws_averages = None if draws is None else draws[:, layers * hidden :]
    if out.dtype is torch.bfloat16:
        stored = torch.stack([h.to(out.dtype), _to_bfloat16(c, draws_c).view_as(h)], dim=2)
        out[:, : 2 * layers * hidden] = stored.view(tiles, 2 * layers * hidden, TILE)
        out[:, 2 * layers * hidden :] = _to_bfloat16(averages, draws_averages)
        return
    lanes = torch.arange(tiles * TILE, device=rows.device).view(tiles, 1, TILE)
    c = torch.where(lanes < numel, c, 0.0)
    exponents = _exponents(c)
    codes_c = _codes_of_c(c, exponents, draws_c)
    codes_h = (h * 127.0).clamp(-127.0, 127.0).round()
    codes_h = torch.where(codes_h.isnan(), _NAN_CODE, codes_h).to(torch.int8)
    at, end = _exponents_at(config), _averages_at(config)
    out[:, :at] = torch.stack([codes_h, codes_c.view_as(codes_h)], dim=2).view(tiles, at)
    out[:, at:end] = 0
    out[:, at : at + layers * hidden] = exponents.to(torch.int8).view(tiles, layers * hidden)
    if config.averages:
        out[:, end:] = _to_bfloat16(averages, draws_averages).contiguous().view(tiles, -1).view(torch.int8)


def _exponents(c: Tensor) -> Tensor:
    """e of every row of c, ``[tiles, rows, 1]``: 127 * 2^e = 1.984375 * 2^(e + 6) is at least its largest number."""
    largest = torch.where(c.isfinite(), c.abs(), 0.0).amax(dim=2, keepdim=True)
    e = ((largest.view(torch.int32) + 0x1FFFF) >> 23) - (127 + 6)
    return e.clamp(_LOW, _HIGH)


def _codes_of_c(c: Tensor, exponents: Tensor, draws: Tensor | None) -> Tensor:
    scaled = c * torch.ldexp(torch.ones((), device=c.device), -exponents.float())
    if draws is None:
        codes = scaled.round()
    else:
        # 128 + a 16-bit fraction; added in float32, as there
        codes = (scaled + (draws.float() * 2.0**-16 + 128.0)).floor() - 128.0
    return torch.where(c.isfinite(), codes, _NAN_CODE).to(torch.int8)


def _to_bfloat16(x: Tensor, draws: Tensor | None) -> Tensor:
    if draws is None:
        return x.to(torch.bfloat16)
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _MASK32
    up = ((bits + draws) >> 16).to(torch.int32) << 16
    return torch.where(x.isfinite(), up.view(torch.float32), x).to(torch.bfloat16)


def random_bits(seed: int, first: int, tiles: int, rows: int) -> Tensor:
    """The 16 random bits of every number that is rounded: int64 ``[tiles, rows, 64]``, from tile ``first`` on. rows:
    those of c, layer by layer, then the averages."""
    keys = [_mix64((seed + _GOLDEN64 * tile) & _MASK64) for tile in range(first, first + tiles)]
    # On the CPU whatever the default device is, and so below.
    low, high = (torch.tensor([key >> shift & _MASK32 for key in keys], device="cpu").view(-1, 1) for shift in (0, 32))
    lanes = low + _GOLDEN32 * torch.arange(TILE, device="cpu")
    pairs = high + _GOLDEN32 * torch.arange((rows + 1) // 2, device="cpu")
    draws = _mix32(lanes & _MASK32).unsqueeze(1) ^ _mix32(pairs & _MASK32).unsqueeze(2)
    draws = (draws * 0x7FEB352D) & _MASK32
    draws = draws ^ (draws >> 16)
    return torch.stack([draws & 0xFFFF, draws >> 16], dim=2).view(tiles, -1, TILE)[:, :rows]


def _mix64(x: int) -> int:
    x &= _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _float32(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float32, device="cpu")


def _exponents_at(config: Config) -> int:
    return 2 * config.num_layers * config.hidden_size * TILE


def _averages_at(config: Config) -> int:
    return _exponents_at(config) + (config.num_layers * config.hidden_size + 15) // 16 * 16


def sizes(config: Config) -> dict[str, float]:
    """Bytes of state per coordinate of a large tensor, by type."""
    found: dict[str, float] = {}
    for name, dtype in STATE_DTYPES.items():
        shape: Sequence[int] = tile_shape(config, dtype)
        found[name] = torch.Size(shape).numel() * dtype.itemsize / TILE
    return found
