"""One episode of meta-training end to end: 100 steps on the MNIST perceptron, optimizee and meta-Adam included."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import functional_call

from ...kernels.surroundings import own_loop
from ...networks.lstm import CoordinatewiseLSTM
from ...optim.optimizer import LearnedOptimizer
from ...problems import Problem
from .contenders import PlainLSTM, PlainState, compile_phi


class PlainEpisode:
    """The paper's protocol with ordinary autograd: unroll, detach the gradients, back-propagate through the unrolling.

    All tensors of the optimizee go through the network as one flat vector, the fast way to write it.
    """

    @own_loop()
    def __init__(
        self, net: CoordinatewiseLSTM, problem: Problem, horizon: int, unroll: int, compiled: bool = False
    ) -> None:
        self.task = problem.sample(0, device=net.weight_out.device)
        self.theta0 = {name: p.detach().clone() for name, p in self.task.named_parameters()}
        self.coordinates = sum(p.numel() for p in self.theta0.values())
        self.phi = PlainLSTM(net)
        self.run = compile_phi(self.phi) if compiled else self.phi
        self.phi0 = copy.deepcopy(self.phi.state_dict())
        self.horizon, self.unroll = horizon, unroll

    @own_loop()
    def __call__(self) -> None:
        self.phi.load_state_dict(self.phi0)
        meta_optimizer = torch.optim.Adam(self.phi.parameters(), lr=1e-3, fused=True)
        theta, state = self.theta0, self.phi.init_state(self.coordinates)
        for start in range(0, self.horizon, self.unroll):
            meta_optimizer.zero_grad()
            theta, state = self.segment(theta, state, min(self.unroll, self.horizon - start))
            meta_optimizer.step()

    def segment(self, theta: dict[str, Tensor], state: PlainState, steps: int) -> tuple[dict[str, Tensor], PlainState]:
        sizes = [p.numel() for p in theta.values()]
        theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
        loss, meta_loss = functional_call(self.task, theta, ()), torch.zeros((), device=state[0].device)
        for _ in range(steps):
            grads = torch.autograd.grad(loss, list(theta.values()), retain_graph=True)
            update, state = self.run(torch.cat([g.reshape(-1) for g in grads]), state)
            parts = update.split(sizes)
            theta = {name: p + u.view_as(p) for (name, p), u in zip(theta.items(), parts, strict=True)}
            loss = functional_call(self.task, theta, ())
            meta_loss = meta_loss + loss
        meta_loss.backward()
        return theta, [x.detach() for x in state]


class FusedEpisode:
    """The same protocol as one writes it with this package."""

    @own_loop()
    def __init__(self, net: CoordinatewiseLSTM, problem: Problem, horizon: int, unroll: int) -> None:
        self.net, self.task = copy.deepcopy(net), problem.sample(0, device=net.weight_out.device)
        self.theta0 = [p.detach().clone() for p in self.task.parameters()]
        self.phi0 = copy.deepcopy(net.state_dict())
        self.horizon, self.unroll = horizon, unroll

    @own_loop()
    def __call__(self) -> None:
        self.net.load_state_dict(self.phi0)
        with torch.no_grad():
            for p, p0 in zip(self.task.parameters(), self.theta0, strict=True):
                p.copy_(p0)
        meta_optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, fused=True)
        optimizer = LearnedOptimizer(self.task.parameters(), self.net)
        for start in range(0, self.horizon, self.unroll):
            meta_optimizer.zero_grad()
            optimizer.start_segment()
            for _ in range(min(self.unroll, self.horizon - start)):
                optimizer.zero_grad()
                self.task().backward()
                optimizer.step()
            optimizer.zero_grad()
            self.task().backward()
            optimizer.backward_segment()
            meta_optimizer.step()
