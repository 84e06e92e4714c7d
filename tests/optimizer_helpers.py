"""What the tests of LearnedOptimizer share."""

from __future__ import annotations

import torch
from torch import nn

from l2l_fast.kernels import reference
from tests.helpers import double, structured_gradient

STATE = "lstm_state"


def parameters(*shapes: tuple[int, ...], dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_gradients(params, seed: int = 0) -> None:
    for k, param in enumerate(params):
        param.grad = structured_gradient(tuple(param.shape), seed=100 * seed + k).to(param.dtype)


def run(optimizer, params, steps: int, seed: int = 0) -> None:
    for t in range(steps):
        set_gradients(params, seed + t)
        optimizer.step()


class Oracle:
    """The same optimizer in a dozen lines of float64."""

    def __init__(self, params, net, lr=1.0, weight_decay=0.0, maximize=False):
        self.net, self.lr, self.weight_decay, self.sign = double(net), lr, weight_decay, -1.0 if maximize else 1.0
        self.params = [param.detach().double().clone() for param in params]
        self.states = [net.init_state(param.numel(), dtype=torch.float64).to_logical() for param in params]

    def step(self, grads) -> None:
        with torch.no_grad():
            for k, grad in enumerate(grads):
                if grad is not None:
                    update, self.states[k] = reference.step(self.net, self.sign * grad.double(), self.states[k])
                    self.params[k] = self.params[k] * (1 - self.lr * self.weight_decay) + self.lr * update
