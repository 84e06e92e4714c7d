"""torch.func's transforms and forward-mode differentiation: right through the network, refused by the operators, never
silently zero. And the modes that may surround a call: autocast, another default dtype, inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad

import l2l_fast as l2l
from tests.fuzz import calls
from tests.gac_helpers import extra_for
from tests.helpers import assert_close, double, random_network, random_state, structured_gradient

OPTIONS = [
    {"hidden_size": 5},
    {"hidden_size": 6, "gac_cells": 2},
    {"hidden_size": 5, "gac_cells": 1, "extra_inputs": 2, "num_outputs": 3},
    {"hidden_size": 5, "preprocess": "identity", "num_layers": 1},
]
N = 6


class Update:
    """The update as a function of a gradient, for a network and a state; in float64 it is plain PyTorch."""

    def __init__(self, net: l2l.CoordinatewiseLSTM, state: l2l.State, extra: Tensor | None) -> None:
        self.net, self.state, self.extra = net, state, extra

    def __call__(self, grad: Tensor) -> Tensor:
        return self.net(grad, self.state, 1, self.extra)[0]

    def of_parameters(self, parameters: dict[str, Tensor], grad: Tensor) -> Tensor:
        return func.functional_call(self.net, parameters, (grad, self.state, 1, self.extra))[0]


def both(options) -> tuple[tuple[Update, Tensor], tuple[Update, Tensor]]:
    net = random_network(**options)
    state, grad, extra = random_state(net, N), structured_gradient((N,)) * 10, extra_for(net, (N,))
    wide = None if extra is None else extra.double()
    exact = Update(double(net), state.to(torch.float64), wide)
    return (Update(net, state, extra), grad), (exact, grad.double())


def backward_jacobian(f: Update, grad: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(f, grad)


def jvp(f, grad):
    return func.jvp(f, (grad,), (torch.ones_like(grad),))[1]


def linearized(f, grad):
    return func.linearize(f, grad)[1](torch.ones_like(grad))


def dual(f, grad):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(grad, torch.ones_like(grad)))).tangent


def of_a_dual_state(f, grad):
    with forward_ad.dual_level():
        data = forward_ad.make_dual(f.state.data, torch.ones_like(f.state.data))
        return forward_ad.unpack_dual(f.net(grad, f.state._like(data), 1, f.extra)[0]).tangent


def of_dual_parameters(f, grad):
    with forward_ad.dual_level():
        named = {k: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for k, p in f.net.named_parameters()}
        return forward_ad.unpack_dual(f.of_parameters(named, grad)).tangent


TRANSFORMS = {
    "jvp": jvp,
    "linearize": linearized,
    "dual": dual,
    "dual state": of_a_dual_state,
    "dual parameters": of_dual_parameters,
    "jacfwd": lambda f, g: func.jacfwd(f)(g),
    "jacrev": lambda f, g: func.jacrev(f)(g),
    "vjp": lambda f, g: func.vjp(f, g)[1](torch.ones_like(f(g)))[0],
    "grad": lambda f, g: func.grad(lambda x: f(x).square().sum())(g),
    "hessian": lambda f, g: func.hessian(lambda x: f(x).sum())(g),
    "vmap": lambda f, g: func.vmap(f)(torch.stack([g, 2 * g, -g])),
    "grad of parameters": lambda f, g: torch.cat(
        [x.flatten() for x in func.grad(lambda p: f.of_parameters(p, g).sum())(dict(f.net.named_parameters())).values()]
    ),
    "per-sample gradients": lambda f, g: func.vmap(func.grad(lambda x: f(x).sum()))(torch.stack([g, 3 * g])),
    "compiled jvp": lambda f, g: torch.compile(lambda x: jvp(f, x), backend="aot_eager")(g),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_the_network_is_right_under_every_transform(transform, options):
    (f, grad), (exact, wide) = both(options)
    actual, expected = TRANSFORMS[transform](f, grad), TRANSFORMS[transform](exact, wide)
    assert actual.dtype == torch.float32 and expected.abs().max() > 0
    assert_close(actual, expected, 2e-4, transform)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_mode_equals_the_kernels_backward(options):
    (f, grad), _ = both(options)
    assert_close(func.jacfwd(f)(grad), backward_jacobian(f, grad), 1e-4)
    batched = torch.autograd.functional.jacobian(f, grad, vectorize=True)  # vmap over the backward operator
    assert_close(batched, backward_jacobian(f, grad), 1e-4)


def test_a_network_with_memory():
    net = l2l.NTMBFGS(hidden_size=5, read_heads=1, write_heads=1, gac_cells=2)
    memory, state, grad = net.init_memory(N, 1), net.init_state(N), torch.randn(N)

    def f(x):
        return net(x, state, memory)[0]

    expected = torch.autograd.functional.jacobian(f, grad)
    assert expected.abs().max() > 0
    assert_close(func.jacfwd(f)(grad), expected, 1e-4)
    assert_close(func.jacrev(f)(grad), expected, 1e-4)
    assert_close(dual(f, grad), expected.sum(1), 1e-4)
    assert_close(func.vmap(f)(torch.stack([grad, grad]))[1], f(grad), 1e-5)


def test_outside_of_transforms_the_kernel_runs():
    """Bit for bit what the operator gives, also inside a level of forward mode without a tangent."""
    net = random_network()
    state, grad = random_state(net, 70), structured_gradient((70,))
    (expected,), _ = l2l.ops.step(grad, None, state.data, net.phi(), net.config)
    with forward_ad.dual_level():
        assert torch.equal(net(grad, state)[0], expected)
    assert torch.equal(net(grad, state)[0], expected)


# ---- the operators themselves ----


def first_tensor(arguments, make):
    """The arguments with the first tensor that may carry a derivative made into something else."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[name] = make(value)
            return arguments
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            arguments[name] = [make(value[0]), *value[1:]]
            return arguments
    raise AssertionError


@pytest.mark.parametrize("operator", [*calls.PLAIN, *calls.COMMUNICATING, *calls.NORMALIZED])
def test_operators_refuse_what_they_would_lose(operator):
    for name, value in calls.valid_call(operator).items():
        if not (isinstance(value, Tensor) or (isinstance(value, list) and value and isinstance(value[0], Tensor))):
            continue
        with forward_ad.dual_level():
            arguments = calls.valid_call(operator)

            def make(x):
                return forward_ad.make_dual(x, torch.ones_like(x))

            arguments[name] = make(value) if isinstance(value, Tensor) else [*value[:-1], make(value[-1])]
            with pytest.raises(NotImplementedError, match=f"{name}.*dual"):
                calls.call(operator, arguments)


@pytest.mark.parametrize("operator", calls.OPERATORS)
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_operators_refuse_transforms(operator, transform):
    arguments = calls.valid_call(operator)

    def run(x):
        result = calls.call(operator, first_tensor(dict(arguments), lambda t: t + 0 * x))
        return sum(r.float().sum() for r in result)

    x = torch.zeros(())
    with pytest.raises(NotImplementedError, match=f"l2l_fast::{calls.name_of(operator)}: "):
        if transform == "jvp":
            func.jvp(run, (x,), (torch.ones(()),))
        elif transform == "grad":
            func.grad(run)(x)
        else:
            func.vmap(run)(torch.zeros(2))


# ---- ambient modes ----


def everything() -> list[Callable[[], list[Tensor]]]:
    """Calls of all operators, of the network and of an optimizer with a segment; what they need exists already."""
    todo = []
    for options in (*OPTIONS[:3], {"hidden_size": 5, "gac_cells": 2}):
        net = random_network(**options)
        state, extra = random_state(net, N), extra_for(net, (N,))
        grads = [structured_gradient((N,), seed=t) for t in range(3)]
        param = torch.nn.Parameter(torch.linspace(-1, 1, N, dtype=torch.float32))

        def run(net=net, state=state, extra=extra, grads=grads, param=param):
            with torch.no_grad():
                update, new = net(grads[0], state, 1, extra)
            if net.extra_inputs:
                return [update, new.data]
            optimizer = l2l.LearnedOptimizer([param], net)
            optimizer.start_segment()
            for grad in grads[:2]:
                param.grad = grad
                optimizer.step()
            param.grad = grads[2]
            optimizer.backward_segment()
            return [update, new.data, param.detach(), *(p.grad.clone() for p in net.parameters())]

        todo.append(run)
    for operator in (*calls.PLAIN, *calls.COMMUNICATING, *calls.NORMALIZED):
        todo.append(partial(calls.call, operator, calls.valid_call(operator)))
    return todo


def results(todo) -> list[Tensor]:
    return [tensor for run in todo for tensor in run()]


@contextmanager
def default_dtype(dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", list(MODES))
def test_surroundings_change_no_bit(mode):
    expected, todo = results(everything()), everything()
    with MODES[mode]():
        actual = results(todo)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b) and a.dtype == b.dtype, index


@pytest.mark.parametrize("operator", ["step", "step (communicating)"])
def test_functional_steps_in_inference_mode(operator):
    expected = calls.call(operator, calls.valid_call(operator))
    with torch.inference_mode():
        actual = calls.call(operator, calls.valid_call(operator))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("operator", ["step_", "step_ (communicating)"])
def test_in_place_steps_on_tensors_of_before_in_inference_mode(operator):
    expected, arguments = calls.call(operator, calls.valid_call(operator)), calls.valid_call(operator)
    with torch.inference_mode():
        actual = calls.call(operator, arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_second_derivatives_under_autocast():
    def second(grad, net):
        grad = grad.clone().requires_grad_()
        update, new = net(grad, net.init_state(N))
        (first,) = torch.autograd.grad(update.square().sum() + new.data.sum(), grad, create_graph=True)
        return torch.autograd.grad(first.square().sum(), grad)[0]

    for options in OPTIONS[:2]:
        net, grad = random_network(**options), structured_gradient((N,))
        expected = second(grad, net)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(second(grad, net), expected)


def test_the_reference_path_under_autocast_computes_in_float32():
    (f, grad), (exact, wide) = both(OPTIONS[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(jvp(f, grad), jvp(exact, wide), 2e-4)
