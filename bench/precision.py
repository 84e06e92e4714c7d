"""Steps with bfloat16 products beside float32: time, errors, and the losses that shipped optimizers end with.

    python -m bench.precision            # all three
    python -m bench.precision speed      # of a step, float32 and bfloat16 in turn, with 1 and 2 threads; --numel
    python -m bench.precision errors     # of updates and theta after 1, 10 and 100 steps, against float64
    python -m bench.precision losses     # at the end of tasks that the shipped optimizers were trained for

Timings want an idle machine.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast.kernels import reference
from l2l_fast.meta.assignment import optimizer_groups
from l2l_fast.meta.rollout import rollout
from l2l_fast.networks.record import record_of
from l2l_fast.networks.several import Networks
from l2l_fast.optim.checks import PRECISIONS
from l2l_fast.problems.theta import Theta

MARKS = (1, 10, 100)


def show_speed(numel: int, rounds: int, threads_each: tuple[int, ...], clock: str) -> None:
    """Of ``LearnedOptimizer.step()``: medians over rounds that take one sample of each."""
    now = time.thread_time if clock == "cpu" else time.perf_counter
    networks = {
        "2x20": (l2l.CoordinatewiseLSTM(), "float32"),
        "2x20, state int8": (l2l.CoordinatewiseLSTM(), "int8"),
        "2x64": (l2l.CoordinatewiseLSTM(hidden_size=64), "float32"),
        "general": (l2l.load_pretrained("general"), "float32"),
    }
    sets = [name for name in l2l._C.isa_available() if name != "baseline"]
    cases = [("2x20", threads, isa) for threads in threads_each for isa in sets[::-1]]
    cases += [(name, threads_each[-1], sets[-1]) for name in networks if name != "2x20"]
    print(f"ns per coordinate of LearnedOptimizer.step(), {numel:,} coordinates, medians of {rounds} rounds in turn")
    for name, threads, isa in cases:
        torch.set_num_threads(threads)
        l2l._C.set_isa(isa)
        network, kind = networks[name]
        count = numel if network.hidden_size < 64 else numel // 4
        known = {"total_steps": rounds} if network.tensor_inputs else {}
        optimizers = {}
        for precision in PRECISIONS:
            param = nn.Parameter(torch.zeros(count))
            param.grad = torch.randn(count)
            optimizers[precision] = l2l.LearnedOptimizer(
                [param], network, lr=1e-3, state_dtype=kind, precision=precision, **known
            )
            optimizers[precision].step()
        times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for _ in range(rounds):
            for precision, optimizer in optimizers.items():
                begin = now()
                optimizer.step()
                times[precision].append((now() - begin) / count * 1e9)
        wide, narrow = (median(times[precision]) for precision in PRECISIONS)
        least = min(times["float32"]) / min(times["bfloat16"])
        print(
            f"{name:17} {isa:10} {threads} thread(s)  float32 {wide:6.1f}  bfloat16 {narrow:6.1f}  "
            f"{wide / narrow:.2f} times as fast ({least:.2f} by the fastest of each)",
            flush=True,
        )
    l2l._C.set_isa(l2l._C.isa_available()[-1])


def gradients(numel: int) -> Iterator[Tensor]:
    """The same for all: noisy, of coordinates whose scales lie a factor of 10^6 apart."""
    generator = torch.Generator().manual_seed(0)
    scales = 10 ** (6 * torch.rand(numel, generator=generator) - 5)
    means = torch.randn(numel, generator=generator)
    while True:
        yield scales * (means + torch.randn(numel, generator=generator))


def show_errors(numel: int = 1000) -> None:
    """The gradients are given, so that errors are those of the steps alone."""
    print(f"errors against float64, {numel:,} coordinates, the largest and the mean over coordinates")
    names = "quadratic", "mnist-mlp", "neural-art"
    nets = {name: l2l.load_pretrained(name) for name in names}
    for name, net in nets.items():
        print(f"{name}: after steps; of the update its mean size, errors of float32 and bfloat16; of theta the same")
        phi, params = net.phi().detach().double(), {}
        optimizers = {}
        for precision in PRECISIONS:
            params[precision] = nn.Parameter(torch.zeros(numel))
            optimizers[precision] = l2l.LearnedOptimizer([params[precision]], net, precision=precision)
        state = [(h.double(), c.double()) for h, c in net.init_state(numel).to_logical()]
        theta = torch.zeros(numel, dtype=torch.float64)
        for step, grad in zip(range(1, MARKS[-1] + 1), gradients(numel)):
            update, state = reference.lstm_step(grad.double(), state, phi, net.config)
            theta += update
            before = {precision: param.detach().double() for precision, param in params.items()}
            for precision, param in params.items():
                param.grad = grad
                optimizers[precision].step()
            if step in MARKS:
                moved = {p: param.detach().double() for p, param in params.items()}
                updates = [error(moved[p] - before[p], update) for p in PRECISIONS]
                thetas = [error(moved[p], theta) for p in PRECISIONS]
                cells = f"{update.abs().mean():.1e}", *updates, f"{theta.abs().mean():.1e}", *thetas
                print(f"| {step:3} | " + " | ".join(cells) + " |", flush=True)


def error(found: Tensor, expected: Tensor) -> str:
    difference = (found - expected).abs()
    return f"{difference.max():.1e}, {difference.mean():.1e}"


def tasks() -> Iterator[tuple[str, Networks, l2l.problems.Problem, int, range]]:
    """The tasks that a shipped optimizer was trained for, in number and length as time allows."""
    counts = {"quadratic": 50, "quadratic-gaussian": 50, "mnist-mlp": 100, "neural-art": 5, "fashion-conv": 5}
    counts["general"] = 10
    for name, count in counts.items():
        net = l2l.load_pretrained(name)
        record = record_of(net) or {}
        config = {key: value for key, value in record["problem"].items() if key != "training_scales"}
        if config.get("data") == "mnist-60k":
            config["data"] = "mnist-10k-embedded"
        try:
            problem = l2l.problems.get(**config)
            problem.sample(0, "validation")
        except (OSError, ValueError) as problem_error:
            print(f"| {name} | left out: {problem_error} |", flush=True)
            continue
        yield name, net, problem, min(200, int(record["protocol"].get("horizon", 100))), range(count)


def losses(net: Networks, problem: l2l.problems.Problem, horizon: int, seeds: range, precision: str) -> Tensor:
    """The last loss of every task."""
    found = []
    for seed in seeds:
        task = problem.sample(seed, "validation")
        theta = Theta(task)
        optimizer = l2l.LearnedOptimizer(optimizer_groups(task, net, horizon), precision=precision)
        for _ in rollout(theta, optimizer, horizon):
            pass
        found.append(float(theta.value()) / task.num_problems)
    return torch.tensor(found, dtype=torch.float64)


def show_losses() -> None:
    print("last losses, mean over tasks; the same tasks for both; difference: mean over tasks, and its standard error")
    for name, net, problem, horizon, seeds in tasks():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wide, narrow = (losses(net, problem, horizon, seeds, precision) for precision in PRECISIONS)
        difference = narrow - wide
        spread = difference.std() / len(difference) ** 0.5
        print(
            f"| {name} | {len(seeds)} tasks, {horizon} steps | {wide.mean():.5g} | {narrow.mean():.5g} | "
            f"{difference.mean():+.1e} ± {spread:.1e} | {wide.std():.2g} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "speed", "errors", "losses"), default="all")
    parser.add_argument("--numel", type=int, default=1_000_000, help="coordinates of speed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread's, on a busy machine")
    options = parser.parse_args()
    if options.what in ("all", "speed"):
        threads_each = (1,) if options.clock == "cpu" else (1, 2)
        show_speed(options.numel, options.rounds, threads_each, options.clock)
    if options.what in ("all", "errors"):
        torch.set_num_threads(1)
        show_errors()
    if options.what in ("all", "losses"):
        torch.set_num_threads(1)
        show_losses()


if __name__ == "__main__":
    main()
