"""What a network offers decides how it is stepped, not its class: optimizers and episodes take any kind alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta.estimators.walkers import walkers
from l2l_fast.networks.memory import DenseMemory
from l2l_fast.problems import Quadratic
from tests.gac_helpers import gac_network
from tests.helpers import random_network


class WithMemory(l2l.CoordinatewiseLSTM):
    """A network of another kind: its memory is a matrix that nothing is ever written to, the identity."""

    communicates = has_memory = True

    def __init__(self) -> None:
        super().__init__(hidden_size=8, extra_inputs=1)

    def memory_for(self, numel, num_problems=1, device=None, dtype=torch.float32, entries=None):
        if entries:
            return DenseMemory(entries["memory_matrix"], entries["memory_reads"], "identity")
        memory = DenseMemory.create(numel // num_problems, num_problems, 1, "identity", device or "cpu", dtype)
        memory.reads.fill_(0.5)
        return memory

    def step_with(self, grad, state, num_problems, memory):
        extra = memory.read(memory.reads).reshape(1, *grad.shape)
        return (*self(grad, state, num_problems, extra), memory)

    def write_(self, out, memory) -> None:
        pass


@pytest.mark.parametrize("make", [random_network, gac_network])
def test_a_network_without_memory(make):
    net, grad = make(), torch.linspace(-1.0, 1.0, 12)
    assert not net.has_memory and not net.add_read and net.memory_for(12, 4) is None
    update, state, memory = net.step_with(grad, net.init_state(12), 4, None)
    expected, expected_state = net(grad, net.init_state(12), 4)
    assert memory is None and torch.equal(update, expected) and torch.equal(state.data, expected_state.data)
    with pytest.raises(NotImplementedError, match="has no memory"):
        net.write_(grad[None], l2l.NTMBFGS().memory_for(12))


@pytest.mark.parametrize("memory", ["dense", "low_rank"])
def test_a_memory_shares_the_entries_that_it_is_made_of(memory):
    net = l2l.NTMBFGS(memory=memory)
    first = net.memory_for(12, 4)
    again = net.memory_for(12, 4, "cpu", torch.float32, first.entries())
    assert all(again.tensors()[name] is value for name, value in first.tensors().items())
    wide = net.memory_for(12, 4, "cpu", torch.float64, first.entries())
    assert type(wide) is type(first) and wide.reads.dtype == torch.float64
    with pytest.raises(ValueError, match="memory"):
        net.memory_for(12, 3, entries=first.entries())


def test_a_network_of_another_kind_is_deployed_as_it_is_trained():
    torch.manual_seed(1)
    net = WithMemory()
    task = Quadratic(dim=3, batch=4).sample(0, "test")
    theta = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    (walker,) = walkers(task, net, theta)
    params = {name: nn.Parameter(value.clone()) for name, value in theta.items()}
    optimizer = l2l.LearnedOptimizer(params.values(), net, num_problems=task.num_problems)
    for t in range(3):
        grads = {name: torch.full_like(value, 0.1 * t - 0.2) for name, value in theta.items()}
        for name, param in params.items():
            param.grad = grads[name]
        theta.update(walker.step(theta, grads))
        optimizer.step()
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), theta[name].detach())
    with pytest.raises(NotImplementedError, match="unrolled in autograd"):
        optimizer.start_segment()
    saved = optimizer.state_dict()
    other = l2l.LearnedOptimizer([nn.Parameter(param.detach().clone()) for param in params.values()], net)
    other.load_state_dict(saved)
    assert "memory_matrix" in other.state[other.param_groups[0]["params"][0]]
    trainer = l2l.MetaTrainer(net, Quadratic(dim=3, batch=4), horizon=4, unroll=2)
    assert trainer.autograd
    before = net.phi().detach().clone()
    trainer.fit(1, progress=False)
    assert not torch.equal(before, net.phi())
