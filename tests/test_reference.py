"""The reference against torch.nn.LSTMCell, finite differences and a literally unrolled meta-loss, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import reference
from tests.helpers import (
    CONFIG_IDS,
    CONFIGS,
    Cells,
    assert_close,
    double,
    random_network,
    random_state,
    structured_gradient,
)


@pytest.mark.parametrize("options", CONFIGS, ids=CONFIG_IDS)
def test_step_matches_lstm_cells(options):
    net = double(random_network(**options))
    cells = Cells(net)
    grad = structured_gradient((7, 9), dtype=torch.float64)
    state = random_state(net, 63, dtype=torch.float64).to_logical()
    inputs = []
    for function in (lambda g, s: reference.step(net, g, s), cells):
        g = grad.clone().requires_grad_()
        s = [(h.detach().requires_grad_(), c.detach().requires_grad_()) for h, c in state]
        _, s_new = function(g, s)
        update, s_new = function(g, s_new)  # twice, so that the new state matters
        loss = (update * torch.linspace(-1, 2, 63).view(7, 9)).sum() + sum(((h - 0.3 * c) ** 2).sum() for h, c in s_new)
        loss.backward()
        inputs.append((update, s_new, g.grad, s))
    (update, new, g_grad, s), (update_c, new_c, g_grad_c, s_c) = inputs
    assert_close(update, update_c, 1e-12, "update")
    assert_close(g_grad, g_grad_c, 1e-12, "d grad")
    for pair, pair_c in zip([*new, *s], [*new_c, *s_c], strict=True):
        for part, part_c in zip(pair, pair_c, strict=True):
            assert_close(part, part_c, 1e-12)
            if part.is_leaf:
                assert_close(part.grad, part_c.grad, 1e-12)
    phi_grad = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert_close(phi_grad, cells.flat_gradient(), 1e-12, "d phi")


@pytest.mark.parametrize("preprocess", ["identity", "log_sign"])
def test_step_derivatives_against_finite_differences(preprocess):
    config = l2l.Config(4, 2, preprocess, 3.0, 0.7)
    phi = torch.randn(reference.phi_size(config), dtype=torch.float64).mul_(0.5).requires_grad_()
    # Away from the threshold e^-3, where the derivative jumps.
    grad = torch.tensor([0.3, -2.0, 1e-2, -3e-3, 0.4], dtype=torch.float64, requires_grad=True)
    parts = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def function(grad, phi, h0, c0, h1, c1):
        update, ((a, b), (c, d)) = reference.lstm_step(grad, [(h0, c0), (h1, c1)], phi, config)
        return update, a, b, c, d

    assert torch.autograd.gradcheck(function, (grad, phi, *parts))
    assert torch.autograd.gradgradcheck(lambda g, h: function(g, phi, h, *parts[1:])[0], (grad, parts[0]))


def test_phi_size_matches_the_published_counts():
    assert reference.phi_size(l2l.Config(20, 2, "identity", 10.0, 1.0)) == 5061
    assert reference.phi_size(l2l.Config(20, 2, "log_sign", 10.0, 1.0)) == 5141


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_sign_special_values(dtype):
    p = 10.0
    tiny, huge = torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max
    grad = torch.tensor([0.0, -0.0, tiny, -tiny, huge, -huge, math.inf, -math.inf, math.nan], dtype=dtype)
    features = reference.preprocess_gradient(grad, "log_sign", p)
    assert features[:6].isfinite().all()
    assert features[:4, 0].eq(-1).all()
    assert features[:2, 1].eq(0).all()
    torch.testing.assert_close(features[2:4, 1], math.exp(p) * grad[2:4])
    torch.testing.assert_close(features[4:6, 0], grad[4:6].abs().log() / p)
    assert features[4:8, 1].tolist() == [1, -1, 1, -1]
    assert features[6:8, 0].eq(math.inf).all()
    assert features[8].isnan().any()


def test_log_sign_is_continuous_at_the_threshold():
    p = 10.0
    threshold = math.exp(-p)
    grad = torch.tensor([threshold * (1 - 1e-9), threshold, threshold * (1 + 1e-9)], dtype=torch.float64)
    grad = torch.cat([grad, -grad]).requires_grad_()
    features = reference.preprocess_gradient(grad, "log_sign", p)
    expected = torch.tensor([[-1.0, 1.0]] * 3 + [[-1.0, -1.0]] * 3, dtype=torch.float64)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-8)


def test_log_sign_derivative_is_finite_everywhere():
    grad = torch.tensor([0.0, 1e-310, 1e-5, math.exp(-10.0), 1.0, 1e300, math.inf], dtype=torch.float64)
    grad.requires_grad_()
    reference.preprocess_gradient(grad, "log_sign", 10.0).clamp(max=1e3).sum().backward()
    assert grad.grad.isfinite().all()
    assert grad.grad[0] == math.exp(10.0)
    assert grad.grad[4] == pytest.approx(1 / 10.0)


def test_nan_stays_in_its_coordinate():
    net = random_network()
    grad = torch.tensor([0.5, math.nan, -0.1])
    update, state = reference.step(net, grad, net.init_state(3).to_logical())
    assert update.isnan().tolist() == [False, True, False]
    assert all(part[[0, 2]].isfinite().all() for pair in state for part in pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_computed_in_float32(dtype):
    net = random_network()
    grad = structured_gradient((50,)).to(dtype)
    update, state = reference.step(net, grad, net.init_state(50).to_logical())
    exact, _ = reference.step(net, grad.float(), net.init_state(50).to_logical())
    assert update.dtype == dtype and state[0][0].dtype == torch.float32
    torch.testing.assert_close(update, exact.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    "bad", ["layers", "numel", "hidden", "phi"], ids=["too few layers", "other numel", "other width", "short phi"]
)
def test_step_rejects_what_does_not_fit(bad):
    net = random_network()
    state, phi = net.init_state(5).to_logical(), net.phi()
    if bad == "layers":
        state = state[:1]
    elif bad == "numel":
        state = net.init_state(6).to_logical()
    elif bad == "hidden":
        state = [(h[:, :4], c[:, :4]) for h, c in state]
    else:
        phi = phi[:-1]
    with pytest.raises(ValueError, match="phi" if bad == "phi" else "logical_state"):
        reference.lstm_step(torch.ones(5), state, phi, net.config)


class Segment:
    """A random segment of two tensors in float64, and its meta-loss written down literally."""

    def __init__(self, options: dict, steps: int = 5) -> None:
        generator = torch.Generator().manual_seed(3)
        self.net = double(random_network(**options))
        self.shapes, self.steps = [(4, 3), (5,)], steps
        self.grads = [
            [structured_gradient(s, seed=10 * t + k, dtype=torch.float64) for k, s in enumerate(self.shapes)]
            for t in range(steps + 1)
        ]
        self.start = [
            random_state(self.net, math.prod(s), seed=k, dtype=torch.float64) for k, s in enumerate(self.shapes)
        ]
        self.start = [state.to_logical() for state in self.start]
        self.end = [
            random_state(self.net, math.prod(s), seed=9 + k, dtype=torch.float64) for k, s in enumerate(self.shapes)
        ]
        self.end = [state.to_logical() for state in self.end]
        self.weights = torch.rand(steps, generator=generator).tolist()
        self.lrs = (torch.rand(steps, generator=generator) + 0.5).tolist()
        self.decays = (1 - 0.2 * torch.rand(steps, generator=generator)).tolist()

    def loss(self, function, start) -> Tensor:
        """sum_s w_s <g_s, theta_s> + <end gradient, end state>: its derivative is that of sum_s w_s f(theta_s)."""
        total = torch.zeros((), dtype=torch.float64)
        for k, shape in enumerate(self.shapes):
            theta, state = torch.zeros(shape, dtype=torch.float64), start[k]
            for t in range(self.steps):
                update, state = function(self.grads[t][k], state)
                theta = self.decays[t] * theta + self.lrs[t] * update
                total = total + self.weights[t] * (self.grads[t + 1][k] * theta).sum()
            for pair, end in zip(state, self.end[k], strict=True):
                total = total + sum((part * e).sum() for part, e in zip(pair, end, strict=True))
        return total

    def run(self):
        return reference.segment_backward(
            self.start, self.grads, self.weights, self.lrs, self.decays, self.net.phi(), self.net.config, self.end
        )


@pytest.mark.parametrize("options", CONFIGS[:4], ids=CONFIG_IDS[:4])
def test_segment_backward_matches_the_unrolled_loss(options):
    segment = Segment(options)
    cells = Cells(segment.net)
    start = [[tuple(part.detach().requires_grad_() for part in pair) for pair in state] for state in segment.start]
    segment.loss(cells, start).backward()
    grad_phi, grad_start = segment.run()
    assert_close(grad_phi, cells.flat_gradient(), 1e-11, "d phi")
    for state, expected in zip(grad_start, start, strict=True):
        for pair, pair_expected in zip(state, expected, strict=True):
            for part, leaf in zip(pair, pair_expected, strict=True):
                assert_close(part, leaf.grad, 1e-11, "d start state")


def test_segment_backward_matches_finite_differences():
    segment = Segment(CONFIGS[2])
    config, phi = segment.net.config, segment.net.phi().detach()
    grad_phi, _ = segment.run()
    for seed in range(3):
        direction = torch.randn(phi.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values = []
        for sign in (-1, 1):
            moved = phi + sign * 1e-6 * direction
            values.append(
                segment.loss(lambda g, s, moved=moved: reference.lstm_step(g, s, moved, config), segment.start)
            )
        numeric = float(values[1] - values[0]) / 2e-6
        assert numeric == pytest.approx(float(grad_phi @ direction), rel=1e-6)


def test_segment_backward_rejects_wrong_lengths():
    segment = Segment(CONFIGS[2])
    phi, config = segment.net.phi(), segment.net.config
    with pytest.raises(ValueError, match="grads"):
        reference.segment_backward(segment.start, segment.grads[:1], [], [], [], phi, config)
    for name in ("loss_weights", "lrs", "decays"):
        values = {"loss_weights": segment.weights, "lrs": segment.lrs, "decays": segment.decays}
        values[name] = values[name][:-1]
        with pytest.raises(ValueError, match=name):
            reference.segment_backward(segment.start, segment.grads, *values.values(), phi, config)
