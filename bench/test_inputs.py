"""What inputs per tensor cost: optimizers that are told of their tensors beside the plain one, and Adam.

    python -m pytest bench/test_inputs.py
"""

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM, LearnedOptimizer, load_pretrained
from l2l_fast.kernels.tensor_inputs import DEFAULT_INPUTS

SIZE, SEGMENT_SIZE, STEPS = 1_000_000, 200_000, 20
NETWORKS = {
    "plain, 2 x 20": CoordinatewiseLSTM,
    "with inputs per tensor, 2 x 20": lambda: CoordinatewiseLSTM(
        preprocess="normalized", tensor_inputs=len(DEFAULT_INPUTS)
    ),
    "general": lambda: load_pretrained("general"),
}


def optimizer_of(name, size):
    param = torch.nn.Parameter(torch.randn(size))
    param.grad = torch.randn(size)
    if name == "Adam(fused=True)":
        return torch.optim.Adam([param], fused=True), param, None
    net = NETWORKS[name]()
    return LearnedOptimizer([param], net, total_steps=1000 if net.tensor_inputs else None), param, net


@pytest.mark.benchmark(group="a step of LearnedOptimizer, N = 1,000,000")
@pytest.mark.parametrize("name", [*NETWORKS, "Adam(fused=True)"])
def test_step(measure, name):
    optimizer, _, _ = optimizer_of(name, SIZE)
    optimizer.step()
    measure(optimizer.step, SIZE)


@pytest.mark.benchmark(group="a segment of 20 steps, N = 200,000")
@pytest.mark.parametrize("name", list(NETWORKS)[:2])
def test_segment(measure, name):
    optimizer, param, net = optimizer_of(name, SEGMENT_SIZE)
    gradients = [torch.randn(SEGMENT_SIZE) for _ in range(2)]

    def segment():
        net.zero_grad()
        optimizer.start_segment()
        for t in range(STEPS):
            param.grad = gradients[t % 2]
            optimizer.step()
        param.grad = gradients[STEPS % 2]
        optimizer.backward_segment()

    measure(segment, SEGMENT_SIZE * STEPS)
