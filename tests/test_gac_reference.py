"""Averaging cells, extra inputs and several outputs in the reference, against the definition written as loops."""

from __future__ import annotations

import pytest
import torch

from l2l_fast.kernels import reference
from tests.gac_helpers import GAC_CONFIGS, GAC_IDS, extra_for, gac_network
from tests.helpers import Cells, assert_close, double, random_network, random_state, structured_gradient


def literal_step(net, grad, state, groups, extra):
    """Appendix D, coordinate by coordinate and problem by problem."""
    weights = reference.unpack_phi(net.phi(), net.config)
    numel, hidden = grad.numel(), net.hidden_size
    features = reference.preprocess_gradient(grad.reshape(-1), net.preprocess, net.p)
    xs = [features[i] for i in range(numel)]
    if extra is not None:
        xs = [torch.cat([x, extra.reshape(extra.shape[0], -1)[:, i]]) for i, x in enumerate(xs)]
    new_state = []
    for (weight_ih, weight_hh, bias), (h, c) in zip(weights.layers, state):
        new_h, new_c = [], []
        for n in range(numel):
            gates = weight_ih @ xs[n] + weight_hh @ h[n] + bias
            i, f, g, o = (gates[j * hidden : (j + 1) * hidden] for j in range(4))
            new_c.append(f.sigmoid() * c[n] + i.sigmoid() * g.tanh())
            new_h.append(o.sigmoid() * new_c[-1].tanh())
        size = numel // groups
        for start in range(0, numel, size):
            members = new_h[start : start + size]
            for k in range(net.gac_cells):
                mean = sum(member[k] for member in members) / size
                for member in members:
                    member[k] = mean
        xs = new_h
        new_state.append((torch.stack(new_h), torch.stack(new_c)))
    out = torch.stack([weights.weight_out @ x + weights.bias_out for x in xs], dim=1)
    out[0] *= net.output_scale
    return out, new_state


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("options", GAC_CONFIGS, ids=GAC_IDS)
@torch.no_grad()
def test_step_is_the_definition(options, groups):
    net = double(random_network(**options))
    grad = structured_gradient((3, 4), dtype=torch.float64)
    state = random_state(net, 12, dtype=torch.float64).to_logical()
    extra = extra_for(net, (3, 4), dtype=torch.float64)
    expected, new_expected = literal_step(net, grad, state, groups, extra)
    out, new = reference.step(net, grad, state, groups, extra)
    assert_close(out.reshape(expected.shape), expected, 1e-12)
    for pair, pair_expected in zip(new, new_expected, strict=True):
        for part, part_expected in zip(pair, pair_expected, strict=True):
            assert_close(part, part_expected, 1e-12)


def test_without_averaging_cells_it_is_torchs_lstm():
    net = double(random_network(extra_inputs=2, num_outputs=3, output_scale=1.0, preprocess="identity"))
    grad, extra = torch.randn(5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    state = random_state(net, 5, dtype=torch.float64).to_logical()
    cells = Cells(net)
    x, pairs = torch.cat([grad[None], extra]).T, []
    for cell, pair in zip(cells.cells, state, strict=True):
        pairs.append(cell(x, pair))
        x = pairs[-1][0]
    out, new = reference.step(net, grad, state, extra=extra)
    assert_close(out, cells.linear(x).T, 1e-12)
    assert_close(new[1][1], pairs[1][1], 1e-12)


def test_derivatives_against_finite_differences():
    net = double(gac_network(hidden_size=4, gac_cells=2, extra_inputs=1, num_outputs=3, preprocess="identity"))
    grad = torch.randn(6, dtype=torch.float64, requires_grad=True)
    extra = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    parts = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    phi = net.phi().detach().requires_grad_()

    def function(grad, extra, phi, h0, c0, h1, c1):
        out, ((a, b), (c, d)) = reference.lstm_step(grad, [(h0, c0), (h1, c1)], phi, net.config, 2, extra)
        return out, a, b, c, d

    assert torch.autograd.gradcheck(function, (grad, extra, phi, *parts))


def test_a_mean_over_several_tensors_is_that_over_their_concatenation():
    numels, groups = [4, 6, 2], 2
    parts = [torch.arange(n, dtype=torch.float64) + 100 * k for k, n in enumerate(numels)]
    joined = reference.join(parts, groups)
    assert joined.tolist() == [0, 1, 100, 101, 102, 200, 2, 3, 103, 104, 105, 201]
    for part, back in zip(parts, reference.separate(joined, numels, groups), strict=True):
        assert torch.equal(part, back)


def test_segment_backward_is_the_unrolled_meta_loss():
    """Two tensors, two problems, one step in which the second tensor stands still."""
    net = double(gac_network(hidden_size=5, gac_cells=2))
    groups, steps, numels = 2, 4, [6, 4]
    torch.manual_seed(1)
    grads = [[torch.randn(n, dtype=torch.float64) for n in numels] for _ in range(steps + 1)]
    grads[2][1] = None
    w, lrs, decays = [0.5, 2.0, 1.0, 0.7], [1.0, 0.5, 0.3, 2.0], [0.9, 1.0, 0.8, 1.0]
    starts = [random_state(net, n, seed=k, dtype=torch.float64).to_logical() for k, n in enumerate(numels)]
    ends = [random_state(net, n, seed=9 + k, dtype=torch.float64).to_logical() for k, n in enumerate(numels)]
    phi = net.phi().detach()
    grad_phi, grad_starts = reference.segment_backward(
        starts, grads, w, lrs, decays, phi, net.config, ends, num_problems=groups
    )

    phi = phi.requires_grad_()
    leaves = [[(h.clone().requires_grad_(), c.clone().requires_grad_()) for h, c in state] for state in starts]
    theta, states, loss = [torch.zeros(n, dtype=torch.float64) for n in numels], list(leaves), 0.0
    for t in range(steps):
        moving = [k for k in range(2) if grads[t][k] is not None]
        g = reference.join([grads[t][k] for k in moving], groups)
        state = reference.join_states([states[k] for k in moving], groups)
        update, state = reference.lstm_step(g, state, phi, net.config, groups)
        sizes = [numels[k] for k in moving]
        for k, u, new in zip(
            moving, reference.separate(update, sizes, groups), reference.separate_states(state, sizes, groups)
        ):
            theta[k] = decays[t] * theta[k] + lrs[t] * u
            states[k] = new
        for k in range(2):
            if grads[t + 1][k] is not None:
                loss = loss + w[t] * (theta[k] * grads[t + 1][k]).sum()
    for state, end in zip(states, ends):
        for pair, pair_end in zip(state, end):
            loss = loss + sum((part * part_end).sum() for part, part_end in zip(pair, pair_end))
    loss.backward()
    assert_close(grad_phi, phi.grad, 1e-12)
    for grad_state, state in zip(grad_starts, leaves):
        for pair, pair_leaf in zip(grad_state, state):
            for part, leaf in zip(pair, pair_leaf):
                assert_close(part, leaf.grad, 1e-12)


def test_wrong_arguments_are_refused():
    net = gac_network(extra_inputs=1)
    state = net.init_state(6).to_logical()
    with pytest.raises(ValueError, match="extra"):
        reference.step(net, torch.ones(6), state)
    with pytest.raises(ValueError, match="num_problems"):
        reference.step(net, torch.ones(6), state, 4, torch.ones(1, 6))
    with pytest.raises(ValueError, match="config"):
        reference.segment_backward([state], [[torch.ones(6)]] * 2, [1.0], [1.0], [1.0], net.phi(), net.config)
