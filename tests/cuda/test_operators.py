"""The operators on a GPU against the same operators on the CPU, and a captured graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CONFIGS = [
    ops.Config(hidden, layers, preprocess, 10.0, 0.1)
    for hidden in (8, 16, 20, 32)
    for layers in (1, 2, 3)
    for preprocess in ("log_sign", "identity")
]


def make(config: ops.Config, numel: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """phi, a gradient of many magnitudes and a state, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    phi = 0.3 * torch.randn(l2l.reference.phi_size(config), generator=generator)
    grad = torch.randn(numel, generator=generator) * torch.exp(6 * torch.randn(numel, generator=generator) - 6)
    parts = torch.rand(config.num_layers, 2, numel, config.hidden_size, generator=generator) * 2 - 1
    return phi, grad, l2l.State.from_logical([(h, c) for h, c in parts]).data


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.cpu(), expected, rtol=0.0, atol=tolerance * scale)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 5000, 400_000])
def test_step_and_its_backward(config: ops.Config, numel: int) -> None:
    phi, grad, state = make(config, numel)
    expected = torch.ops.l2l_fast.lstm_step(grad, state, phi, *config)
    got = torch.ops.l2l_fast.lstm_step(grad.cuda(), state.cuda(), phi.cuda(), *config)
    close(got[0], expected[0])
    close(got[1], expected[1])
    if numel <= 5000:
        upstream = (torch.ones_like(grad), torch.ones_like(state), grad, state, phi)
        expected = torch.ops.l2l_fast.lstm_step_backward(*upstream, *config)
        got = torch.ops.l2l_fast.lstm_step_backward(*(x.cuda() for x in upstream), *config)
        torch.testing.assert_close(got[0].cpu(), expected[0], rtol=1e-3, atol=1e-3)
        close(got[1], expected[1])
        close(got[2], expected[2])


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_step_of_many_tensors(param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    config = ops.Config(20, 2, "log_sign", 10.0, 0.1)
    shapes = [(3, 4, 5), (1,), (64,), (7, 129), (0,)] * 120  # more than the kernel arguments hold
    phi = make(config, 1)[0]
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).to(param_dtype).transpose(0, -1) for shape in shapes]
    grads = [torch.randn(param.shape, generator=generator).to(grad_dtype) for param in params]
    states = [l2l.State.zeros(param.numel(), 20, 2).data for param in params]
    tiles = [0]
    for state in states:
        tiles.append(tiles[-1] + state.shape[0])
    record = torch.zeros(64 * tiles[-1])
    on_gpu = [[x.cuda() for x in xs] for xs in (params, grads, states)]
    gpu_record = record.cuda()
    for _ in range(2):
        ops.lstm_step_(params, grads, states, phi, *config, 0.5, 0.1, True, record, tiles[:-1])
        ops.lstm_step_(*on_gpu, phi.cuda(), *config, 0.5, 0.1, True, gpu_record, tiles[:-1])
    tolerance = 2e-5 if param_dtype == torch.float32 else 2e-2
    for got, expected in zip(on_gpu[0], params):
        close(got.float(), expected.float(), tolerance)
    close(gpu_record, record)


@pytest.mark.parametrize("steps", [1, 5, 90])
def test_segment_backward_twice_bit_for_bit(steps: int) -> None:
    config = ops.Config(20, 2, "log_sign", 10.0, 0.1)
    phi, _, state = make(config, 3000)
    generator = torch.Generator().manual_seed(2)
    records = [torch.randn(state.shape[0] * 64, generator=generator) for _ in range(steps + 1)]
    coefficients = ([1.0] * steps, [0.1] * steps, [0.99] * steps)
    expected = ops.lstm_segment_backward([state], [3000], [0], records, *coefficients, phi, *config, [state], True)
    on_gpu = [state.cuda()], [3000], [0], [record.cuda() for record in records], *coefficients, phi.cuda(), *config
    first = ops.lstm_segment_backward(*on_gpu, [state.cuda()], True)
    second = ops.lstm_segment_backward(*on_gpu, [state.cuda()], True)
    close(first[0], expected[0], 1e-4)
    close(first[1][0], expected[1][0], 1e-4)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])


def test_a_step_is_captured_in_a_graph_on_another_stream() -> None:
    config = ops.Config(20, 2, "log_sign", 10.0, 0.1)
    phi, grad, state = make(config, 1000)
    param, gpu = torch.zeros(1000), [x.cuda() for x in (torch.zeros(1000), grad, state, phi)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.lstm_step_([gpu[0]], [gpu[1]], [gpu[2]], gpu[3], *config, 1.0, 0.0, False, None, [])
    for _ in range(3):
        graph.replay()
        ops.lstm_step_([param], [grad], [state], phi, *config, 1.0, 0.0, False, None, [])
    close(gpu[0], param)
    close(gpu[2], state)


def test_other_sizes_are_refused_with_the_list_of_those_compiled() -> None:
    config = ops.Config(12, 2, "log_sign", 10.0, 0.1)
    phi, grad, state = make(config, 10)
    with pytest.raises(ValueError, match=r"8, 16, 20, 32.*CPU.*l2l_fast\.reference"):
        torch.ops.l2l_fast.lstm_step(grad.cuda(), state.cuda(), phi.cuda(), *config)


def test_mixed_devices_are_refused() -> None:
    config = ops.Config(8, 1, "log_sign", 10.0, 0.1)
    phi, grad, state = make(config, 10)
    with pytest.raises(ValueError, match="state: expected device"):
        torch.ops.l2l_fast.lstm_step(grad.cuda(), state, phi.cuda(), *config)
