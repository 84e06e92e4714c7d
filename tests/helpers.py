"""What several test files share: networks, structured gradients, an independent LSTM, error measures."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast.kernels.state import Averages


def random_network(seed: int = 0, gain: float = 1.5, **options) -> l2l.CoordinatewiseLSTM:
    """A network with weights large enough that every gate and the whole state matter."""
    generator = torch.Generator().manual_seed(seed)
    net = l2l.CoordinatewiseLSTM(**options)
    bound = gain / math.sqrt(net.hidden_size)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return net


def phi_of(net: l2l.CoordinatewiseLSTM) -> Tensor:
    """The flat vector of its weights, as the operators take it."""
    return net.phi().detach()


def random_state(net: l2l.CoordinatewiseLSTM, numel: int, seed: int = 1, dtype=torch.float32) -> l2l.State:
    generator = torch.Generator().manual_seed(seed)
    shape = (numel, net.hidden_size)
    pairs = [
        (torch.randn(shape, generator=generator).clamp(-2, 2) * 0.4, torch.randn(shape, generator=generator) * 0.7)
        for _ in range(net.num_layers)
    ]
    averages = []
    if net.config.averages:
        first, root = torch.randn(numel, 2, generator=generator), torch.rand(numel, 2, generator=generator) + 0.1
        averages = [Averages(torch.cat([0.1 * first, root], dim=1).to(dtype), age=3)]
    return l2l.State.from_logical([*((h.to(dtype), c.to(dtype)) for h, c in pairs), *averages])


def structured_gradient(shape: tuple[int, ...], seed: int = 2, dtype=torch.float32) -> Tensor:
    """Badly scaled and far from iid: scales 10^U[-6, 1] per leading index times 10^U[-1, 1] per element, one sign
    pattern along the last axis, some exact zeros. A wrong axis or a wrong stride cannot hide in it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    if base.dim() == 0:
        return (base * 10 ** (torch.rand((), generator=generator) * 7 - 6)).to(dtype)
    rows = 10 ** (torch.rand(shape[0], generator=generator) * 7 - 6)
    base = base * rows.view(-1, *[1] * (len(shape) - 1))
    base = base * 10 ** (torch.rand(shape, generator=generator) * 2 - 1)
    pattern = torch.arange(shape[-1]) % 3 - 1.0
    pattern[pattern == 0] = 0.3
    base = base * pattern
    base[torch.rand(shape, generator=generator) < 0.02] = 0.0
    return base.to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; 0 if both are empty or zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    difference = (actual - expected).norm()
    return 0.0 if difference == 0 else float(difference / expected.norm().clamp_min(1e-300))


# A worker thread of gloo that lets go of tensors while Python shuts down: once in some ten runs, after all was said.
AT_EXIT = "terminate called without an active exception"


def run_processes(script: str, *arguments: object, count: int, options: Sequence[str] = ()) -> None:
    """Run ``python tests/SCRIPT *arguments RANK`` for every rank at once; fails, with what they print, if one does.
    What :data:`AT_EXIT` ended is run anew.

    options: of Python itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(l2l.__file__).parents[1])}
    command = [sys.executable, *options, str(Path(__file__).parent / script), *map(str, arguments)]
    for _ in range(3):
        workers = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank in range(count)
        ]
        try:
            outputs = [worker.communicate(timeout=120)[0].decode() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        ends = zip(workers, outputs, strict=True)
        failed = [output for worker, output in ends if worker.returncode != 0]
        if any(output.strip() != AT_EXIT for output in failed) or not failed:
            break
    assert not failed, "\n".join(outputs)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"  # a NaN fails too


def double(net: l2l.CoordinatewiseLSTM) -> l2l.CoordinatewiseLSTM:
    """A float64 copy."""
    copy = l2l.CoordinatewiseLSTM(**net.config._asdict(), dtype=torch.float64)
    with torch.no_grad():
        for new, old in zip(copy.parameters(), net.parameters(), strict=True):
            new.copy_(old)
    return copy


class Cells(nn.Module):
    """The network written down a second time, independently: torch.nn.LSTMCell and the authors' form of log_sign."""

    def __init__(self, net: l2l.CoordinatewiseLSTM) -> None:
        super().__init__()
        cells, self.linear = net.to_lstm_cells()
        self.cells = nn.ModuleList(cells)
        self.config = net.config

    def forward(self, grad: Tensor, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        flat = grad.reshape(-1)
        if self.config.preprocess == "log_sign":
            p = self.config.p
            logarithm = (flat.abs() + 1e-300).log() / p
            x = torch.stack([logarithm.clamp_min(-1.0), (flat * math.exp(p)).clamp(-1.0, 1.0)], dim=-1)
        else:
            x = flat.unsqueeze(-1)
        new_state = []
        for cell, pair in zip(self.cells, state, strict=True):
            pair = cell(x, pair)
            new_state.append(pair)
            x = pair[0]
        return (self.config.output_scale * self.linear(x)).view(grad.shape), new_state

    def flat_gradient(self) -> Tensor:
        """The gradients of all parameters in the order of phi."""
        parts = []
        for cell in self.cells:
            parts += [cell.weight_ih.grad.flatten(), cell.weight_hh.grad.flatten(), cell.bias_ih.grad]
        return torch.cat([*parts, self.linear.weight.grad.flatten(), self.linear.bias.grad])


def recorded_samples(monkeypatch) -> list[tuple[int, str, str]]:
    """The list of every ``sample(seed, split, device)`` of any problem from now on."""
    calls: list[tuple[int, str, str]] = []
    sample = l2l.problems.Problem.sample

    def record(self, seed, split="train", device=None):
        calls.append((seed, split, str(device)))
        return sample(self, seed, split, device)

    monkeypatch.setattr(l2l.problems.Problem, "sample", record)
    return calls


CONFIGS = [
    {"hidden_size": 20, "num_layers": 2, "preprocess": "log_sign", "p": 10.0, "output_scale": 0.1},
    {"hidden_size": 20, "num_layers": 2, "preprocess": "identity", "p": 10.0, "output_scale": 1.0},
    {"hidden_size": 4, "num_layers": 1, "preprocess": "log_sign", "p": 5.0, "output_scale": 0.01},
    {"hidden_size": 7, "num_layers": 3, "preprocess": "log_sign", "p": 10.0, "output_scale": 0.1},
    {"hidden_size": 33, "num_layers": 4, "preprocess": "identity", "p": 10.0, "output_scale": -0.5},
    {"hidden_size": 64, "num_layers": 2, "preprocess": "log_sign", "p": 10.0, "output_scale": 0.1},
]
CONFIG_IDS = [f"H{c['hidden_size']}xL{c['num_layers']}-{c['preprocess']}" for c in CONFIGS]
