"""What Python costs: small models and models of many small tensors."""

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM, LearnedOptimizer, load_pretrained
from l2l_fast.kernels import operators as ops

MODELS = {
    "4 tensors, 10 in all": [4, 2, 3, 1],
    "1 tensor of 1,000": [1000],
    "4 tensors of MNIST": [784 * 20, 20, 200, 10],
    "300 tensors of 64": [64] * 300,
    "300 tensors of 1": [1] * 300,
}


def parameters(sizes):
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


@pytest.mark.benchmark(group="one step")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "what", ["operator", "LearnedOptimizer", "general", "general-small", "Adam", "Adam(fused=True)"]
)
def test_step(measure, model, what):
    params = parameters(MODELS[model])
    net = load_pretrained(what) if what.startswith("general") else CoordinatewiseLSTM()
    if what == "operator":
        tensors, grads = [p.detach() for p in params], [p.grad for p in params]
        states, phi = [net.init_state(p.numel()).data for p in params], net.phi().detach()
        measure(lambda: ops.step_(tensors, grads, states, phi, net.config, 1.0, 0.0, False), sum(MODELS[model]))
    else:
        fused = what.endswith("fused=True)")
        adam = what.startswith("Adam")
        optimizer = torch.optim.Adam(params, fused=fused) if adam else LearnedOptimizer(params, net)
        optimizer.step()
        measure(optimizer.step, sum(MODELS[model]))


@pytest.mark.benchmark(group="a segment of 20 steps")
@pytest.mark.parametrize("model", MODELS)
def test_segment(measure, model):
    params = parameters(MODELS[model])
    net = CoordinatewiseLSTM()
    optimizer = LearnedOptimizer(params, net)
    gradients = [[torch.randn_like(param) for param in params] for _ in range(2)]

    def backward(t):
        for param, grad in zip(params, gradients[t % 2], strict=True):
            param.grad = grad

    def segment():
        net.zero_grad()
        optimizer.start_segment()
        for t in range(20):
            backward(t)
            optimizer.step()
        backward(20)
        optimizer.backward_segment()

    measure(segment, sum(MODELS[model]) * 20)


@pytest.mark.benchmark(group="parts of a step")
def test_phi(benchmark):
    benchmark(CoordinatewiseLSTM().phi)


@pytest.mark.benchmark(group="checkpoints")
def test_state_dict(benchmark):
    optimizer = LearnedOptimizer(parameters(MODELS["4 tensors of MNIST"]), CoordinatewiseLSTM())
    optimizer.step()
    benchmark(optimizer.state_dict)
