"""The memory stores: reads and writes against the matrix they stand for, sliding history, copies."""

from __future__ import annotations

import pytest
import torch

from l2l_fast.networks.memory import DenseMemory, LowRankMemory
from tests.helpers import assert_close

WRITE_HEADS = 2


def create(kind, n, groups, read_heads, initial, dtype=torch.float64, history=3):
    if kind == "dense":
        return DenseMemory.create(n, groups, read_heads, initial, "cpu", dtype)
    return LowRankMemory.create(n, groups, read_heads, WRITE_HEADS, history, initial, "cpu", dtype)


def vectors(heads, groups, n, seed):
    return torch.randn(heads, groups, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "functional"])
@pytest.mark.parametrize("initial", ["zero", "identity"])
@pytest.mark.parametrize(("groups", "read_heads"), [(1, 1), (1, 2), (4, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_reads_are_products_with_the_matrix(kind, groups, read_heads, initial, in_place):
    n, history, steps = 7, 3, 5
    memory = create(kind, n, groups, read_heads, initial, history=history)
    pairs = [(vectors(WRITE_HEADS, groups, n, 10 + t), vectors(WRITE_HEADS, groups, n, 50 + t)) for t in range(steps)]
    r = vectors(read_heads, groups, n, 99)
    for t, (a, b) in enumerate(pairs):
        if in_place:
            memory.write_(a, b, r)
        else:
            memory = memory.write(a, b, r)
        remembered = pairs[: t + 1] if kind == "dense" else pairs[max(0, t + 1 - history) : t + 1]
        matrix = torch.eye(n, dtype=torch.float64).repeat(groups, 1, 1) if initial == "identity" else 0
        matrix = matrix + sum(torch.einsum("hgi,hgj->gij", *pair) for pair in remembered)
        assert_close(memory.read(r), torch.einsum("gij,hgj->hgi", matrix, r), 1e-12)
        assert torch.equal(memory.reads, r)


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_an_empty_memory_is_its_initial_matrix(kind):
    r = vectors(1, 2, 5, 0)
    assert torch.equal(create(kind, 5, 2, 1, "identity").read(r), r)
    assert torch.equal(create(kind, 5, 2, 1, "zero").read(r), torch.zeros_like(r))


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
@pytest.mark.parametrize("groups", [1, 2])
def test_derivatives_against_finite_differences(kind, groups):
    """Through several writes, the ring's wrap-around included, and the reads after each."""
    inputs = [vectors(WRITE_HEADS, groups, 3, k).requires_grad_() for k in range(10)]

    def function(r, *flat):
        memory, results = create(kind, 3, groups, 1, "identity", history=3), []
        for a, b in zip(flat[::2], flat[1::2]):
            memory = memory.write(a, b, r)
            results.append(memory.read(memory.reads))
        return tuple(results)

    r = vectors(1, groups, 3, 77).requires_grad_()
    assert torch.autograd.gradcheck(function, (r, *inputs))


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_a_functional_write_leaves_the_old_memory_alone(kind):
    memory = create(kind, 4, 1, 1, "zero").write(*(vectors(2, 1, 4, k) for k in (1, 2)), vectors(1, 1, 4, 3))
    before = {name: value.clone() for name, value in memory.entries().items()}
    memory.write(*(vectors(2, 1, 4, k) for k in (4, 5)), vectors(1, 1, 4, 6))
    assert all(torch.equal(value, before[name]) for name, value in memory.entries().items())


def test_low_rank_never_forms_a_matrix():
    """Half a million coordinates: the matrix would be a terabyte."""
    n = 500_000
    memory = LowRankMemory.create(n, 1, 1, 2, 2, "zero", "cpu", torch.float32)
    a, b, r = (torch.randn(heads, 1, n) for heads in (2, 2, 1))
    memory.write_(a, b, r)
    expected = torch.einsum("hgi,hk->kgi", a.double(), torch.einsum("hgj,kgj->hk", b.double(), r.double()))
    assert_close(memory.read(memory.reads), expected, 1e-3)
