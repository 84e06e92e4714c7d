"""The operators on a GPU in company: torch.compile, mixed precision, streams, graphs, the profiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast.evaluation import benchmark
from l2l_fast.kernels import operators as ops
from tests.helpers import assert_close, random_network, random_state, structured_gradient

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def network(**options) -> l2l.CoordinatewiseLSTM:
    return random_network(**options).cuda()


def gradients(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return [structured_gradient(shape, seed=seed + k).cuda() for k, shape in enumerate(shapes)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_module_equals_eager(backend: str) -> None:
    net = network()

    def unrolled(grad: Tensor, state: l2l.State) -> tuple[Tensor, l2l.State]:
        total = grad.new_zeros(())
        for _ in range(2):
            update, state = net(2 * grad, state)
            total = total + (update * grad.sign()).sum()
        return total, state

    compiled = torch.compile(unrolled, fullgraph=True, backend=backend)
    for numel in (70, 40):
        results = []
        for function in (unrolled, compiled):
            net.zero_grad()
            (grad,) = gradients((numel,))
            total, state = function(grad.requires_grad_(), random_state(net, numel).to("cuda"))
            total.backward()
            results.append([total, state.data, grad.grad, *(parameter.grad for parameter in net.parameters())])
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected, 1e-5)


def test_compiled_in_place_step_and_segment() -> None:
    net = network()
    phi = net.phi().detach()

    def function(params, grads, states, record):
        places = [0, 2]
        ops.step_(params, grads, states, phi, net.config, 0.5, 0.1, False, record=record, record_tiles=places)
        grad_phi, starts = ops.segment_backward(
            states, [70, 20], places, [record, 2 * record], [], [1.0], [0.5], [0.9], phi, net.config,
            need_grad_start=True,
        )  # fmt: skip
        return params[0] * 2, grad_phi, starts

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        params = [torch.ones(70, device="cuda"), torch.ones(4, 5, device="cuda")]
        states = [random_state(net, n).data.cuda() for n in (70, 20)]
        record = torch.zeros(64 * 3, device="cuda")
        with torch.no_grad():
            doubled, grad_phi, starts = run(params, gradients((70,), (4, 5)), states, record)
        results.append([*params, *states, record, doubled, grad_phi, *starts])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def trained(steps: int = 3, compiled: bool = False, stream: torch.cuda.Stream | None = None) -> Tensor:
    """The parameters and d phi after a recorded segment."""
    net = network(gain=1.0)
    params = [nn.Parameter(torch.ones(shape, device="cuda")) for shape in ((70,), (33, 40))]
    optimizer = l2l.LearnedOptimizer(params, net, lr=0.5)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    every = [gradients((70,), (33, 40), seed=10 * t) for t in range(steps + 1)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        optimizer.start_segment()
        for t in range(steps + 1):
            for param, grad in zip(params, every[t], strict=True):
                param.grad = grad.clone()
            if t < steps:
                step()
        optimizer.backward_segment()
        return torch.cat([*(x.detach().flatten() for x in params), *(p.grad.flatten() for p in net.parameters())])


def test_step_under_torch_compile() -> None:
    assert torch.equal(trained(), trained(compiled=True))


def test_another_stream() -> None:
    expected, stream = trained(), torch.cuda.Stream()
    got = trained(stream=stream)
    stream.synchronize()
    assert torch.equal(got, expected)


def test_work_waits_for_the_stream_it_is_on() -> None:
    """On a stream that is busy writing the gradient: a launch on the default stream would read it too early."""
    net, stream = network(), torch.cuda.Stream()
    (good,) = gradients((5000,))
    expected = torch.zeros(5000, device="cuda")
    state = net.init_state(5000).data
    phi = net.phi().detach()
    ops.step_([expected], [good], [state.clone()], phi, net.config, 1.0, 0.0, False)
    param, grad = torch.zeros_like(expected), torch.zeros_like(good)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        grad.copy_(good)
        ops.step_([param], [grad], [state], phi, net.config, 1.0, 0.0, False)
    stream.synchronize()
    assert torch.equal(param, expected)


def test_graph_of_an_optimizer_step_with_more_tensors_than_the_arguments_hold() -> None:
    net = network(hidden_size=8, num_layers=1)
    results = []
    for captured in (False, True):
        params = [nn.Parameter(torch.ones(3, device="cuda")) for _ in range(600)]
        for k, param in enumerate(params):
            param.grad = torch.full((3,), 0.01 * (k + 1), device="cuda")
        optimizer = l2l.LearnedOptimizer(params, net)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):  # records, runs nothing
                optimizer.step()
        for _ in range(3):
            graph.replay() if captured else optimizer.step()
        results.append(torch.cat([param.detach() for param in params]))
    assert torch.equal(*results)


def test_grad_scaler() -> None:
    net = network()
    param = nn.Parameter(torch.ones(50, device="cuda"))
    optimizer = l2l.LearnedOptimizer([param], net)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    (grad,) = gradients((50,))
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = (param * grad).sum() * (float("inf") if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # unscales, and skips the step on infinities
        scaler.update()
    plain = nn.Parameter(torch.ones(50, device="cuda"))
    other = l2l.LearnedOptimizer([plain], net)
    for _ in range(2):
        plain.grad = grad.clone()
        other.step()
    assert_close(param, plain, 2e-6)


def test_trains_a_model_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).cuda()
    optimizer = l2l.LearnedOptimizer(model.parameters(), network(output_scale=0.001))
    old = [param.detach().clone() for param in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(torch.randn(16, 4, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
    assert all(
        not torch.equal(param, o) and param.isfinite().all() for param, o in zip(model.parameters(), old, strict=True)
    )


def kernels_of(profile: torch.profiler.profile) -> list[str]:
    """What ran on the GPU, in order."""
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == cuda]


def test_one_launch_per_step_of_300_tensors_and_two_per_segment() -> None:
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(150))).cuda()
    optimizer = l2l.LearnedOptimizer(model.parameters(), network())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.start_segment()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    found = kernels_of(profile)
    assert len([name for name in found if "l2l::" in name or "step_kernel" in name]) == 1, found
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.backward_segment()
        torch.cuda.synchronize()
    found = kernels_of(profile)
    assert len([name for name in found if "backward_kernel" in name and "l2l" in name]) == 1, found
    assert len([name for name in found if "reduce_kernel" in name and "l2l" in name]) == 1, found


def test_networks_on_other_devices_are_refused() -> None:
    net = random_network()
    param = nn.Parameter(torch.ones(5, device="cuda"))
    param.grad = torch.ones(5, device="cuda")
    with pytest.raises((ValueError, RuntimeError), match="device"):
        l2l.LearnedOptimizer([param], net).step()
    with pytest.raises(ValueError, match="one device"):
        net(param.grad, net.init_state(5))


def test_the_benchmark_runs_and_counts_one_kernel(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    sizes = ["--sizes", "1000", "--rounds", "1", "--contenders", "eager", "fused"]
    assert benchmark.main(["--device", "cuda", "--quick", *sizes, "--json", str(path)]) == 0
    rows = {row["measure"]: row for row in json.loads(path.read_text())["rows"]}
    assert {"step", "segment", "segment backward", "MNIST episode", "step memory", "segment memory"} <= set(rows)
    assert any(note.startswith("kernels per step") and "fused 1" in note for note in rows["step"]["notes"])
    assert rows["step"]["fraction_of_copy_bandwidth"] > 0 and rows["step"]["fraction_of_fma_peak"] > 0
