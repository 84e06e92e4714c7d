"""NTM-BFGS and the reference in what torch puts around modules: export, trees, autocast around derivatives."""

from __future__ import annotations

import io

import pytest
import torch
from torch.utils import _pytree as pytree

import l2l_fast as l2l
from tests.helpers import random_network


def ntm(memory: str, **options) -> l2l.NTMBFGS:
    net = l2l.NTMBFGS(**{"hidden_size": 6, "memory": memory, "history": 3, "write_heads": 2, **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return net


# ---- trees ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", ["dense", "low_rank"])
def test_a_network_with_memory_is_exported(memory, dtype):
    net = ntm(memory, add_read=True)
    grad = torch.randn(12, dtype=dtype)
    _, state, mem = net(grad, net.init_state(12, dtype=dtype), net.init_memory(12, dtype=dtype))
    exported, buffer = torch.export.export(net, (grad, state, mem)), io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    grad = torch.randn(12, dtype=dtype)
    expected = net(grad, state, mem)
    for program in (exported, torch.export.load(buffer)):
        actual = program.module()(grad, state, mem)
        assert type(actual[2]) is type(mem) and pytree.tree_structure(actual) == pytree.tree_structure(expected)
        assert all(map(torch.equal, pytree.tree_leaves(actual), pytree.tree_leaves(expected)))


@pytest.mark.parametrize("memory", ["dense", "low_rank"])
def test_a_memory_is_a_tree(memory):
    mem = ntm(memory).init_memory(12, 3)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(mem)]
    assert paths == ([".matrix", ".reads"] if memory == "dense" else [".left", ".right", ".reads"])
    twin = pytree.tree_map(lambda x: x + 1, mem)
    assert type(twin) is type(mem) and twin.initial == mem.initial and torch.equal(twin.reads, mem.reads + 1)
    spec = pytree.treespec_loads(pytree.treespec_dumps(pytree.tree_structure(mem)))
    assert spec == pytree.tree_structure(mem)


# ---- autocast ----


def derivatives(options: dict, groups: int, order: int, autocast: bool) -> list[torch.Tensor]:
    net = ntm(**options)
    grad = torch.randn(12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    inputs = [grad, *net.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        state, memory, total = net.init_state(12), net.init_memory(12, groups), torch.zeros(())
        for _ in range(3):
            update, state, memory = net(grad, state, memory)
            total = total + update.square().sum()
        results = torch.autograd.grad(total, inputs, create_graph=order > 1)
        if order > 1:
            results = torch.autograd.grad(sum(result.square().sum() for result in results), inputs)
    return [total.detach(), *results]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("memory", ["dense", "low_rank"])
def test_autocast_reaches_no_derivative(memory, heads, groups, order):
    options = {"memory": memory, "read_heads": heads, "initial": "identity", "add_read": heads == 1}
    expected, actual = (derivatives(options, groups, order, autocast) for autocast in (False, True))
    for a, b in zip(expected, actual, strict=True):
        if order == 1:
            assert torch.equal(a, b)
        else:  # in another order of summation
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["grad", "hessian", "jvp", "vmap"])
def test_autocast_reaches_no_transform(name):
    net = random_network(hidden_size=8)

    def f(grad):
        return net(grad, net.init_state(5))[0].square().sum()

    transformed, shape = {
        "grad": (torch.func.grad(f), (5,)),
        "hessian": (torch.func.hessian(f), (5,)),
        "jvp": (lambda grad: torch.func.jvp(f, (grad,), (torch.ones(5),))[1], (5,)),
        "vmap": (torch.func.vmap(torch.func.grad(f)), (3, 5)),
    }[name]
    grad = torch.randn(shape)
    expected = transformed(grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transformed(grad), expected)


def test_autocast_does_not_reach_the_reference():
    net, grad = random_network(hidden_size=8), torch.randn(5, requires_grad=True)

    def derivative():
        update, _ = l2l.reference.step(net, grad, net.init_state(5).to_logical())
        return update, *torch.autograd.grad(update.sum(), [grad, *net.parameters()], allow_unused=True)

    expected = derivative()
    with torch.autocast("cpu", torch.bfloat16):
        found = derivative()
    for one, other in zip(found, expected, strict=True):  # BLAS may round in another order; bfloat16 is off by 1e-3
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
