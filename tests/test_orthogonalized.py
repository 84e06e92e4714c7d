"""Matrices brought near orthogonal ones: the operator against its oracle in plain PyTorch, and its own promises."""

from __future__ import annotations

import math
import re

import pytest
import torch

from l2l_fast.kernels import operators as ops
from l2l_fast.kernels.orthogonal import COEFFICIENTS, LEAST_NORM, orthogonalized

SHAPES = [
    (1, 1), (1, 9), (9, 1), (2, 2), (2, 3), (5, 4), (63, 63), (64, 64), (65, 65), (63, 65), (65, 64), (16, 100),
    (10, 784), (784, 32), (17, 5000), (300, 300), (147, 260), (260, 97),
]  # fmt: skip
STACKS = [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)]


def random_stack(*shape, seed: int = 0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_as_the_oracle(updates, found, steps: int = 5, atol: float = 2e-5):
    """Of matrices whose singular values are about 1."""
    expected = orthogonalized(updates.double(), steps)
    assert found.dtype == updates.dtype and found.shape == updates.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_as_the_oracle(isa, shape):
    updates = random_stack(3, *shape)
    before = updates.clone()
    assert_as_the_oracle(updates, ops.orthogonalized(updates))
    assert torch.equal(updates, before)


def test_every_rest_of_a_block(isa):
    """Of rows and columns that fill no block, no vector and no panel of any instruction set."""
    sizes = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 25, 47, 48, 49)
    for rows in sizes:
        for cols in sizes:
            updates = random_stack(1, rows, cols)
            assert_as_the_oracle(updates, ops.orthogonalized(updates, 3), 3)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 8, 100])
@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (50, 50)])
def test_any_number_of_steps(isa, shape, steps):
    updates = random_stack(2, *shape)
    # Every step magnifies what comes near a singular value's zero or its fold; after many the numbers are others.
    found = ops.orthogonalized(updates, steps)
    if steps < 100:
        assert_as_the_oracle(updates, found, steps, 1e-4)
    singular = torch.linalg.svdvals(found.double())
    assert steps == 0 or (singular.max() < 1.3 and found.isfinite().all())


def test_the_definition_by_singular_values(isa):
    """The iteration moves each singular value by the polynomial and keeps the singular vectors."""
    a, b, c = COEFFICIENTS
    for shape in ((12, 30), (30, 12)):
        update = random_stack(1, *shape, seed=3)
        u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        expected = u @ torch.diag_embed(s) @ vh
        for found in (ops.orthogonalized(update), orthogonalized(update), orthogonalized(update.double())):
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(16, 100), (100, 16), (40, 64), (64, 200), (768, 1024)])
def test_singular_values_are_near_one(isa, shape):
    singular = torch.linalg.svdvals(ops.orthogonalized(random_stack(1, *shape, seed=1)).double())
    assert 0.6 < singular.min() and singular.max() < 1.3


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_nothing(isa, shape, dtype):
    found = ops.orthogonalized(torch.empty(shape, dtype=dtype))
    assert found.shape == shape and found.dtype == dtype


@pytest.mark.parametrize("function", [ops.orthogonalized, orthogonalized])
def test_zeros_stay_zero(isa, function):
    updates = random_stack(3, 5, 8)
    updates[1] = 0.0
    assert torch.equal(function(updates)[1], torch.zeros(5, 8)) and function(updates)[2].norm() > 1


@pytest.mark.parametrize("rank", [1, 2, 10])
def test_low_rank(isa, rank):
    """Of what is in no direction of the matrix nothing is made."""
    for rows, cols in ((40, 130), (130, 40)):
        updates = random_stack(2, rows, rank) @ random_stack(2, rank, cols, seed=1)
        found = ops.orthogonalized(updates)
        assert_as_the_oracle(updates, found, atol=1e-4)
        assert (torch.linalg.svdvals(found.double()) > 0.1).sum() == 2 * rank


@pytest.mark.parametrize("function", [ops.orthogonalized, orthogonalized])
@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e20, 1e25, 3e37])
def test_the_scale_does_not_matter(isa, function, scale):
    updates = random_stack(2, 20, 33)
    found = function(updates.clamp(-4, 4) * scale)
    torch.testing.assert_close(found, function(updates.clamp(-4, 4)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("function", [ops.orthogonalized, orthogonalized])
@pytest.mark.parametrize("rows", [1, 2])
def test_below_the_least_norm_the_scale_stays(isa, function, rows):
    """Numbers of which only float32's denormals are left, too."""
    for scale in (1e-3, 1e-10):
        update = torch.zeros(1, rows, 3)
        update[0, 0, 0] = scale * LEAST_NORM
        expected = COEFFICIENTS[0] ** 5 * float(update[0, 0, 0]) / LEAST_NORM if scale < 1e-5 else None
        found = float(function(update)[0, 0, 0])
        assert found == pytest.approx(expected, rel=1e-5) if expected else 0.3 < found < 1.3


@pytest.mark.parametrize("function", [ops.orthogonalized, orthogonalized])
@pytest.mark.parametrize("shape", [(6, 70), (70, 6)])
def test_what_is_not_finite_counts_as_zero(isa, function, shape):
    updates = random_stack(2, *shape)
    spoilt, zeroed = updates.clone(), updates.clone()
    for at, value in (((0, 0, 0), math.nan), ((0, 3, 5), math.inf), ((0, 5, 2), -math.inf), ((1, -1, -1), math.nan)):
        spoilt[at], zeroed[at] = value, 0.0
    found = function(spoilt)
    assert torch.equal(found, function(zeroed)) and found.isfinite().all() and found[0].norm() > 1


@pytest.mark.parametrize("function", [ops.orthogonalized, orthogonalized])
def test_nothing_but_what_is_not_finite(isa, function):
    assert torch.equal(function(torch.full((1, 3, 4), math.nan)), torch.zeros(1, 3, 4))


VECTORS = [(1, 1, 70_000), (1, 70_000, 1)]
MATRICES = [(3, 10, 64), (1, 17, 5000), (2, 300, 310), (1, 310, 300), (5, 64, 64), (2, 5000, 40)]


@pytest.mark.parametrize("shape", VECTORS + MATRICES)
def test_the_same_bits_for_any_number_of_threads(isa, shape):
    updates, results = random_stack(*shape), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(ops.orthogonalized(updates))
    assert all(torch.equal(results[0], each) for each in results[1:])


@pytest.mark.parametrize("shape", [(10, 64), (16, 100), (65, 63), (200, 220)])
def test_the_same_bits_alone_and_anywhere_in_a_stack(isa, shape):
    updates = random_stack(7, *shape)
    whole = ops.orthogonalized(updates)
    for k in (0, 3, 6):
        assert torch.equal(ops.orthogonalized(updates[k : k + 1])[0], whole[k])
    assert torch.equal(ops.orthogonalized(updates.flip(0)).flip(0), whole)
    # Memory that is aligned to nothing but its numbers.
    shifted = torch.empty(updates.numel() + 1)[1:].view_as(updates).copy_(updates)
    assert torch.equal(ops.orthogonalized(shifted), whole)


def test_any_strides_and_lazy_negations(isa):
    updates = random_stack(3, 12, 20)
    plain = ops.orthogonalized(updates)
    for strided in (updates.mT.contiguous().mT, torch.stack([updates, updates], -1)[..., 0], torch._neg_view(-updates)):
        assert torch.equal(ops.orthogonalized(strided), plain)
    assert torch.equal(ops.orthogonalized(updates[:1].expand(3, -1, -1))[2], plain[0])


def test_whatever_the_caller_has_switched_on(isa):
    updates = random_stack(2, 20, 30)
    plain, wide = ops.orthogonalized(updates), orthogonalized(updates.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.orthogonalized(updates), plain)
        torch.testing.assert_close(orthogonalized(updates), plain, rtol=0, atol=2e-5)
    with torch.inference_mode():
        assert torch.equal(ops.orthogonalized(updates), plain)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(ops.orthogonalized(updates), plain) and torch.equal(orthogonalized(updates.double()), wide)
    finally:
        torch.set_default_dtype(torch.float32)


def test_float64_goes_through_the_oracle():
    updates = random_stack(2, 5, 9, dtype=torch.float64)
    assert torch.equal(ops.orthogonalized(updates), orthogonalized(updates))
    updates = updates.clone() * 1e200
    torch.testing.assert_close(orthogonalized(updates), orthogonalized(updates * 1e-200), rtol=0, atol=1e-12)


def test_the_oracle_has_derivatives_and_the_operator_says_that_it_has_none():
    updates = random_stack(2, 3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.orthogonalized(x, 2), updates)
    found = ops.orthogonalized(random_stack(2, 3, 5).requires_grad_())
    with pytest.raises(RuntimeError, match="_orthogonalized has no derivative"):
        found.sum().backward()


def test_the_operator_is_whole():
    """Schema, fake kernel, and no transform of torch.func that would pass it by."""
    arguments = random_stack(2, 3, 5), 5
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.l2l_fast._orthogonalized.default, arguments, test_utils=checks)
    with pytest.raises(NotImplementedError, match=re.escape("torch.func")):
        torch.func.vmap(ops.orthogonalized)(random_stack(4, 2, 3, 5))
    assert ops.orthogonalized(torch.empty(2, 3, 4, device="meta")).shape == (2, 3, 4)


@pytest.mark.parametrize("function", [ops.orthogonalized, orthogonalized])
@pytest.mark.parametrize(
    "updates, steps, error, message",
    [
        (torch.ones(3, 4), 5, ValueError, r"updates: expected shape \[K, rows, cols\], got \(3, 4\)"),
        (torch.ones(1, 2, 3, 4), 5, ValueError, r"updates: expected shape \[K, rows, cols\], got \(1, 2, 3, 4\)"),
        (torch.ones(1, 3, 4).bfloat16(), 5, TypeError, "updates: expected dtype float32 or float64, got torch.bfl"),
        (torch.ones(1, 3, 4).half(), 5, TypeError, "updates: expected dtype float32 or float64, got torch.float16"),
        (torch.ones(1, 3, 4).int(), 5, TypeError, "updates: expected dtype float32 or float64, got torch.int32"),
        (torch.ones(1, 3, 4).to_sparse(), 5, TypeError, r"updates: expected a dense \(strided\) tensor"),
        ([[1.0]], 5, TypeError, "updates: expected a tensor, got list"),
        (torch.ones(1, 3, 4), -1, ValueError, "steps: expected 0..100, got -1"),
        (torch.ones(1, 3, 4), 101, ValueError, "steps: expected 0..100, got 101"),
        (torch.ones(1, 3, 4), 5.0, TypeError, "steps: expected an int, got 5.0"),
        (torch.ones(1, 3, 4), True, TypeError, "steps: expected an int, got True"),
    ],
)
def test_refusals(function, updates, steps, error, message):
    with pytest.raises(error, match=message):
        function(updates, steps)


@pytest.mark.parametrize(
    "updates, steps, error, message",
    [
        (torch.ones(3, 4), 5, ValueError, r"updates: expected shape \[K, rows, cols\], got \[3, 4\]"),
        (torch.ones(1, 3, 4).double(), 5, TypeError, "updates: expected dtype float32, got Double"),
        (torch.ones(1, 3, 4).mT, 5, ValueError, "updates: expected a contiguous tensor"),
        (torch.ones(1, 3, 4), 101, ValueError, "steps: expected 0..100, got 101"),
        (torch.ones(1, 3, 4), -1, ValueError, "steps: expected 0..100, got -1"),
    ],
)
def test_refusals_of_the_operator_itself(updates, steps, error, message):
    with pytest.raises(error, match=message):
        torch.ops.l2l_fast._orthogonalized(updates, steps)
