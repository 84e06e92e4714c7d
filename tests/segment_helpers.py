"""What the tests of segments share: an optimizee, a recorded run, and its gradient by unrolled autograd."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import l2l_fast as l2l
from tests.helpers import Cells, double, random_network, structured_gradient

TOLERANCE = 1e-4
STATE = "lstm_state"


class Optimizee(nn.Module):
    """A small non-convex function of several tensors, with a new minibatch at every evaluation t."""

    def __init__(self, seed: int = 0, dtype=torch.float32, width: int = 9) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(width, 4), (width,), (3, width), ()]
        self.theta = nn.ParameterList(torch.randn(shape, generator=generator).mul(0.5).to(dtype) for shape in shapes)
        self.data = structured_gradient((30, 16, 4), seed=seed).clamp(-3, 3).to(dtype)

    def loss(self, t: int, theta: list[Tensor] | None = None) -> Tensor:
        w, b, v, s = theta if theta is not None else list(self.theta)
        x = self.data[t].to(w.dtype)
        return (torch.tanh(x @ w.T + b) @ v.T * s.cos() - x[:, :3]).square().mean() + 0.01 * s.square()


def record_run(
    optimizer, optimizee, steps: int, *, first: int = 0, edit=None, final: bool = True
) -> list[list[Tensor | None]]:
    """Run a segment; returns the gradients the optimizer saw at theta_0 ... theta_T."""
    seen = []
    for t in range(first, first + steps + int(final)):
        optimizer.zero_grad()
        optimizee.loss(t).backward()
        if edit is not None:
            edit(t)
        seen.append([None if p.grad is None else p.grad.detach().clone() for p in optimizee.theta])
        if t < first + steps:
            optimizer.step()
    return seen


def unrolled_gradient(
    nets, states, theta0, seen, weights, lrs, decay=0.0, sign=1.0, end_grads=None, end_params=None, start_params=None
):
    """d/d phi and d/d start state of sum_s w_s <g_s, theta_s>, autograd through torch.nn.LSTMCell in float64.

    nets: one network per tensor (may be shared); states: logical; seen: gradients per step and tensor or None;
    lrs: one per step; end_grads, end_params: per tensor or None, of the state and of theta after the last step;
    start_params: a list that d/d theta_0 is appended to, per tensor.
    """
    cells = {id(net): Cells(double(net)) for net in nets}
    total = torch.zeros((), dtype=torch.float64)
    starts, firsts = [], []
    for k, net in enumerate(nets):
        first = theta = theta0[k].double().clone().requires_grad_()
        firsts.append(first)
        state = [tuple(part.detach().double().requires_grad_() for part in pair) for pair in states[k]]
        starts.append([part for pair in state for part in pair])
        for t, lr in enumerate(lrs):
            if seen[t][k] is not None:
                update, state = cells[id(net)](sign * seen[t][k].double(), state)
                theta = theta * (1 - lr * decay) + lr * update
            if seen[t + 1][k] is not None:
                total = total + weights[t] * (seen[t + 1][k].double() * theta).sum()
        if end_grads is not None and end_grads[k] is not None:
            for pair, pair_grad in zip(state, end_grads[k], strict=True):
                total = total + sum((a * b.double()).sum() for a, b in zip(pair, pair_grad, strict=True))
        if end_params is not None and end_params[k] is not None:
            total = total + (theta * end_params[k].double()).sum()
    leaves = [leaf for start in starts for leaf in start]
    parameters = {key: list(module.parameters()) for key, module in cells.items()}
    torch.autograd.backward(total, inputs=[*leaves, *firsts, *(p for ps in parameters.values() for p in ps)])
    zero = [[torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in start] for start in starts]
    if start_params is not None:
        start_params += [torch.zeros_like(first) if first.grad is None else first.grad for first in firsts]
    return {key: module.flat_gradient() for key, module in cells.items()}, zero


class Resting:
    """A run, drawn by hypothesis, in which any parameter may rest in any step, and at theta_T.

    Attributes:
        steps; mask: ``[steps + 1][parameters]``, whether there is a gradient. net, optimizee, optimizer, theta0.
    """

    def __init__(self, data: st.DataObject) -> None:
        self.steps = data.draw(st.integers(1, 4))
        self.mask = [[data.draw(st.booleans()) for _ in range(4)] for _ in range(self.steps + 1)]
        self.mask[self.steps][data.draw(st.integers(0, 3))] = True
        self.optimizee = Optimizee(dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
        self.net = random_network(gain=1.0, hidden_size=8)
        self.theta0 = [p.detach().clone() for p in self.optimizee.theta]
        self.optimizer = l2l.LearnedOptimizer(self.optimizee.parameters(), self.net, weight_decay=0.1)

    def edit(self, t: int) -> None:
        for param, has in zip(self.optimizee.theta, self.mask[t], strict=True):
            if not has:
                param.grad = None


def net_gradient(net) -> Tensor:
    return torch.cat([each.grad.flatten() for each in net.parameters() if each.grad is not None])


def zero_states(net, optimizee):
    return [net.init_state(p.numel()).to_logical() for p in optimizee.theta]
