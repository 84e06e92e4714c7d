"""The vectorised elementary functions over all of float32: within 4 ulp, saturating, NaN in, NaN out."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from l2l_fast.kernels import operators as ops

FULL = os.environ.get("L2L_FAST_FULL") == "1"
STRIDE = 97 if FULL else 1021  # of the 2^32 bit patterns; prime, so that all low bits occur
SMALLEST, LARGEST = 2.0**-126, float(np.finfo(np.float32).max)
LIMIT = 4.0
LN2 = math.log(2.0)

EXACT = {
    "exp2": lambda x: np.exp2(x),
    "log": lambda x: np.log(x),
    "sigmoid_scaled": lambda a: 1.0 / (1.0 + np.exp2(a)),
    "tanh_scaled": lambda a: np.tanh(a * (LN2 / 2)),
}


def evaluate(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The function as the kernels compute it, and in float64."""
    actual = ops.vector_math(name, torch.from_numpy(x)).numpy().astype(np.float64)
    with np.errstate(all="ignore"):
        return actual, EXACT[name](x.astype(np.float64))


def ulps(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Errors in units of the last place of the exact value's binade."""
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), SMALLEST)))
    return np.abs(actual - exact) / np.exp2(exponent - 23)


def everywhere() -> np.ndarray:
    x = np.arange(0, 2**32, STRIDE, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return x[~np.isnan(x)]


def densely(low: float, high: float) -> np.ndarray:
    """Every float near the ends, and evenly spread ones between."""
    ends = [np.float32(low), np.float32(high)]
    for _ in range(500):
        ends += [np.nextafter(ends[-2], np.float32(np.inf)), np.nextafter(ends[-1], np.float32(-np.inf))]
    return np.unique(np.concatenate([np.array(ends, np.float32), np.linspace(low, high, 200_003, dtype=np.float32)]))


def assert_accurate(name: str, x: np.ndarray) -> None:
    actual, exact = evaluate(name, x)
    normal = (np.abs(exact) >= SMALLEST) & (np.abs(exact) <= LARGEST)
    if name == "log":
        normal |= exact == 0
    error = np.where(normal, ulps(actual, np.where(normal, exact, 1.0)), 0.0)
    worst = int(np.argmax(error))
    assert error[worst] <= LIMIT, f"{name}({x[worst]!r}): {error[worst]:.1f} ulp"
    # Below the normal numbers: anything from 0 to the smallest of them, with the right sign. Above: infinity.
    small = np.abs(exact) < SMALLEST
    assert (np.abs(actual[small]) <= SMALLEST).all() and (actual[small] * exact[small] >= 0).all()
    large = np.abs(exact) > LARGEST
    assert (np.abs(actual[large]) >= LARGEST).all() and (actual[large] * exact[large] > 0).all()


@pytest.mark.parametrize("name", ["exp2", "sigmoid_scaled", "tanh_scaled"])
def test_all_magnitudes(name, isa):
    assert_accurate(name, everywhere())


def test_logarithm_of_all_positive_normal_numbers(isa):
    x = everywhere()
    assert_accurate("log", x[(x >= SMALLEST) & np.isfinite(x)])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("exp2", -127.0, 129.0),
        ("exp2", -1.0, 1.0),
        ("exp2", -1e-6, 1e-6),
        ("sigmoid_scaled", -30.0, 30.0),
        ("sigmoid_scaled", -130.0, 130.0),
        ("tanh_scaled", -32.0, 32.0),
        ("tanh_scaled", -1.0, 1.0),
        ("tanh_scaled", -1e-3, 1e-3),
        ("log", 0.5, 2.0),
        ("log", 0.999, 1.001),
        ("log", SMALLEST, 1e-30),
        ("log", 1e30, LARGEST),
    ],
)
def test_where_it_matters(name, low, high, isa):
    assert_accurate(name, densely(low, high))


def test_saturation(isa):
    x = torch.tensor([math.inf, 1e30, 200.0, -200.0, -1e30, -math.inf])
    exp2 = ops.vector_math("exp2", x)
    assert exp2[:3].isinf().all() and (exp2[3:] <= SMALLEST).all() and (exp2[3:] >= 0).all()
    sigmoid = ops.vector_math("sigmoid_scaled", x)
    assert (sigmoid[:3] <= SMALLEST).all() and (sigmoid[:3] >= 0).all() and sigmoid[3:].eq(1).all()
    assert ops.vector_math("tanh_scaled", x).tolist() == [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    assert ops.vector_math("log", torch.tensor([math.inf])).item() == math.inf


@pytest.mark.parametrize("name", list(EXACT))
def test_every_kind_of_nan(name, isa):
    """Whatever its payload: bits of it must not be taken for an exponent."""
    payloads = np.unique(np.concatenate([1 << np.arange(23), np.arange(1, 2**23, 4099), [2**23 - 1]]))
    bits = np.concatenate([payloads | 0x7F800000, payloads | 0xFF800000]).astype(np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    assert x.isnan().all() and ops.vector_math(name, x).isnan().all()


def test_fixed_points(isa):
    zero = torch.tensor([0.0, -0.0])
    assert ops.vector_math("tanh_scaled", zero).eq(0).all()
    assert (ops.vector_math("exp2", zero) - 1).abs().max() <= 2**-23
    assert ops.vector_math("log", torch.ones(1)).item() == 0.0


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 15, 16, 17, 33])
def test_any_number_of_elements(size, isa):
    x = torch.linspace(-3, 3, size)
    assert torch.allclose(ops.vector_math("exp2", x), torch.exp2(x), rtol=1e-6)
