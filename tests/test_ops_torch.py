"""The operators as citizens of PyTorch: opcheck, autograd of every order, torch.compile, threads, fork."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference
from l2l_fast.kernels.state import num_tiles
from tests.gac_helpers import every_kind, extra_for, shared_state
from tests.helpers import Cells, assert_close, double, random_network, random_state, structured_gradient

OPS = torch.ops.l2l_fast


def small_network(**options) -> l2l.CoordinatewiseLSTM:
    return random_network(hidden_size=8, num_layers=2, **options)


# ---- opcheck ----


@every_kind
@pytest.mark.parametrize(
    ("shape", "dtype", "problems"),
    [
        ((), torch.float16, 1),
        ((6, 12, 2), torch.float32, 1),
        ((65,), torch.bfloat16, 1),
        ((0,), torch.float32, 1),
        ((2, 5), torch.float32, 2),
    ],
)
def test_opcheck_step(shape, dtype, problems, options):
    net = small_network(**options)
    grad = structured_gradient(shape, dtype=dtype) if 0 not in shape else torch.zeros(shape, dtype=dtype)
    state, extra = random_state(net, grad.numel()).data, extra_for(net, shape)
    tensors = [grad, extra, state, net.phi().detach()]
    inputs = (*[x if x is None else x.requires_grad_() for x in tensors], *net.config.arguments, problems)
    torch.library.opcheck(OPS.step.default, inputs)
    upstream = (torch.randn(net.num_outputs, *shape, requires_grad=True), torch.randn_like(state).requires_grad_())
    torch.library.opcheck(OPS.step_backward.default, (*upstream, *inputs))


@every_kind
@pytest.mark.parametrize("given", [False, True])
def test_opcheck_step_in_place(given, options):
    """With all that may be written beside parameters and states, and with what must be."""
    net = small_network(**options)
    params = [torch.randn(70), torch.randn(3, 4).t(), torch.randn(2, dtype=torch.float16)]
    grads = [torch.randn_like(param) for param in params]
    states = [random_state(net, param.numel()).data for param in params]
    record, places = (torch.zeros(64 * 4), [0, 2, 3]) if given else (None, [])
    extra = extra_for(net, (84,))
    out = torch.zeros(net.num_outputs, 84) if given or net.num_outputs > 1 else None
    means = sums = None
    if given or net.gac_cells:
        means = torch.zeros(2, 2, net.gac_cells)
        sums = torch.zeros(2, 2, net.gac_cells, dtype=torch.float64)
    arguments = (params, grads, states, net.phi().detach(), *net.config.arguments, 0.5, 0.1, True, record, places)
    for phases in ((0, 3), (0, 1)):
        torch.library.opcheck(OPS.step_.default, (*arguments, extra, out, 2, means, sums, *phases, False))


@pytest.mark.parametrize("options", [{}, {"gac_cells": 3}], ids=["plain", "averages"])
@pytest.mark.parametrize("need_grad_start", [False, True])
def test_opcheck_segment_backward(need_grad_start, options):
    net = small_network(**options)
    sizes = [65, 3]
    starts = [random_state(net, n).data for n in sizes]
    records = [torch.randn(64 * 3) for _ in range(4)]
    means = [torch.randn(2, 1, 3).tanh() for _ in range(3)] if net.gac_cells else []
    phi = net.phi().detach()
    weights, lrs, decays = [1.0] * 3, [1.0] * 3, [0.9] * 3
    rest = (phi, *net.config.arguments, 1, starts, need_grad_start)
    arguments = (starts, sizes, [0, 2], records, means, weights, lrs, decays, *rest)
    torch.library.opcheck(OPS.segment_backward.default, arguments)
    phi.requires_grad_()
    torch.library.opcheck(OPS.segment_backward.default, arguments, test_utils="test_autograd_registration")


def test_opcheck_vector_math():
    torch.library.opcheck(OPS._vector_math.default, ("exp2", torch.randn(3, 5).t()))


def test_meta_tensors():
    net = l2l.CoordinatewiseLSTM(device="meta")
    update, state = net(torch.empty(3, 50, device="meta", dtype=torch.bfloat16), net.init_state(150))
    assert update.shape == (3, 50) and update.dtype == torch.bfloat16 and update.is_meta
    assert state.data.shape == (num_tiles(150), 80, 64) and state.data.is_meta


@every_kind
def test_operators_on_meta_tensors(options):
    """What they return has the shapes, dtypes and strides of what they compute."""
    net = small_network(**options)
    grad, state, extra = torch.ones(3, 50).bfloat16().t(), random_state(net, 150).data, extra_for(net, (50, 3))
    inputs = (grad, extra, state, net.phi().detach())
    upstream = (torch.ones(net.num_outputs, 50, 3), state)
    meta_inputs, meta_upstream = ([x if x is None else x.to("meta") for x in xs] for xs in (inputs, upstream))
    results = [*ops.step(*inputs, net.config), *ops.step_backward(*upstream, *inputs, net.config)]
    meta = [*ops.step(*meta_inputs, net.config), *ops.step_backward(*meta_upstream, *meta_inputs, net.config)]
    for actual, expected in zip(meta, results, strict=True):
        assert actual.is_meta and (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert actual.stride() == expected.stride()
    for k, name in enumerate(("grad", "extra", "state")):
        mixed = [x.to("meta") if j == k and x is not None else x for j, x in enumerate(inputs)]
        if inputs[k] is not None:
            with pytest.raises(ValueError, match=f"^{name}: expected device cpu as phi, got meta"):
                ops.step(*mixed, net.config)


@pytest.mark.parametrize("name", ["params", "grads", "states", "record", "extra", "out", "means", "sums"])
def test_an_in_place_step_names_the_tensor_on_another_device(name):
    net = small_network(gac_cells=3, extra_inputs=2, num_outputs=3)
    tensors = {
        "params": [torch.zeros(5)], "grads": [torch.ones(5)], "states": [net.init_state(5).data],
        "phi": net.phi().detach(), "record": torch.zeros(64), "extra": torch.ones(2, 5), "out": torch.zeros(3, 5),
        "means": torch.zeros(2, 1, 3), "sums": torch.zeros(2, 1, 3).double(),
    }  # fmt: skip
    options = {"config": net.config, "lr": 1.0, "weight_decay": 0.0, "maximize": False, "record_tiles": [0]}
    ops.step_(**tensors, **options)
    value = tensors[name]
    tensors[name] = [value[0].to("meta")] if isinstance(value, list) else value.to("meta")
    with pytest.raises(ValueError, match=f"^{name}: expected device cpu as phi, got meta"):
        ops.step_(**tensors, **options)


# ---- autograd ----


def test_the_module_trains_through_an_unrolled_step():
    net = random_network()
    cells = Cells(double(net))
    grads = [structured_gradient((70,), seed=t) for t in range(4)]
    theta, theta_c = torch.zeros(70), torch.zeros(70, dtype=torch.float64)
    state, state_c = random_state(net, 70), random_state(net, 70, dtype=torch.float64).to_logical()
    loss = loss_c = 0.0
    for t in range(4):
        update, state = net(grads[t], state)
        theta = theta + update
        loss = loss + (theta.sin() * (t + 1)).sum()
        update_c, state_c = cells(grads[t].double(), state_c)
        theta_c = theta_c + update_c
        loss_c = loss_c + (theta_c.sin() * (t + 1)).sum()
    loss.backward()
    loss_c.backward()
    assert_close(loss, loss_c, 2e-5)
    phi_grad = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert_close(phi_grad, cells.flat_gradient(), 2e-5)


@pytest.mark.parametrize("preprocess", ["identity", "log_sign"])
def test_second_derivatives_through_the_optimizee(preprocess):
    """The gradient of f is not a constant here: d grad / d theta flows through the operator's input gradient."""
    net = random_network(preprocess=preprocess, output_scale=0.3)
    weight = structured_gradient((12, 9), seed=4)

    def unrolled(step, theta, state, weight):
        total = 0.0
        for _ in range(3):
            loss = (weight @ theta.tanh() - 1).square().mean()
            (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
            update, state = step(grad, state)
            theta = theta + update
            total = total + (weight @ theta.tanh() - 1).square().mean()
        return total

    theta = (torch.randn(9) * 0.5).requires_grad_()
    unrolled(net, theta, random_state(net, 9), weight).backward()
    wide = double(net)
    theta_wide = theta.detach().double().requires_grad_()
    state = random_state(net, 9, dtype=torch.float64).to_logical()
    unrolled(lambda g, s: reference.step(wide, g, s), theta_wide, state, weight.double()).backward()
    for (name, parameter), expected in zip(net.named_parameters(), wide.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad, 2e-5, name)
    assert_close(theta.grad, theta_wide.grad, 2e-5, "theta")


@every_kind
@pytest.mark.parametrize("problems", [1, 2])
def test_second_derivatives_of_the_network_itself(options, problems):
    net = random_network(hidden_size=8, **options)
    grad, state, extra = structured_gradient((20,)), shared_state(net, 20, problems), extra_for(net, (20,))

    def penalty(step, inputs, dtype):
        out, new = step(*inputs)
        weight = torch.linspace(0.5, 2, out.numel(), dtype=dtype).view(out.shape)
        first = (out * weight).sum() + (new * 0.1).sin().sum()
        given = [x for x in inputs[1:] if x is not None]
        *d_extra, d_data, d_phi = torch.autograd.grad(first, given, create_graph=True)
        return d_phi.square().sum() + (d_data * 1.5).sin().sum() + sum(d.square().sum() for d in d_extra)

    def wide_step(grad, extra, data, phi):
        logical = l2l.State(data, 20, 8, 2).to_logical()
        out, new = reference.lstm_step(grad, logical, phi, net.config, problems, extra)
        return out.view(net.num_outputs, 20), l2l.State.from_logical(new).data

    results = []
    fused = lambda *inputs: ops.step(*inputs, net.config, problems)  # noqa: E731
    tensors = (grad, extra, state.data, net.phi())
    for step, dtype in ((fused, torch.float32), (wide_step, torch.float64)):
        inputs = [x if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
        value = penalty(step, inputs, dtype)
        results.append(torch.autograd.grad(value, [x for x in inputs if x is not None]))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-4)


def test_third_derivatives_do_not_silently_stop():
    net = random_network(hidden_size=8, num_layers=1, preprocess="identity")
    data = net.init_state(3).data

    def derivative(step, x, order):
        value = step(x).sum()
        for _ in range(order):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return value

    x = torch.tensor([0.3, -0.7, 1.1], requires_grad=True)
    actual = derivative(lambda x: ops.step(x, None, data, net.phi(), net.config)[0], x, 3)
    wide = x.detach().double().requires_grad_()
    logical = net.init_state(3, dtype=torch.float64).to_logical()
    expected = derivative(lambda x: reference.step(net, x, logical)[0], wide, 3)
    assert_close(actual, expected, 1e-4)


def test_segment_backward_is_not_differentiable():
    net = small_network()
    phi = net.phi().detach().requires_grad_()
    starts, records = [net.init_state(3).data], [torch.ones(64), torch.ones(64)]
    grad_phi, _ = ops.segment_backward(starts, [3], [0], records, [], [1.0], [1.0], [1.0], phi, net.config)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        grad_phi.sum().backward()


# ---- torch.compile ----


def test_compiled_module_equals_eager():
    net = random_network()

    def unrolled(grad, state):
        total = torch.zeros(())
        for _ in range(2):
            update, state = net(grad, state)
            total = total + (update * grad.sign()).sum()
        return total, state

    compiled = torch.compile(unrolled, fullgraph=True, backend="aot_eager")
    for numel in (70, 40):
        results = []
        for function in (compiled, unrolled):  # the former first: nothing has been made for it yet
            net.zero_grad()
            grad = structured_gradient((numel,)).requires_grad_()
            total, state = function(grad, random_state(net, numel))
            assert isinstance(state, l2l.State) and state.numel == numel
            total.backward()
            results.append([total, state.data, grad.grad, *(parameter.grad for parameter in net.parameters())])
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected, 1e-6)


def test_compiled_by_inductor():
    net = random_network()
    state = random_state(net, 30)

    def function(grad, state):
        update, state = net(2 * grad, state)
        return update + 1, state.to_logical()[0][0].sum()

    compiled = torch.compile(function, fullgraph=True)
    grad = structured_gradient((30,))
    for actual, expected in zip(compiled(grad, state), function(grad, state), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"gac_cells": 3}], ids=["plain", "averages"])
def test_compiled_in_place_step_and_segment(options):
    net = random_network(**options)
    phi = net.phi().detach()

    def function(params, grads, states, record, means, sums):
        places = [0, 2]
        ops.step_(
            params, grads, states, phi, net.config, 0.5, 0.1, False, record=record, record_tiles=places, means=means,
            sums=sums,
        )  # fmt: skip
        grad_phi, starts = ops.segment_backward(
            states, [70, 20], places, [record, 2 * record], [means], [1.0], [0.5], [0.9], phi, net.config,
            need_grad_start=True,
        )  # fmt: skip
        return params[0] * 2, grad_phi, starts

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, function):
        params, grads = [torch.ones(70), torch.ones(4, 5)], [structured_gradient((70,)), structured_gradient((4, 5))]
        states = [random_state(net, 70).data, random_state(net, 20).data]
        written = [torch.zeros(64 * 3), torch.zeros(2, 1, net.gac_cells), torch.zeros(2, 1, net.gac_cells).double()]
        with torch.no_grad():
            doubled, grad_phi, starts = run(params, grads, states, *written)
        results.append([*params, *states, *written, doubled, grad_phi, *starts])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@every_kind
def test_activation_checkpointing(options):
    net = random_network(**options)
    extra = extra_for(net, (30,))
    results = []
    for checkpointed in (False, True):
        net.zero_grad()
        state, total = random_state(net, 30), 0.0
        for t in range(2):
            grad = structured_gradient((30,), seed=t).requires_grad_()
            if checkpointed:
                update, state = torch.utils.checkpoint.checkpoint(net, grad, state, 1, extra, use_reentrant=False)
            else:
                update, state = net(grad, state, 1, extra)
            total = total + update.sum()
        total.backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert torch.equal(*results)


# ---- threads and processes ----


def test_several_threads_at_once():
    net = random_network()
    grad, state = structured_gradient((3000,)), random_state(net, 3000)
    expected = ops.step(grad, None, state.data, net.phi().detach(), net.config)
    failures: list[str] = []

    def work() -> None:
        phi = net.phi().detach()
        for _ in range(10):
            result = ops.step(grad, None, state.data, phi, net.config)
            if not all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)):
                failures.append("different result")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_after_fork():
    """The kernels work in a child whose parent has used its thread pool. In a process of its own, for a fork inherits
    whatever threads the test runner has; with 300 coordinates, for PyTorch's own parallel loops (from 32,768 elements)
    hang in such a child."""
    script = """
import os, signal, torch
import l2l_fast as l2l
torch.manual_seed(0)
torch.set_num_threads(2)
net = l2l.CoordinatewiseLSTM()
grad = torch.randn(300)
def run():
    theta = torch.nn.Parameter(torch.zeros(300))
    opt = l2l.LearnedOptimizer([theta], net)
    opt.start_segment()
    for _ in range(2):
        theta.grad = grad.clone()
        opt.step()
    theta.grad = -grad
    opt.backward_segment()
    gradient = net.phi().new_tensor([float(p.grad.double().sum()) for p in net.parameters()])
    net.zero_grad()
    return torch.cat([theta.detach(), gradient])
expected = run()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(run(), expected) else 3)
_, status = os.waitpid(pid, 0)
assert torch.equal(run(), expected)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    root = os.path.dirname(os.path.dirname(l2l.__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_denormals_are_untouched_outside_the_kernels():
    """The kernels flush denormals to zero while they run, and only then."""
    net = random_network()
    ops.step(torch.randn(1000), None, net.init_state(1000).data, net.phi().detach(), net.config)
    tiny = torch.full((100_000,), 1e-38)
    assert (tiny * 0.1).gt(0).all() and math.ldexp(1.0, -1060) * 0.5 > 0


# ---- import ----


def import_in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    root = os.path.dirname(os.path.dirname(l2l.__file__))
    variables = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


def test_import_without_the_extension_says_how_to_build():
    code = "import sys; sys.modules['l2l_fast._C'] = None; import l2l_fast"
    done = import_in_a_new_process(code)
    assert done.returncode != 0
    assert "ImportError: l2l_fast's compiled extension" in done.stderr
    assert "pip install --no-build-isolation -e ." in done.stderr


@pytest.mark.parametrize("name", l2l._C.isa_available())
def test_environment_forces_an_instruction_set(name):
    done = import_in_a_new_process("import l2l_fast; print(l2l_fast._C.isa())", L2L_FAST_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_environment_with_an_unknown_instruction_set():
    done = import_in_a_new_process("import l2l_fast", L2L_FAST_ISA="mmx")
    assert "ValueError" in done.stderr and "L2L_FAST_ISA" in done.stderr and "'mmx' is unknown" in done.stderr
    with pytest.raises(ValueError, match="unknown"):
        l2l._C.set_isa("mmx")


def test_a_compiled_module_survives_in_a_larger_model():
    """functional_call and nn.Module containers, as a hypernetwork would use them."""
    net = random_network()
    model = nn.ModuleDict({"phi": net})
    zeroed = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    update, _ = torch.func.functional_call(model["phi"], zeroed, (torch.randn(5), net.init_state(5)))
    assert update.eq(0).all()
