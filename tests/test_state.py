"""The blocked layout of the state and its conversions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import l2l_fast as l2l
from l2l_fast.kernels.state import TILE, num_tiles

SIZES = [0, 1, 63, 64, 65, 1000]


def logical(numel: int, hidden: int, layers: int, dtype=torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(numel, hidden, dtype=dtype), torch.randn(numel, hidden, dtype=dtype)) for _ in range(layers)]


@given(
    numel=st.one_of(st.sampled_from(SIZES), st.integers(0, 300)),
    hidden=st.integers(4, 64),
    layers=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_logical_round_trip(numel, hidden, layers, dtype):
    pairs = logical(numel, hidden, layers, dtype)
    state = l2l.State.from_logical(pairs)
    assert state.data.shape == (num_tiles(numel), 2 * layers * hidden, TILE) and state.data.is_contiguous()
    assert (state.numel, state.hidden_size, state.num_layers, state.dtype) == (numel, hidden, layers, dtype)
    for pair, expected in zip(state.to_logical(), pairs, strict=True):
        for part, part_expected in zip(pair, expected, strict=True):
            assert torch.equal(part, part_expected)


def test_layout_is_the_one_the_kernels_use():
    assert l2l._C.TILE == TILE
    pairs = logical(130, 5, 2)
    data = l2l.State.from_logical(pairs).data
    for j in (0, 63, 64, 129):
        lane = data[j // 64, :, j % 64]
        assert torch.equal(lane, torch.cat([part[j] for pair in pairs for part in pair]))
    assert data[2, :, 2:].eq(0).all()


@pytest.mark.parametrize("numel", SIZES)
def test_zeros(numel):
    state = l2l.State.zeros(numel, 4, 2)
    assert state.data.shape == (num_tiles(numel), 16, 64) and state.data.eq(0).all()


def test_conversions_are_differentiable():
    pairs = [tuple(part.double().requires_grad_() for part in pair) for pair in logical(70, 4, 2)]
    flat = [part for pair in pairs for part in pair]

    def round_trip(*parts):
        state = l2l.State.from_logical(list(zip(parts[::2], parts[1::2], strict=True)))
        return tuple(part for pair in state.to_logical() for part in pair)

    weights = [torch.randn_like(part) for part in flat]
    sum((w * part).sum() for w, part in zip(weights, round_trip(*flat), strict=True)).backward()
    assert all(torch.equal(part.grad, w) for part, w in zip(flat, weights, strict=True))


@pytest.mark.parametrize("numel", [1, 64, 65])
def test_logical_parts_are_copies(numel):
    state = l2l.State.from_logical(logical(numel, 4, 1))
    [(h, _)] = state.to_logical()
    kept = h.clone()
    state.data.zero_()
    assert torch.equal(h, kept)


def test_clone_detach_to():
    state = l2l.State.from_logical(logical(3, 4, 1))
    state.data.requires_grad_()
    clone, detached, wide = state.clone(), state.detach(), state.to(torch.float64)
    assert clone.data.data_ptr() != state.data.data_ptr() and clone.data.requires_grad
    assert detached.data.data_ptr() == state.data.data_ptr() and not detached.data.requires_grad
    assert wide.dtype == torch.float64 and wide.numel == 3
    assert repr(state).startswith("State(numel=3, hidden_size=4, num_layers=1")


def test_copies_and_pickles():
    state = l2l.State.from_logical(logical(67, 4, 2))
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(other.data, state.data) and other.numel == 67 and other.num_layers == 2
        assert other.data.data_ptr() != state.data.data_ptr()


def test_is_a_pytree():
    state = l2l.State.from_logical(logical(67, 4, 2))
    leaves, spec = pytree.tree_flatten({"s": state})
    assert len(leaves) == 1 and leaves[0] is state.data
    assert pytree.tree_unflatten(leaves, spec)["s"].numel == 67
    doubled = pytree.tree_map(lambda x: 2 * x, state)
    assert isinstance(doubled, l2l.State) and torch.equal(doubled.data, 2 * state.data)
    assert pytree.tree_map(lambda x: None, state).data is None  # any leaf must go through


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([], ValueError, "at least one"),
        (torch.zeros(2, 2), TypeError, "sequence"),
        ([torch.zeros(2, 2)], TypeError, "pair"),
        ([(torch.zeros(2, 2),)], TypeError, "pair"),
        ([(torch.zeros(2, 2), None)], TypeError, "tensor"),
        ([(torch.zeros(2), torch.zeros(2))], ValueError, "numel, hidden_size"),
        ([(torch.zeros(2, 2), torch.zeros(3, 2))], ValueError, r"layers\[0\] c"),
        ([(torch.zeros(2, 2), torch.zeros(2, 2).double())], TypeError, "float32"),
        ([(torch.zeros(2, 2).half(), torch.zeros(2, 2).half())], TypeError, "float32 or float64"),
        ([(torch.zeros(2, 2), torch.zeros(2, 2, device="meta"))], ValueError, "device"),
    ],
)
def test_from_logical_rejects(layers, error, message):
    with pytest.raises(error, match=message):
        l2l.State.from_logical(layers)


def test_constructor_rejects():
    with pytest.raises(ValueError, match=r"data: expected shape \(2, 8, 64\)"):
        l2l.State(torch.zeros(1, 8, 64), 65, 4, 1)
    with pytest.raises(TypeError, match="float32 or float64"):
        l2l.State(torch.zeros(1, 8, 64, dtype=torch.bfloat16), 1, 4, 1)
    with pytest.raises(ValueError, match="numel"):
        l2l.State.zeros(-1, 4, 1)
