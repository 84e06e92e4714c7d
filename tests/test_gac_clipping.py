"""Global averaging cells can clip by the global norm; an LSTM whose coordinates do not communicate cannot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import l2l_fast as l2l

N, LIMIT = 40, 0.5  # of the root mean square, the norm up to sqrt(n)


def gradients(batch: int, seed: int) -> Tensor:
    """``[batch, N]`` of root mean squares from 0.05 to 2: half of them are to be clipped."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(batch, 1, generator=generator) * 1.6 - 1.3)
    return torch.randn(batch, N, generator=generator) * scale


def clipped(grad: Tensor) -> Tensor:
    """Gradient clipping by the L2 norm, problem by problem."""
    rms = grad.square().mean(1, keepdim=True).sqrt()
    return grad * (LIMIT / rms).clamp(max=1.0)


def best_without_communication(grad: Tensor) -> float:
    """The relative error of the best function of a coordinate's own gradient: its conditional mean, in fine bins."""
    x, target = grad.flatten(), clipped(grad).flatten()
    bins = (x.abs() + 1e-6).log().mul(8).round().long()
    bins = (bins - bins.min()) * 2 + (x > 0)
    ratio = torch.zeros(int(bins.max()) + 1).index_add(0, bins, target)
    mean = (ratio / torch.bincount(bins).clamp_min(1))[bins]
    return float((mean - target).norm() / target.norm())


def train(net: l2l.CoordinatewiseLSTM, steps: int = 400) -> float:
    """Relative error on fresh gradients after a short training. The gradient is shown twice: the averages of the first
    step are known in the second."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps + 1):
        grad = gradients(32 if step < steps else 256, step if step < steps else 12345)
        state = net.init_state(grad.numel())
        _, state = net(grad, state, grad.shape[0])
        update, _ = net(grad, state, grad.shape[0])
        error = (update - clipped(grad)).norm() / clipped(grad).norm()
        if step < steps:
            optimizer.zero_grad()
            error.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return error.item()


@pytest.mark.parametrize("gac_cells", [0, 2])
def test_only_communicating_coordinates_learn_to_clip(gac_cells):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    limit = best_without_communication(torch.cat([gradients(500, seed) for seed in range(20)]))
    assert 0.2 < limit < 0.6  # what no coordinate by itself can get below
    error = train(l2l.CoordinatewiseLSTM(8, 2, "log_sign", 3.0, 1.0, gac_cells))
    print(f"gac_cells={gac_cells}: relative error {error:.3f}, the limit without communication {limit:.3f}")
    if gac_cells:
        assert error < 0.5 * limit
    else:
        assert error > 0.9 * limit
    assert math.isfinite(error)
