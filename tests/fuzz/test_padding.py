"""What states, records and gradients of states hold beyond the last coordinate reaches no result, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from tests.fuzz.cases import blocked_state, examples, networks, phi_of, seeds
from tests.helpers import random_network, structured_gradient

POISONS = (math.nan, math.inf, -math.inf, 1e30, -3.4e38)


def fill_padding(data: Tensor, numel: int, value: float) -> Tensor:
    """A copy of a state, or of anything whose last dimension is the lanes, with other padding."""
    data = data.clone()
    if numel % 64:
        data[-1, ..., numel % 64 :] = value
    return data


def coordinates(data: Tensor, numel: int) -> Tensor:
    return data.movedim(-1, 1).flatten(0, 1)[:numel]


def everything(net: l2l.CoordinatewiseLSTM, numels: list[int], seed: int, poison: float) -> list[Tensor]:
    """Results of every operator of the network, free of padding; gradients of states with theirs, which must be 0."""
    phi, steps = phi_of(net), 3
    tiles = [-(-n // 64) for n in numels]
    places = [1 + sum(tiles[:k]) for k in range(len(tiles))]
    states = [fill_padding(blocked_state(net, n, seed + k), n, poison) for k, n in enumerate(numels)]
    ends = [fill_padding(blocked_state(net, n, seed + 9 + k), n, poison) for k, n in enumerate(numels)]
    grads = [structured_gradient((n,), seed=seed + k) for k, n in enumerate(numels)]
    records = []
    for t in range(steps + 1):
        record = torch.full((sum(tiles) + 2, 64), poison)
        for k, n in enumerate(numels):
            g = torch.nn.functional.pad(structured_gradient((n,), seed=seed + 70 * t + k), (0, -n % 64))
            record[places[k] :][: tiles[k]] = fill_padding(g.view(-1, 64), n, poison)
        records.append(record.flatten())
    ones, decays = [1.0] * steps, [0.9] * steps
    results: list[Tensor] = []
    for k, n in enumerate(numels):
        extra = torch.ones(net.extra_inputs, n) if net.extra_inputs else None
        out, new = ops.step(grads[k], extra, states[k], phi, net.config)
        back = ops.step_backward(out.clone(), ends[k], grads[k], extra, states[k], phi, net.config)
        results += [out, coordinates(new, n), *back]
    if not net.extra_inputs and net.num_outputs == 1:
        means = [torch.rand(net.num_layers, 1, net.gac_cells, generator=torch.Generator().manual_seed(t))
                 for t in range(steps)]  # fmt: skip
        for end in (ends, []):
            grad_phi, starts = ops.segment_backward(
                states, numels, places, records, means, ones, ones, decays, phi, net.config, 1, end, True
            )
            results += [grad_phi, *starts]
    params, record = [torch.linspace(-1, 1, n) for n in numels], records[0].clone()
    total = sum(numels)
    extra = torch.ones(net.extra_inputs, total) if net.extra_inputs else None
    out = torch.empty(net.num_outputs, total)
    means, sums = torch.empty(net.num_layers, 1, net.gac_cells), torch.empty(2, 1, net.gac_cells).double()
    ops.step_(
        params, grads, states, phi, net.config, 1.0, 0.1, True, record=record, record_tiles=places, extra=extra,
        out=out, means=means, sums=sums,
    )  # fmt: skip
    results += [out, means, sums]
    results += [*params, *(coordinates(s, n) for s, n in zip(states, numels, strict=True))]
    # The step writes whole tiles of the record, and zeros behind the last coordinate.
    results += [record[64 * p :][: 64 * n] for p, n in zip(places, tiles, strict=True)]
    return results


def check(net: l2l.CoordinatewiseLSTM, numels: list[int], seed: int) -> None:
    clean = everything(net, numels, seed, 0.0)
    assert all(x.isfinite().all() for x in clean)
    for poison in POISONS:
        dirty = everything(net, numels, seed, poison)
        for index, (a, b) in enumerate(zip(clean, dirty, strict=True)):
            assert torch.equal(a, b), f"result {index} with {poison}"


@examples(25)
@given(net=networks(), numels=st.lists(st.sampled_from((1, 5, 63, 64, 65, 97, 130)), min_size=1, max_size=2),
       seed=st.integers(0, 999))  # fmt: skip
def test_of_plain_networks(net, numels, seed, isa):
    # Weights as drawn, but no outputs that overflow.
    check(net, numels, seed)


@pytest.mark.parametrize("extras", [(0, 1), (2, 3)])
@pytest.mark.parametrize("cells", [0, 2, 8])
def test_of_networks_with_averages(cells, extras, isa):
    net = random_network(hidden_size=8, num_layers=2, gac_cells=cells, extra_inputs=extras[0], num_outputs=extras[1])
    check(net, [70, 5, 64], 3)


@pytest.mark.parametrize("cells", [0, 2])
def test_gradients_of_start_states_have_no_padding(cells, isa):
    net = random_network(hidden_size=8, num_layers=2, gac_cells=cells)
    numel, phi = 70, phi_of(net)
    state, end = (fill_padding(blocked_state(net, numel, k), numel, math.nan) for k in (0, 1))
    records = [torch.ones(128)] * 3
    ones = [1.0, 1.0]
    means = [torch.zeros(2, 1, cells)] * 2
    _, starts = ops.segment_backward(
        [state], [numel], [0], records, means, ones, ones, ones, phi, net.config, 1, [end], True
    )
    _, _, grad_state, _ = ops.step_backward(torch.ones(1, numel), end, torch.ones(numel), None, state, phi, net.config)
    for data in (starts[0], grad_state):
        assert not data[-1, :, numel % 64 :].any() and data.isfinite().all()


@given(numel=st.integers(1, 200), seed=seeds)
def test_numels_must_fit(numel, seed):
    net = random_network(hidden_size=4, num_layers=1)
    records = [torch.zeros(64 * 4)] * 2
    state = torch.zeros(-(-numel // 64), 8, 64)
    for wrong in (-1, 0, state.shape[0] * 64 + 1, (state.shape[0] - 1) * 64, 2**62, 2**63 - 1):
        with pytest.raises(ValueError, match=r"numels\[0\]"):
            ops.segment_backward([state], [wrong], [0], records, [], [1.0], [1.0], [1.0], phi_of(net), net.config)
