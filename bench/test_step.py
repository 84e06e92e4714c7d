"""The step: in place and functional, by instruction set, network, dtype and memory layout."""

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.kernels import operators as ops

NETWORKS = [(20, 2), (4, 1), (8, 2), (16, 2), (32, 2), (64, 2), (20, 1), (20, 4)]
LAYOUTS = {
    "contiguous": lambda n: torch.zeros(n // 256, 256),
    "transposed": lambda n: torch.zeros(256, n // 256).t(),
    "every second": lambda n: torch.zeros(n // 256, 512)[:, ::2],
    "channels last": lambda n: torch.zeros(n // 256, 16, 4, 4).to(memory_format=torch.channels_last),
}


KINDS = [{"preprocess": "log_sign"}, {"preprocess": "identity"}, {"preprocess": "normalized", "tensor_inputs": 7}]


def common_of(net, *shape):
    """What a network with normalized inputs is told of a tensor, in one step or in ``shape`` of them."""
    if not net.config.averages:
        return {}
    return {"ages": [5], "tensor_inputs": torch.randn(*shape, 1, net.tensor_inputs)}


def in_place_step(net, param, grad):
    state, phi, common = net.init_state(param.numel()).data, net.phi().detach(), common_of(net)

    def step():
        ops.step_([param], [grad], [state], phi, net.config, 1.0, 0.0, False, **common)

    return step


@pytest.mark.benchmark(group="in-place step: instruction sets")
def test_instruction_set(measure, n, isa):
    measure(in_place_step(CoordinatewiseLSTM(), torch.zeros(n), torch.randn(n)), n)


@pytest.mark.benchmark(group="in-place step: networks")
@pytest.mark.parametrize("hidden, layers", NETWORKS)
def test_network(measure, n, hidden, layers):
    measure(in_place_step(CoordinatewiseLSTM(hidden, layers), torch.zeros(n), torch.randn(n)), n)


@pytest.mark.benchmark(group="in-place step: preprocessing")
@pytest.mark.parametrize("options", KINDS, ids=[kind["preprocess"] for kind in KINDS])
def test_preprocess(measure, n, options):
    measure(in_place_step(CoordinatewiseLSTM(**options), torch.zeros(n), torch.randn(n)), n)


@pytest.mark.benchmark(group="in-place step: dtypes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(measure, n, dtype):
    measure(in_place_step(CoordinatewiseLSTM(), torch.zeros(n, dtype=dtype), torch.randn(n).to(dtype)), n)


@pytest.mark.benchmark(group="in-place step: layouts of parameter and gradient")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(measure, n, layout):
    param, grad = LAYOUTS[layout](n), LAYOUTS[layout](n)
    measure(in_place_step(CoordinatewiseLSTM(), param, grad.normal_()), param.numel())


@pytest.mark.benchmark(group="functional step")
@pytest.mark.parametrize("hidden, layers", NETWORKS[:1] + NETWORKS[3:5])
def test_functional(measure, n, hidden, layers):
    net, grad = CoordinatewiseLSTM(hidden, layers), torch.randn(n)
    state = net.init_state(n)
    with torch.no_grad():
        measure(lambda: net(grad, state), n)


@pytest.mark.benchmark(group="functional step, forward and backward")
def test_functional_backward(measure, n, isa):
    net, grad = CoordinatewiseLSTM(), torch.randn(n, requires_grad=True)
    state = net.init_state(n)

    def forward_and_backward():
        update, new_state = net(grad, state)
        torch.autograd.grad([update.sum(), new_state.data.sum()], [grad, *net.parameters()])

    measure(forward_and_backward, n)
