"""Tiles that are mostly padding: only the vectors of lanes that hold coordinates are computed, and what a coordinate
gets does not depend on how many others are in its tile. Segments of every length around those that fit a scratch."""

from __future__ import annotations

import math

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from l2l_fast.kernels.state_types import seed_of, zeros
from tests.helpers import assert_close, phi_of, random_network, random_state, structured_gradient
from tests.ops_helpers import means_of, segment_inputs, valid_lanes

SIZES = [1, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65]
KINDS = {
    "plain": {},
    "odd": {"hidden_size": 7, "num_layers": 3, "preprocess": "identity"},
    "outputs": {"extra_inputs": 2, "num_outputs": 3},
    "normalized": {"preprocess": "normalized", "tensor_inputs": 3},
}
WHOLE = 128


def common_of(net) -> dict:
    if not net.config.averages:
        return {}
    return {"ages": [4], "tensor_inputs": torch.tensor([[0.3, -0.2, 1.0]]), "nominal": None}


def head(state: l2l.State, numel: int) -> l2l.State:
    """The first coordinates of a state, with padding that would be noticed."""
    data = state.data[: (numel + 63) // 64].clone()
    if numel % 64:
        data[-1, :, numel % 64 :] = math.nan
    return l2l.State(data, numel, state.hidden_size, state.num_layers, state.averages, state.age)


@pytest.mark.parametrize("kind", KINDS)
def test_a_coordinate_does_not_see_how_many_share_its_tile(kind, isa):
    net = random_network(**KINDS[kind])
    common = common_of(net)
    grad, state = structured_gradient((WHOLE,)), random_state(net, WHOLE)
    extra = torch.randn(net.extra_inputs, WHOLE) if net.extra_inputs else None
    out, new = ops.step(grad, extra, state.data, phi_of(net), net.config, **common)
    upstream, end = torch.randn_like(out), random_state(net, WHOLE, seed=5)
    d_grad, d_extra, d_state, _ = ops.step_backward(
        upstream, end.data, grad, extra, state.data, phi_of(net), net.config, **common
    )
    for n in SIZES:
        own, more = head(state, n), None if extra is None else extra[:, :n].contiguous()
        out_n, new_n = ops.step(grad[:n], more, own.data, phi_of(net), net.config, **common)
        assert torch.equal(out_n, out[:, :n]), n
        assert torch.equal(valid_lanes(new_n, n), valid_lanes(new, n)), n
        part = (upstream[:, :n].contiguous(), head(end, n).data, grad[:n], more, own.data, phi_of(net), net.config)
        d_grad_n, d_extra_n, d_state_n, d_phi_n = ops.step_backward(*part, **common)
        assert torch.equal(d_grad_n, d_grad[:n]) and torch.equal(d_extra_n, d_extra[..., :n]), n
        assert torch.equal(valid_lanes(d_state_n, n), valid_lanes(d_state, n)) and d_phi_n.isfinite().all(), n
        if kind == "outputs":
            continue
        param, held = torch.zeros(n), own.data.clone()
        ops.step_([param], [grad[:n]], [held], phi_of(net), net.config, 1.0, 0.0, False, **common)
        assert torch.equal(param, out[0, :n]) and torch.equal(valid_lanes(held, n), valid_lanes(new, n)), n


@pytest.mark.parametrize("kind", ["plain", "odd", "normalized"])
def test_many_small_tensors_are_one_large_one(kind, isa):
    """One launch with every size: each tensor as if it were alone, and as the head of a large one."""
    net = random_network(**KINDS[kind])
    common = common_of(net)
    each = {name: value if value is None else [*value] * len(SIZES) for name, value in common.items()}
    if common:
        each["tensor_inputs"] = common["tensor_inputs"].expand(len(SIZES), -1).contiguous()
    grad, start = structured_gradient((WHOLE,)), random_state(net, WHOLE)
    params, states = [torch.zeros(n) for n in SIZES], [head(start, n).data for n in SIZES]
    whole, state = torch.zeros(WHOLE), start.data.clone()
    ops.step_([whole], [grad], [state], phi_of(net), net.config, 1.0, 0.0, False, **common)
    grads = [grad[:n] for n in SIZES]
    ops.step_(params, grads, states, phi_of(net), net.config, 1.0, 0.0, False, **each)
    for n, param, data in zip(SIZES, params, states, strict=True):
        assert torch.equal(param, whole[:n]), n
        assert torch.equal(valid_lanes(data, n), valid_lanes(state, n)), n


def test_bfloat16_states_of_small_tensors(isa):
    """Their rounding is by place, so that it is the same in a tile of any number of coordinates."""
    net = random_network()
    grad = structured_gradient((WHOLE,))
    found = {}
    for n in (*SIZES, WHOLE):
        param, state = torch.zeros(n), zeros(n, net.config, torch.bfloat16)
        for t in range(3):
            ops.step_([param], [grad[:n]], [state], phi_of(net), net.config, 1.0, 0.0, False, seeds=[seed_of(0, t + 1)])
        found[n] = param
    for n in SIZES:
        assert torch.equal(found[n], found[WHOLE][:n]), n


def test_int8_states_of_small_tensors_repeat(isa):
    """A row's step is that of its own coordinates; what is beside them is defined, and reaches nothing."""
    net = random_network()
    for n in SIZES:
        results = []
        for junk in (0, 77):
            param, state = torch.zeros(n), zeros(n, net.config, torch.int8)
            if n % 64:
                state[-1].view(-1)[: 2 * net.num_layers * net.hidden_size * 64].view(-1, 64)[:, n % 64 :] = junk
            for t in range(3):
                ops.step_(
                    [param], [structured_gradient((n,), seed=t)], [state], phi_of(net), net.config, 1.0, 0.0, False,
                    seeds=[seed_of(0, t + 1)],
                )  # fmt: skip
            results.append(param)
        assert torch.equal(*results) and results[0].abs().sum() > 0, n


@pytest.mark.parametrize(
    ("steps", "cells"), [*((t, 0) for t in (1, 2, 10, 11, 20, 21, 22, 41, 42, 43, 50)), (1, 3), (2, 3), (22, 3)]
)
def test_segments_around_the_length_of_a_chunk(steps, cells, isa):
    """Chunks are of 21 steps, the first one shorter; up to 10 steps, both halves of a tile are in the scratch."""
    net = random_network(gain=1.0, gac_cells=cells)
    sizes = [64, 1, 33, 32, 15, 16, 17, 31, 63, 65]
    places, records, grads, weights, lrs, decays, starts, ends = segment_inputs(net, steps, sizes)
    means = means_of(net, sizes, grads, starts) if cells else []
    for state in starts:
        if state.numel % 64:
            state.data[-1, :, state.numel % 64 :] = math.nan
    expected_phi, expected_start = reference.segment_backward(
        [s.to(torch.float64).to_logical() for s in starts], grads, weights, lrs, decays, phi_of(net).double(),
        net.config, [s.to(torch.float64).to_logical() for s in ends],
    )  # fmt: skip
    arguments = ([s.data for s in starts], sizes, places, records, means, weights, lrs, decays, phi_of(net), net.config)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.segment_backward(*arguments, 1, [s.data for s in ends], True))
    grad_phi, grad_start = results[0]
    assert_close(grad_phi, expected_phi, 1e-4, "d phi")
    for k, n in enumerate(sizes):
        logical = l2l.State(grad_start[k], n, net.hidden_size, net.num_layers).to_logical()
        for pair, pair_expected in zip(logical, expected_start[k], strict=True):
            for part, part_expected in zip(pair, pair_expected, strict=True):
                assert_close(part, part_expected, 1e-4, f"d start {k}")
    for other_phi, other_start in results[1:]:
        assert torch.equal(other_phi, grad_phi)
        assert all(torch.equal(a, b) for a, b in zip(other_start, grad_start, strict=True))


def test_communicating_segment_of_more_states_than_are_kept():
    """Of 39 MB of states only those before the chunks and of one chunk are kept; of each half, a problem, all are."""
    net = random_network(hidden_size=64, num_layers=4, gac_cells=2)
    steps, half = 50, 190
    kept, tile = 24 << 20, 64 * 4 * net.config.num_layers * 2 * net.config.hidden_size  # bytes
    assert steps * math.ceil(half / 64) * tile < kept < steps * math.ceil(2 * half / 64) * tile
    grads = [structured_gradient((2 * half,), seed=t) for t in range(steps + 1)]
    start, means = random_state(net, 2 * half), [torch.rand(4, 2, 2) - 0.5 for _ in range(steps)]
    ones = [1.0] * steps

    def segment(parts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.cat([torch.arange(half * p, half * (p + 1)) for p in parts])
        records = [torch.zeros((len(chosen) + 63) // 64 * 64) for _ in grads]
        for record, grad in zip(records, grads, strict=True):
            record[: len(chosen)] = grad[chosen]
        state = l2l.State.from_logical([(h[chosen], c[chosen]) for h, c in start.to_logical()])
        of_parts = [mean[:, parts].contiguous() for mean in means]
        d_phi, (d_start,) = ops.segment_backward(
            [state.data], [len(chosen)], [0], records, of_parts, ones, ones, ones, phi_of(net), net.config,
            len(parts), [], True,
        )  # fmt: skip
        return d_phi, valid_lanes(d_start, len(chosen))

    d_phi, d_start = segment([0, 1])
    halves = [segment([0]), segment([1])]
    assert_close(d_phi, halves[0][0] + halves[1][0], 1e-5, "d phi")
    assert_close(d_start, torch.cat([halves[0][1], halves[1][1]]), 1e-5, "d start")
