"""What is compared: the learned optimizer as one writes it with torch.nn, the same under torch.compile, and fused.

A contender is built for ``n`` coordinates, one call does its work once. ``forget()`` drops everything but theta and the
gradients (what an optimizee has anyway), so that a call after it shows the memory that learned optimization adds.
All see the same gradients and, for the same network, compute the same thing: :func:`check_agreement` makes sure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...kernels.operators import has_kernel
from ...networks.lstm import CoordinatewiseLSTM
from ...optim.optimizer import LearnedOptimizer

PlainState = list[Tensor]  # h and c of layer 0, h and c of layer 1, ...: each [n, hidden_size]


class Contender(Protocol):
    def __call__(self) -> None: ...

    def forget(self) -> None: ...


class PlainLSTM(nn.Module):
    """The network of Andrychowicz et al. 2016 from nn.LSTMCell and nn.Linear, with the preprocessing of appendix A."""

    def __init__(self, net: CoordinatewiseLSTM) -> None:
        super().__init__()
        cells, self.linear = net.to_lstm_cells()
        self.cells = nn.ModuleList(cells)
        self.hidden_size, self.output_scale = net.hidden_size, net.output_scale
        self.log_sign, self.p = net.preprocess == "log_sign", net.p

    def features(self, grad: Tensor) -> Tensor:
        if not self.log_sign:
            return grad.unsqueeze(-1)
        magnitude = grad.abs()
        large = magnitude >= math.exp(-self.p)
        log_feature = torch.where(large, torch.log(magnitude.clamp_min(1e-37)) / self.p, -1.0)
        return torch.stack([log_feature, torch.where(large, grad.sign(), math.exp(self.p) * grad)], dim=-1)

    def forward(self, grad: Tensor, state: PlainState) -> tuple[Tensor, PlainState]:
        x, new_state = self.features(grad), []
        for k, cell in enumerate(self.cells):
            h, c = cell(x, (state[2 * k], state[2 * k + 1]))
            new_state += [h, c]
            x = h
        return self.output_scale * self.linear(x).squeeze(-1), new_state

    def init_state(self, n: int) -> PlainState:
        size = (n, self.hidden_size)
        return [torch.zeros(size, device=self.linear.weight.device) for _ in range(2 * len(self.cells))]

    def flat_gradient(self) -> Tensor:
        """d loss / d phi in the order of phi; each cell's two biases have the same gradient."""
        names = ("weight_ih", "weight_hh", "bias_ih")
        parts: list[Tensor] = [cell.get_parameter(name) for cell in self.cells for name in names]
        parts += [self.linear.weight, self.linear.bias]
        return torch.cat([p.grad.reshape(-1) for p in parts if p.grad is not None])


class Gradients:
    """Stands for the optimizee: ``fresh(t)`` is a new tensor with the gradient at step t.

    Magnitudes spread over seven decades as those of a real model do; two sets alternate, so that the state stays alive.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pool = []
        for _ in range(2):
            g = torch.randn(n, generator=generator)
            self.pool.append(g.mul_(10.0 ** (torch.rand(n, generator=generator) * 7 - 6)).to(device))

    def fresh(self, t: int) -> Tensor:
        return self.pool[t % 2].clone()


# ---- the step: deployment ----


class PlainStep:
    def __init__(self, net: CoordinatewiseLSTM, n: int, compiled: bool = False) -> None:
        device = net.weight_out.device
        self.phi = PlainLSTM(net)
        self.run = compile_phi(self.phi) if compiled else self.phi
        self.theta, self.grad = torch.zeros(n, device=device), Gradients(n, device).pool[0]
        self.state: PlainState | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        if self.state is None:
            self.state = self.phi.init_state(self.theta.numel())
        update, self.state = self.run(self.grad, self.state)
        self.theta.add_(update)

    def forget(self) -> None:
        self.state = None


class FusedStep:
    def __init__(self, net: CoordinatewiseLSTM, n: int) -> None:
        device = net.weight_out.device
        self.net, self.theta = net, nn.Parameter(torch.zeros(n, device=device))
        self.theta.grad = Gradients(n, device).pool[0]
        self.optimizer: LearnedOptimizer | None = None

    def __call__(self) -> None:
        if self.optimizer is None:
            self.optimizer = LearnedOptimizer([self.theta], self.net)
        self.optimizer.step()

    def forget(self) -> None:
        self.optimizer = None


class AdamStep:
    """torch.optim.Adam(fused=True), for scale: the cheapest update that people use."""

    def __init__(self, net: CoordinatewiseLSTM, n: int) -> None:
        device = net.weight_out.device
        self.theta = nn.Parameter(torch.zeros(n, device=device))
        self.theta.grad = Gradients(n, device).pool[0]
        self.forget()

    def __call__(self) -> None:
        self.optimizer.step()

    def forget(self) -> None:
        self.optimizer = torch.optim.Adam([self.theta], lr=1e-3, fused=True)


# ---- an unrolled segment: meta-training ----


class PlainSegment:
    """Back-propagation through ``steps`` unrolled steps by autograd, gradients of the optimizee detached (eq. 3)."""

    def __init__(self, net: CoordinatewiseLSTM, n: int, steps: int, compiled: bool = False) -> None:
        device = net.weight_out.device
        self.phi = PlainLSTM(net)
        self.run = compile_phi(self.phi) if compiled else self.phi
        self.theta, self.gradients, self.steps = torch.zeros(n, device=device), Gradients(n, device), steps
        self.state: PlainState | None = None

    def __call__(self) -> None:
        state = self.state or self.phi.init_state(self.theta.numel())
        self.phi.zero_grad()
        theta, grad = self.theta, self.gradients.fresh(0)
        meta_loss: Tensor | float = 0.0
        for t in range(self.steps):
            update, state = self.run(grad, state)
            theta = theta + update
            grad = self.gradients.fresh(t + 1)
            # f(theta), as far as its gradient goes. A real optimizee would be differentiated a second time here.
            meta_loss = meta_loss + torch.dot(grad, theta)
        meta_loss.backward()  # type: ignore[union-attr]
        self.theta, self.state = theta.detach(), [x.detach() for x in state]

    def forget(self) -> None:
        self.state = None
        self.phi.zero_grad()

    def meta_gradient(self) -> Tensor:
        return self.phi.flat_gradient()


class FusedSegment:
    """The same with in-place steps and one segment backward."""

    def __init__(self, net: CoordinatewiseLSTM, n: int, steps: int) -> None:
        device = net.weight_out.device
        self.net, self.theta = net, nn.Parameter(torch.zeros(n, device=device))
        self.gradients, self.steps = Gradients(n, device), steps
        self.theta.grad = self.gradients.fresh(0)
        self.optimizer: LearnedOptimizer | None = None

    def __call__(self) -> None:
        if self.optimizer is None:
            self.optimizer = LearnedOptimizer([self.theta], self.net)
        self.net.zero_grad()
        self.optimizer.start_segment()
        for t in range(self.steps):
            self._backward(t)
            self.optimizer.step()
        self._backward(self.steps)
        self.optimizer.backward_segment()

    def _backward(self, t: int) -> None:
        self.theta.grad = None
        self.theta.grad = self.gradients.fresh(t)

    def forget(self) -> None:
        self.optimizer = None
        self.net.zero_grad()

    def meta_gradient(self) -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in self.net.parameters() if p.grad is not None])


def build(measure: str, contender: str, net: CoordinatewiseLSTM, n: int, steps: int) -> Any:
    """``measure``: "step" or "segment"; ``contender``: "eager", "compile", "fused" or (step) "adam"."""
    if contender == "adam":
        return AdamStep(net, n)
    if contender == "fused":
        return FusedStep(net, n) if measure == "step" else FusedSegment(net, n, steps)
    compiled = contender == "compile"
    return PlainStep(net, n, compiled) if measure == "step" else PlainSegment(net, n, steps, compiled)


def make_network(
    device: torch.device, hidden_size: int = 20, num_layers: int = 2, gac_cells: int = 0
) -> CoordinatewiseLSTM:
    """The paper's network with fixed random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CoordinatewiseLSTM(hidden_size, num_layers, gac_cells=gac_cells).to(device)


def fused_runs_on(device: torch.device) -> bool:
    return has_kernel("step_", device)


def check_agreement(net: CoordinatewiseLSTM, n: int = 1000, steps: int = 5) -> float:
    """Largest relative difference between plain and fused theta and meta-gradient after one segment.

    Raises:
        RuntimeError: they are not the same computation, so that comparing their speed would mean nothing.
    """
    plain, fused = PlainSegment(net, n, steps), FusedSegment(net, n, steps)
    plain()
    fused()
    pairs = [(plain.theta, fused.theta.detach()), (plain.meta_gradient(), fused.meta_gradient())]
    difference = max(float((a - b).norm() / a.norm()) for a, b in pairs)
    if not difference < 1e-4:
        raise RuntimeError(f"plain PyTorch and the fused kernels disagree by {difference:.1e} (relative)")
    return difference


def compile_phi(phi: nn.Module) -> Callable[..., Any]:
    # Fixed shapes give the fastest code. Code compiled for another number of threads must not be reused.
    torch._dynamo.reset()
    return torch.compile(phi, dynamic=False, fullgraph=True)
