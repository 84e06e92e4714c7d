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
from l2l_fast import ops, reference
from l2l_fast.kernels.state import num_tiles
from tests.helpers import Cells, assert_close, double, random_network, random_state, structured_gradient

OPS = torch.ops.l2l_fast


def small_network(**options) -> l2l.CoordinatewiseLSTM:
    return random_network(hidden_size=8, num_layers=2, **options)


# ---- opcheck ----


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), torch.float16), ((6, 12, 2), torch.float32), ((65,), torch.bfloat16), ((0,), torch.float32)],
)
def test_opcheck_step(shape, dtype):
    net = small_network()
    grad = structured_gradient(shape, dtype=dtype) if 0 not in shape else torch.zeros(shape, dtype=dtype)
    state = random_state(net, grad.numel()).data
    phi = net.phi().detach()
    inputs = (grad.requires_grad_(), state.requires_grad_(), phi.requires_grad_(), *net.config)
    torch.library.opcheck(OPS.lstm_step.default, inputs)
    upstream = (torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn_like(state).requires_grad_())
    torch.library.opcheck(OPS.lstm_step_backward.default, (*upstream, *inputs))


@pytest.mark.parametrize("recorded", [False, True])
def test_opcheck_step_in_place(recorded):
    net = small_network()
    params = [torch.randn(70), torch.randn(3, 4).t(), torch.randn(2, dtype=torch.float16)]
    grads = [torch.randn_like(param) for param in params]
    states = [random_state(net, param.numel()).data for param in params]
    record, places = (torch.zeros(64 * 4), [0, 2, 3]) if recorded else (None, [])
    phi = net.phi().detach()
    torch.library.opcheck(
        OPS.lstm_step_.default, (params, grads, states, phi, *net.config, 0.5, 0.1, True, record, places)
    )


@pytest.mark.parametrize("need_grad_start", [False, True])
def test_opcheck_segment_backward(need_grad_start):
    net = small_network()
    sizes = [65, 3]
    starts = [random_state(net, n).data for n in sizes]
    records = [torch.randn(64 * 3) for _ in range(4)]
    phi = net.phi().detach()
    weights, lrs, decays = [1.0] * 3, [1.0] * 3, [0.9] * 3
    arguments = (starts, sizes, [0, 2], records, weights, lrs, decays, phi, *net.config, starts, need_grad_start)
    torch.library.opcheck(OPS.lstm_segment_backward.default, arguments)
    phi.requires_grad_()
    torch.library.opcheck(OPS.lstm_segment_backward.default, arguments, test_utils="test_autograd_registration")


def test_opcheck_vector_math():
    torch.library.opcheck(OPS._vector_math.default, ("exp2", torch.randn(3, 5).t()))


def test_meta_tensors():
    net = l2l.CoordinatewiseLSTM(device="meta")
    update, state = net(torch.empty(3, 50, device="meta", dtype=torch.bfloat16), net.init_state(150))
    assert update.shape == (3, 50) and update.dtype == torch.bfloat16 and update.is_meta
    assert state.data.shape == (num_tiles(150), 80, 64) and state.data.is_meta


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


def test_second_derivatives_of_the_network_itself():
    net = random_network(hidden_size=8)
    grad, state = structured_gradient((20,)), random_state(net, 20)

    def penalty(step, phi, grad, data, dtype):
        update, new = step(grad, data, phi)
        first = (update * torch.linspace(0.5, 2, 20, dtype=dtype)).sum() + (new * 0.1).sin().sum()
        d_phi, d_data = torch.autograd.grad(first, [phi, data], create_graph=True)
        return d_phi.square().sum() + (d_data * 1.5).sin().sum()

    def wide_step(grad, data, phi):
        logical = l2l.State(data, 20, 8, 2).to_logical()
        update, new = reference.lstm_step(grad, logical, phi, net.config)
        return update, l2l.State.from_logical(new).data

    results = []
    fused = lambda g, d, phi: ops.lstm_step(g, d, phi, *net.config)  # noqa: E731
    for step, dtype in ((fused, torch.float32), (wide_step, torch.float64)):
        phi = net.phi().detach().to(dtype).requires_grad_()
        inputs = [grad.to(dtype).requires_grad_(), state.data.to(dtype).requires_grad_()]
        value = penalty(step, phi, *inputs, dtype)
        results.append(torch.autograd.grad(value, [phi, inputs[0]]))
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
    actual = derivative(lambda x: ops.lstm_step(x, data, net.phi(), *net.config)[0], x, 3)
    wide = x.detach().double().requires_grad_()
    logical = net.init_state(3, dtype=torch.float64).to_logical()
    expected = derivative(lambda x: reference.step(net, x, logical)[0], wide, 3)
    assert_close(actual, expected, 1e-4)


def test_segment_backward_is_not_differentiable():
    net = small_network()
    phi = net.phi().detach().requires_grad_()
    starts, records = [net.init_state(3).data], [torch.ones(64), torch.ones(64)]
    grad_phi, _ = ops.lstm_segment_backward(starts, [3], [0], records, [1.0], [1.0], [1.0], phi, *net.config, [], False)
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
        for function in (unrolled, compiled):
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


def test_compiled_in_place_step_and_segment():
    net = random_network()
    phi = net.phi().detach()

    def function(params, grads, states, record):
        places = [0, 2]
        ops.lstm_step_(params, grads, states, phi, *net.config, 0.5, 0.1, False, record, places)
        grad_phi, starts = ops.lstm_segment_backward(
            states, [70, 20], places, [record, 2 * record], [1.0], [0.5], [0.9], phi, *net.config, [], True
        )
        return params[0] * 2, grad_phi, starts

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        params, grads = [torch.ones(70), torch.ones(4, 5)], [structured_gradient((70,)), structured_gradient((4, 5))]
        states = [random_state(net, 70).data, random_state(net, 20).data]
        record = torch.zeros(64 * 3)
        with torch.no_grad():
            doubled, grad_phi, starts = run(params, grads, states, record)
        results.append([*params, *states, record, doubled, grad_phi, *starts])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_activation_checkpointing():
    net = random_network()
    results = []
    for checkpointed in (False, True):
        net.zero_grad()
        state, total = random_state(net, 30), 0.0
        for t in range(2):
            grad = structured_gradient((30,), seed=t).requires_grad_()
            if checkpointed:
                update, state = torch.utils.checkpoint.checkpoint(net, grad, state, use_reentrant=False)
            else:
                update, state = net(grad, state)
            total = total + update.sum()
        total.backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert torch.equal(*results)


# ---- threads and processes ----


def test_several_threads_at_once():
    net = random_network()
    grad, state = structured_gradient((3000,)), random_state(net, 3000)
    expected = ops.lstm_step(grad, state.data, net.phi().detach(), *net.config)
    failures: list[str] = []

    def work() -> None:
        phi = net.phi().detach()
        for _ in range(10):
            result = ops.lstm_step(grad, state.data, phi, *net.config)
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
    ops.lstm_step(torch.randn(1000), net.init_state(1000).data, net.phi().detach(), *net.config)
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
