"""What states of fewer bytes cost and save: bytes, time, losses, and a model of GPT-2's shape.

    python -m bench.state_types bytes      # per parameter, by network and type, as optimizers hold them
    python -m bench.state_types speed      # of a step, by network and type; in one thread unless --threads; --numel
    python -m bench.state_types cells      # how unlike cells are: what a step of codes has to be chosen for
    python -m bench.state_types losses     # after 1,000 steps on four networks, five seeds each: some ten minutes
    python -m bench.state_types matrices   # a step on one square matrix, in microseconds; --threads
    python -m bench.state_types gpt2       # 124 million parameters, int8: 20 steps, within 24 GB; --network, --steps

Timings want an idle machine.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import l2l_fast as l2l
from bench.validation import sample
from l2l_fast.kernels.state_types import STATE_DTYPES

ROOT = Path(__file__).parent.parent
LSTM = ROOT / "docs/general/weights/lstm-2x20.safetensors"
STEPS, SEEDS, TAIL = 1000, 5, 50
MATRIX = "general-matrix"  # whose state is that of general-small, and whose steps depend on shapes


def networks() -> dict[str, l2l.CoordinatewiseLSTM]:
    return {
        "LSTM 2x20": l2l.CoordinatewiseLSTM(),
        "LSTM 1x8": l2l.CoordinatewiseLSTM(hidden_size=8, num_layers=1),
        "general": l2l.load_pretrained("general"),
        "general-small": l2l.load_pretrained("general-small"),
    }


def show_bytes() -> None:
    print(f"{'network':16}" + "".join(f"{kind:>12}" for kind in STATE_DTYPES) + "   bytes per parameter")
    for name, network in {**networks(), MATRIX: l2l.load_pretrained(MATRIX)}.items():
        found = []
        for kind in STATE_DTYPES:
            param = nn.Parameter(torch.zeros(1000, 640))
            param.grad = torch.ones_like(param)
            optimizer = l2l.LearnedOptimizer([param], network, state_dtype=kind)
            optimizer.step()
            state = optimizer.state[param]["lstm_state"]
            found.append(state.numel() * state.element_size() / param.numel())
        print(f"{name:16}" + "".join(f"{each:12.2f}" for each in found))


def show_speed(threads: int, numel: int) -> None:
    """Of ``LearnedOptimizer.step()``: medians over rounds that take one sample of each type, ratios to float32."""
    torch.set_num_threads(threads)
    rounds = max(15, 2_000_000 // numel)
    print(f"ns per coordinate, {numel:,} of them, {threads} thread(s), {l2l._C.isa()}")
    for name, network in networks().items():
        grad, known = torch.randn(numel), {"total_steps": rounds} if network.tensor_inputs else {}
        optimizers = {}
        for kind in STATE_DTYPES:
            param = nn.Parameter(torch.zeros(numel))
            param.grad = grad
            optimizers[kind] = l2l.LearnedOptimizer([param], network, lr=1e-3, state_dtype=kind, **known)
        times: dict[str, list[float]] = {kind: [] for kind in optimizers}
        for _ in range(rounds):
            for kind, optimizer in optimizers.items():
                begin = time.perf_counter()
                optimizer.step()
                times[kind].append(time.perf_counter() - begin)
        middle = {kind: median(each) / numel * 1e9 for kind, each in times.items()}
        row = "".join(f"   {kind} {each:6.1f} ({each / middle['float32']:.3f})" for kind, each in middle.items())
        print(f"{name:14}{row}", flush=True)


def show_matrices(threads: int) -> None:
    """Of whole steps on one square matrix, beside fused Adam's: medians over rounds that take one sample of each."""
    torch.set_num_threads(threads)
    print(f"microseconds per step, {threads} thread(s), {l2l._C.isa()}")
    for size in (64, 256, 1024, 2048):
        grad, optimizers = torch.randn(size, size), {}
        for name in ("Adam", "general-small", MATRIX):
            param = nn.Parameter(torch.zeros(size, size))
            param.grad = grad
            if name == "Adam":
                optimizers[name] = torch.optim.Adam([param], fused=True)
            else:
                optimizers[name] = l2l.LearnedOptimizer([param], l2l.load_pretrained(name), total_steps=1000)
        times: dict[str, list[float]] = {name: [] for name in optimizers}
        for _ in range(300 if size < 1000 else 15):
            for name, optimizer in optimizers.items():
                begin = time.perf_counter()
                optimizer.step()
                times[name].append(time.perf_counter() - begin)
        row = "".join(f"   {name} {median(each) * 1e6:9.0f}" for name, each in times.items())
        print(f"{size:5}^2{row}", flush=True)


def show_cells() -> None:
    """The median size of each cell over all coordinates, after 500 steps of mnist-mlp on its perceptron."""
    task, network = mnist(0)[0], l2l.load_pretrained("mnist-mlp")
    optimizer = l2l.LearnedOptimizer(task.parameters(), network)
    for _ in range(500):
        optimizer.zero_grad()
        task().backward()
        optimizer.step()
    states = [optimizer.state_of(param) for param in task.parameters()]
    for layer in range(network.num_layers):
        c = torch.cat([state.to_logical()[layer][1] for state in states if state is not None]).abs()
        middle = c.median(0).values.sort().values
        print(f"layer {layer}: median |c| of a cell {middle[0]:.2g} .. {middle[-1]:.2g}, largest |c| {c.max():.3g}")


def zoo(family: str) -> Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    def make(seed: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        return sample(family, seed), lambda task: task.losses()

    return make


def mnist(seed: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    return l2l.problems.MNIST(data="mnist-10k-embedded").sample(seed, "validation"), lambda task: task().reshape(1)


def final_loss(
    make: Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]],
    network: l2l.CoordinatewiseLSTM,
    kind: str,
    seed: int,
) -> float:
    """The mean of the last 50 of 1,000 losses."""
    task, losses_of = make(seed)
    known = {"total_steps": STEPS} if network.tensor_inputs else {}
    optimizer = l2l.LearnedOptimizer(task.parameters(), network, state_dtype=kind, **known)
    tail = []
    for step in range(STEPS):
        losses = losses_of(task)
        if step >= STEPS - TAIL:
            tail.append(losses.detach().mean().item())
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return mean(tail)


def show_losses() -> None:
    lstm = l2l.load(LSTM)
    cases = {
        "mnist-mlp on its perceptron": (mnist, l2l.load_pretrained("mnist-mlp")),
        "LSTM 2x20 on a vision transformer": (zoo("vision-transformer"), lstm),
        "LSTM 2x20 on a deep GRU": (zoo("deep-gru"), lstm),
        "general on a residual perceptron": (zoo("residual-perceptron"), l2l.load_pretrained("general")),
    }
    print(f"loss after {STEPS:,} steps: mean over {SEEDS} seeds (smallest .. largest)")
    for name, (make, network) in cases.items():
        print(name)
        for kind in STATE_DTYPES:
            found = [final_loss(make, network, kind, seed) for seed in range(SEEDS)]
            print(f"  {kind:9} {mean(found):.4f} ({min(found):.4f} .. {max(found):.4f})", flush=True)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


class GPT2(nn.Module):
    """The shape of GPT-2 small: 12 layers of 768, 50,257 tokens, whose embedding is the head, 1,024 positions."""

    def __init__(self, width: int = 768, layers: int = 12, heads: int = 12, tokens: int = 50257) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(1024, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for weight in (self.tokens.weight, self.positions.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.norm(self.blocks(x)) @ self.tokens.weight.T


def show_gpt2(name: str, kind: str, steps: int = 20, length: int = 256) -> None:
    """Text of its own making: each token is followed by one of eight."""
    torch.manual_seed(0)
    model, successors = GPT2(), torch.randint(50257, (50257, 8))
    numel = sum(param.numel() for param in model.parameters())
    network = l2l.load_pretrained(name) if name == MATRIX else networks()[name]
    if not network.tensor_inputs:
        with torch.no_grad():
            network.weight_out.mul_(0.01)  # untrained: small random updates
    known = {"total_steps": steps} if network.tensor_inputs else {}
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if network.orthogonal:  # rows of an embedding are no directions of one space
        embeddings = [model.tokens.weight, model.positions.weight]
        groups = [{"params": [*model.blocks.parameters(), *model.norm.parameters()]}]
        groups.append({"params": embeddings, "network": l2l.load_pretrained("general-small")})
    optimizer = l2l.LearnedOptimizer(groups, network, state_dtype=kind, **known)
    print(f"{numel:,} parameters, {length} tokens a step, {name}, {kind}, {torch.get_num_threads()} threads")
    times: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for step in range(steps):
        ids = [torch.randint(50257, (1,))]
        for _ in range(length):
            ids.append(successors[ids[-1], torch.randint(8, (1,))])
        text = torch.stack(ids, 1)
        marks = [time.perf_counter()]
        loss = functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[0, 1:])
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        for part, begin, end in zip(times.values(), marks, marks[1:], strict=False):
            part.append(end - begin)
        took = "  ".join(f"{part} {each[-1]:.2f} s" for part, each in times.items())
        print(f"step {step + 1:2}  loss {loss.item():.3f}  {took}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    state = sum(s["lstm_state"].numel() * s["lstm_state"].element_size() for s in optimizer.state.values())
    print("medians: " + ", ".join(f"{k} {median(v):.2f} s" for k, v in times.items()))
    print(f"state {state / 1e9:.2f} GB ({state / numel:.2f} bytes per parameter), {peak:.2f} GB at the peak in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bytes", "speed", "matrices", "cells", "losses", "gpt2"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--numel", type=int, default=2_000_000, help="coordinates of speed")
    parser.add_argument("--state-dtype", choices=tuple(STATE_DTYPES), default="int8", help="of gpt2")
    parser.add_argument("--network", choices=(*networks(), MATRIX), default="LSTM 2x20", help="of gpt2")
    parser.add_argument("--steps", type=int, default=20, help="of gpt2")
    options = parser.parse_args()
    if options.what == "bytes":
        show_bytes()
    elif options.what == "speed":
        show_speed(options.threads or 1, options.numel)
    elif options.what == "matrices":
        show_matrices(options.threads or 1)
    elif options.what == "cells":
        show_cells()
    else:
        torch.set_num_threads(options.threads or torch.get_num_threads())
        show_losses() if options.what == "losses" else show_gpt2(options.network, options.state_dtype, options.steps)


if __name__ == "__main__":
    main()
