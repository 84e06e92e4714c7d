"""The segment backward operator against the float64 reference, for every instruction set."""

from __future__ import annotations

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from tests.gac_helpers import GAC_CONFIGS, GAC_IDS
from tests.helpers import (
    CONFIG_IDS,
    CONFIGS,
    assert_close,
    phi_of,
    random_network,
    random_state,
    structured_gradient,
)
from tests.ops_helpers import (
    SEGMENT_CONFIGS,
    SEGMENT_IDS,
    means_of,
    segment_inputs,
    states_of,
)


@pytest.mark.parametrize("options", SEGMENT_CONFIGS, ids=SEGMENT_IDS)
@pytest.mark.parametrize(("steps", "injected"), [(1, True), (6, False), (6, True)])
def test_segment_backward(options, steps, injected, isa):
    net = random_network(gain=1.0, **options)
    sizes = [65, 1, 0, 128, 30]
    places, records, grads, weights, lrs, decays, starts, ends = segment_inputs(net, steps, sizes)
    for state in starts:  # padding may hold anything
        if state.numel % 64:
            state.data[-1, :, state.numel % 64 :] = 3.0
    wide = [s.to(torch.float64).to_logical() for s in ends]
    expected_phi, expected_start = reference.segment_backward(
        [s.to(torch.float64).to_logical() for s in starts],
        grads,
        weights,
        lrs,
        decays,
        phi_of(net).double(),
        net.config,
        wide if injected else None,
    )
    arguments = (
        [s.data for s in starts],
        sizes,
        places,
        records,
        means_of(net, sizes, grads, starts) if net.gac_cells else [],
        weights,
        lrs,
        decays,
        phi_of(net),
        net.config,
        1,
        [s.data for s in ends] if injected else [],
    )
    grad_phi, grad_start = ops.segment_backward(*arguments, True)
    assert_close(grad_phi, expected_phi, 1e-4, "d phi")
    for k, n in enumerate(sizes):
        logical = l2l.State(grad_start[k], n, net.hidden_size, net.num_layers).to_logical()
        for pair, pair_expected in zip(logical, expected_start[k], strict=True):
            for part, part_expected in zip(pair, pair_expected, strict=True):
                assert_close(part, part_expected, 1e-4, f"d start {k}")
    again, nothing = ops.segment_backward(*arguments, False)
    assert torch.equal(again, grad_phi) and nothing == []


@pytest.mark.parametrize("problems", [1, 2])
@pytest.mark.parametrize("options", [*CONFIGS[:4], *GAC_CONFIGS[:4]], ids=[*CONFIG_IDS[:4], *GAC_IDS[:4]])
def test_steps_in_place_and_segment_backward_of_several_problems(options, problems):
    """T steps of two tensors through the raw operators, then the meta-gradient, against float64."""
    net = random_network(**options)
    shapes, steps = [(2, 45), (4, 7)], 5
    numels = [90, 28]
    params = [torch.randn(shape) for shape in shapes]
    starts = states_of(net, numels, problems)
    states = [start.clone() for start in starts]
    phi = net.phi().detach()
    exact = [p.double() for p in params]
    exact_states = [s.to(torch.float64).to_logical() for s in starts]
    records, means, tiles = [], [], [0, 2]
    grads = [[structured_gradient(s, seed=9 * t + k) for k, s in enumerate(shapes)] for t in range(steps + 1)]
    for t in range(steps):
        record = torch.empty(64 * 3)
        mean = torch.empty(net.num_layers, problems, net.gac_cells)
        sums = torch.empty(2, problems, net.gac_cells, dtype=torch.float64)
        data = [state.data for state in states]
        ops.step_(
            params, grads[t], data, phi, net.config, 0.5, 0.1, False, record=record, record_tiles=tiles,
            num_problems=problems, means=mean, sums=sums,
        )  # fmt: skip
        records.append(record)
        means.append(mean)
        g = reference.join([x.double().flatten() for x in grads[t]], problems)
        joint = reference.join_states(exact_states, problems)
        update, joint = reference.lstm_step(g, joint, phi.double(), net.config, problems)
        exact_states = reference.separate_states(joint, numels, problems)
        for k, u in enumerate(reference.separate(update, numels, problems)):
            exact[k] = exact[k] * 0.95 + 0.5 * u.view(shapes[k])
        for layer, (h, _) in enumerate(joint):
            expected = h.view(problems, -1, net.hidden_size)[:, 0, : net.gac_cells]
            assert_close(mean[layer], expected, 2e-5, f"means of layer {layer}")
    for param, value in zip(params, exact, strict=True):
        assert_close(param, value, 2e-5, "theta")
    last = torch.zeros(64 * 3)
    for k, place in enumerate((0, 128)):
        last[place : place + numels[k]] = grads[steps][k].flatten()
    ends = [random_state(net, n, seed=3 + k) for k, n in enumerate(numels)]
    w = [1.0, 0.5, 2.0, 1.0, 3.0]
    grad_phi, grad_starts = ops.segment_backward(
        [s.data for s in starts], numels, tiles, [*records, last], means, w, [0.5] * steps, [0.95] * steps, phi,
        net.config, problems, [s.data for s in ends], True,
    )  # fmt: skip
    expected_phi, expected_starts = reference.segment_backward(
        [s.to(torch.float64).to_logical() for s in starts],
        [[g.double() for g in each] for each in grads],
        w,
        [0.5] * steps,
        [0.95] * steps,
        phi.double(),
        net.config,
        [s.to(torch.float64).to_logical() for s in ends],
        problems,
    )
    assert_close(grad_phi, expected_phi, 1e-4, "d phi")
    for data, start, expected in zip(grad_starts, starts, expected_starts, strict=True):
        for pair, pair_expected in zip(start._like(data).to_logical(), expected, strict=True):
            for part, part_expected in zip(pair, pair_expected, strict=True):
                assert_close(part, part_expected, 1e-4, "d start")
