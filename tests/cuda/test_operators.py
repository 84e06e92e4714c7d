"""The operators on a GPU against the same operators on the CPU, and a captured graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import l2l_fast as l2l
from l2l_fast.kernels import operators as ops
from l2l_fast.kernels import reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CONFIGS = [
    l2l.Config(hidden, layers, preprocess, 10.0, 0.1)
    for hidden in (4, 8, 16, 20, 32)
    for layers in (1, 2, 3)
    for preprocess in ("log_sign", "identity")
]
COMMUNICATING = [
    l2l.Config(20, 2, "log_sign", 10.0, 0.1, 5, 0, 1),
    l2l.Config(8, 1, "identity", 10.0, 0.1, 8, 0, 1),
    l2l.Config(20, 2, "log_sign", 10.0, 0.1, 2, 1, 8),
    l2l.Config(16, 3, "log_sign", 10.0, 0.1, 0, 3, 2),
]
ALL_KINDS = [l2l.Config(20, 2, "log_sign", 10.0, 0.1), *COMMUNICATING]


def make(config: l2l.Config, numel: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """phi, a gradient of many magnitudes and a state, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    phi = 0.3 * torch.randn(l2l.reference.phi_size(config), generator=generator)
    grad = torch.randn(numel, generator=generator) * torch.exp(6 * torch.randn(numel, generator=generator) - 6)
    parts = torch.rand(config.num_layers, 2, numel, config.hidden_size, generator=generator) * 2 - 1
    return phi, grad, l2l.State.from_logical([(h, c) for h, c in parts]).data


def extra_of(config: l2l.Config, *shape: int) -> Tensor | None:
    shape = (config.extra_inputs, *shape)
    return torch.linspace(-1, 1, math.prod(shape)).view(shape) if config.extra_inputs else None


def gpu(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cuda()


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.cpu(), expected, rtol=0.0, atol=tolerance * scale)


@pytest.mark.parametrize("config", [*CONFIGS, *COMMUNICATING], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 5000, 400_000])
def test_step_and_its_backward(config: l2l.Config, numel: int) -> None:
    phi, grad, state = make(config, numel)
    extra, problems = extra_of(config, numel), 2 if numel % 2 == 0 else 1
    inputs = (grad, extra, state, phi)
    expected = ops.step(*inputs, config, problems)
    got = ops.step(*map(gpu, inputs), config, problems)
    close(got[0], expected[0])
    close(got[1], expected[1])
    if numel <= 5000:
        upstream = (torch.ones_like(expected[0]), torch.ones_like(state))
        expected = ops.step_backward(*upstream, *inputs, config, problems)
        got = ops.step_backward(*map(gpu, upstream), *map(gpu, inputs), config, problems)
        torch.testing.assert_close(got[0].cpu(), expected[0], rtol=1e-3, atol=1e-3)
        for a, b in zip(got[1:], expected[1:], strict=True):
            close(a, b)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ALL_KINDS, ids=str)
def test_in_place_step_of_many_tensors(config: l2l.Config, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    shapes = [(3, 4, 5), (1,), (64,), (7, 129), (0,)] * 120  # more than the kernel arguments hold
    phi = make(config, 1)[0]
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).to(param_dtype).transpose(0, -1) for shape in shapes]
    grads = [torch.randn(param.shape, generator=generator).to(grad_dtype) for param in params]
    states = [l2l.State.zeros(param.numel(), config.hidden_size, config.num_layers).data for param in params]
    tiles = [0]
    for state in states:
        tiles.append(tiles[-1] + state.shape[0])
    record = torch.zeros(64 * tiles[-1])
    on_gpu = [[x.cuda() for x in xs] for xs in (params, grads, states)]
    numel = sum(param.numel() for param in params)
    tensors = {
        "record": record,
        "extra": extra_of(config, numel),
        "out": torch.zeros(config.num_outputs, numel),
        "means": torch.zeros(config.num_layers, 1, config.gac_cells),
        "sums": torch.zeros(2, 1, config.gac_cells, dtype=torch.float64),
    }
    gpu_tensors = {name: gpu(tensor) for name, tensor in tensors.items()}
    options = {"record_tiles": tiles[:-1]}
    for _ in range(2):
        ops.step_(params, grads, states, phi, config, 0.5, 0.1, True, **tensors, **options)
        ops.step_(*on_gpu, phi.cuda(), config, 0.5, 0.1, True, **gpu_tensors, **options)
    tolerance = 2e-5 if param_dtype == torch.float32 else 2e-2
    for got, expected in zip(on_gpu[0], params):
        close(got.float(), expected.float(), tolerance)
    close(gpu_tensors["record"], record)
    close(gpu_tensors["out"], tensors["out"])
    close(gpu_tensors["means"], tensors["means"])
    torch.testing.assert_close(gpu_tensors["sums"].cpu(), tensors["sums"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("cells", [0, 5])
@pytest.mark.parametrize("steps", [1, 5, 90])
def test_segment_backward_twice_bit_for_bit(steps: int, cells: int) -> None:
    config = l2l.Config(20, 2, "log_sign", 10.0, 0.1, cells)
    phi, _, state = make(config, 3000)
    generator = torch.Generator().manual_seed(2)
    records = [torch.randn(state.shape[0] * 64, generator=generator) for _ in range(steps + 1)]
    means = [torch.rand(2, 1, cells, generator=generator) - 0.5 for _ in range(steps if cells else 0)]
    coefficients = ([1.0] * steps, [0.1] * steps, [0.99] * steps)
    expected = ops.segment_backward([state], [3000], [0], records, means, *coefficients, phi, config, 1, [state], True)
    tensors = [record.cuda() for record in records], [mean.cuda() for mean in means]
    on_gpu = [state.cuda()], [3000], [0], *tensors, *coefficients, phi.cuda(), config, 1, [state.cuda()], True
    first, second = ops.segment_backward(*on_gpu), ops.segment_backward(*on_gpu)
    close(first[0], expected[0], 1e-4)
    close(first[1][0], expected[1][0], 1e-4)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("inputs", [0, 15])
@pytest.mark.parametrize("steps", [1, 90])
def test_backward_with_averages_twice_bit_for_bit(steps: int, inputs: int) -> None:
    """Of a segment and of the functional step."""
    config, numel = l2l.Config(20, 2, "normalized", 10.0, 0.1, tensor_inputs=inputs), 3000
    generator = torch.Generator().manual_seed(3)
    phi = torch.randn(reference.phi_size(config), generator=generator) * 0.3
    state, end = (torch.rand(-(-numel // 64), config.rows, 64, generator=generator) for _ in range(2))
    records = [torch.randn(state.shape[0] * 64, generator=generator) for _ in range(steps + 1)]
    told = torch.randn(steps, 1, inputs, generator=generator) if inputs else None
    nominal = torch.rand(steps, 1, 5, generator=generator)
    grad, upstream = (torch.randn(numel, generator=generator) for _ in range(2))

    def run(move: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def rows(value: Tensor | None) -> Tensor | None:
            return None if value is None else move(value)

        places = [move(state)], [numel], [0], [move(record) for record in records], []
        coefficients = [1.0] * steps, [0.1] * steps, [0.99] * steps
        common = {"ages": [5], "tensor_inputs": rows(told), "nominal": rows(nominal)}
        ends = move(phi), config, 1, [move(end)], True
        grad_phi, (start,) = ops.segment_backward(*places, *coefficients, *ends, **common)
        common = {"ages": [5], "tensor_inputs": rows(None if told is None else told[0]), "nominal": rows(nominal[0])}
        step = move(upstream[None]), move(end), move(grad), None, move(state), move(phi), config
        return [grad_phi, start, *ops.step_backward(*step, **common)]

    expected, first, second = run(lambda x: x), run(Tensor.cuda), run(Tensor.cuda)
    for got, again, wanted in zip(first, second, expected, strict=True):
        close(got, wanted, 1e-4)
        assert torch.equal(got, again)


def test_a_step_is_captured_in_a_graph_on_another_stream() -> None:
    config = l2l.Config(20, 2, "log_sign", 10.0, 0.1)
    phi, grad, state = make(config, 1000)
    param, on_gpu = torch.zeros(1000), [x.cuda() for x in (torch.zeros(1000), grad, state, phi)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.step_([on_gpu[0]], [on_gpu[1]], [on_gpu[2]], on_gpu[3], config, 1.0, 0.0, False)
    for _ in range(3):
        graph.replay()
        ops.step_([param], [grad], [state], phi, config, 1.0, 0.0, False)
    close(on_gpu[0], param)
    close(on_gpu[2], state)


def test_other_sizes_are_refused_with_the_list_of_those_compiled() -> None:
    config = l2l.Config(12, 2, "log_sign", 10.0, 0.1)
    phi, grad, state = make(config, 10)
    with pytest.raises(ValueError, match=r"4, 8, 16, 20, 32.*CPU.*l2l_fast\.reference"):
        ops.step(grad.cuda(), None, state.cuda(), phi.cuda(), config)


def test_mixed_devices_are_refused() -> None:
    config = l2l.Config(8, 1, "log_sign", 10.0, 0.1)
    phi, grad, state = make(config, 10)
    with pytest.raises(ValueError, match="state: expected device"):
        ops.step(grad.cuda(), None, state, phi.cuda(), config)
