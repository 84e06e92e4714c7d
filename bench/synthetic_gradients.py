"""What synthetic gradients win back of what short segments lose: T = 5 with and without them, beside longer segments.

    python -m bench.synthetic_gradients run --problem quadratic      # 3 seeds of 4 contenders; may be stopped
    python -m bench.synthetic_gradients run --problem mnist
    python -m bench.synthetic_gradients memory                       # bytes per coordinate at the peak of an episode
    python -m bench.synthetic_gradients table                        # the tables of docs/synthetic_gradients.md

Every contender trains the same network from the same weights on the same tasks, in one thread, for as many episodes;
the network of the last episode optimises validation tasks, the same for all. Results are lines in
docs/synthetic_gradients.jsonl (--results); a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import l2l_fast as l2l
from l2l_fast.meta import Protocol, SyntheticGradients
from l2l_fast.meta.estimators import FusedBPTT
from l2l_fast.problems import MNIST, ModuleProblem, Problem, Quadratic

RESULTS = Path(__file__).parent.parent / "docs/synthetic_gradients.jsonl"
HORIZON, SEEDS, VALIDATION = 100, range(3), 20
TAIL = 5  # losses at the end of an episode that "final" is the mean of: minibatches make one alone noisy

# Problem: the problem, the network's options, the trainer's, episodes.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "quadratic": (
        {"hidden_size": 20, "num_layers": 1, "preprocess": "identity", "output_scale": 1.0},
        {"lr": 1e-2, "betas": (0.9, 0.99), "clip_norm": 1.0},
        120,
    ),
    "mnist": (
        {"hidden_size": 8, "num_layers": 1, "preprocess": "log_sign", "output_scale": 0.1},
        {"lr": 5e-3, "betas": (0.9, 0.99), "clip_norm": 0.3},
        100,
    ),
}
CONTENDERS: dict[str, dict[str, Any]] = {
    "T=5": {"unroll": 5},
    "T=5, synthetic gradients": {"unroll": 5, "synthetic_gradients": True},
    "T=20": {"unroll": 20},
    "T=100": {"unroll": 100},
}


def problem_of(name: str) -> Problem:
    return Quadratic(dim=10, batch=16) if name == "quadratic" else MNIST(hidden=(10,), data="mnist-10k-embedded")


def train(name: str, contender: str, seed: int, episodes: int | None = None) -> dict[str, Any]:
    """One run's line: what it was, losses on validation tasks, and CPU seconds per episode."""
    torch.set_num_threads(1)
    network, options, usual = SETTINGS[name]
    episodes = usual if episodes is None else episodes
    net, problem = l2l.CoordinatewiseLSTM(**network), problem_of(name)
    net.reset_parameters(torch.Generator().manual_seed(seed))
    more = {"decay_episodes": episodes, "validate_every": 0, "seed": seed}
    trainer = l2l.MetaTrainer(net, problem, horizon=HORIZON, **options, **more, **CONTENDERS[contender])
    begin = time.process_time()
    trainer.fit(episodes, progress=False)
    seconds = time.process_time() - begin
    curves = trainer.evaluate(VALIDATION, best=False, split="validation")
    return {
        "problem": name,
        "contender": contender,
        "seed": seed,
        "episodes": episodes,
        "final": curves[:, -TAIL:].mean().item(),
        "mean": curves[:, 1:].mean().item(),
        "seconds_per_episode": round(seconds / episodes, 4),
        "skipped_updates": trainer.counters.skipped_updates,
    }


def run(name: str, results: Path, seeds: list[int], contenders: list[str]) -> None:
    for seed in seeds:
        for contender in contenders:
            key = name, contender, seed
            if any((line["problem"], line["contender"], line["seed"]) == key for line in lines(results)):
                continue
            found = train(name, contender, seed)
            print(found, flush=True)
            with results.open("a") as file:
                file.write(json.dumps(found) + "\n")


def lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def show_table(results: Path) -> None:
    found = lines(results)
    for name in dict.fromkeys(line["problem"] for line in found):
        print(f"\n{name}, {SETTINGS[name][2]} episodes of {HORIZON} steps\n")
        print("| | final loss, by seed | mean | over all steps | CPU s per episode |\n|---|---|---:|---:|---:|")
        means = {}
        for contender in CONTENDERS:
            own = [line for line in found if (line["problem"], line["contender"]) == (name, contender)]
            if own:
                own.sort(key=lambda line: line["seed"])
                finals = " ".join(f"{line['final']:.4f}" for line in own)
                means[contender] = mean(line["final"] for line in own)
                over, seconds = mean(line["mean"] for line in own), mean(line["seconds_per_episode"] for line in own)
                print(f"| {contender} | {finals} | {means[contender]:.4f} | {over:.4f} | {seconds:.3f} |")
        if {"T=5", "T=5, synthetic gradients", "T=20"} <= set(means):
            gap = means["T=5"] - means["T=20"]
            closed = means["T=5"] - means["T=5, synthetic gradients"]
            if gap > 0:
                print(f"\nOf the gap between T=5 and T=20, {gap:.4f}, synthetic gradients close {closed / gap:.0%}.")
            else:
                print("\nT=20 is no better than T=5 here: there is no gap to close.")


# ---- memory ----


class _Bowl(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(n))


def show_memory(n: int) -> None:
    """Each contender in a process of its own, whose largest resident size is read; Linux."""
    print("| | bytes per coordinate |\n|---|---:|")
    for contender in ("T=5", "T=5, synthetic gradients", "T=20"):
        command = [sys.executable, "-m", "bench.synthetic_gradients", "one-memory", "--contender", contender]
        done = subprocess.run([*command, "--numel", str(n)], capture_output=True, text=True, check=True)
        print(f"| {contender} | {int(done.stdout.splitlines()[-1]) / n:.0f} |", flush=True)


def peak_bytes(contender: str, n: int) -> int:
    """The growth of the largest resident size in one episode of two segments, the paper's network, n coordinates."""
    torch.set_num_threads(1)
    unroll = CONTENDERS[contender]["unroll"]
    estimator = SyntheticGradients() if "synthetic_gradients" in CONTENDERS[contender] else FusedBPTT()
    net = l2l.CoordinatewiseLSTM()
    protocol = Protocol.make(2 * unroll, unroll)

    def episode(size: int) -> None:
        bowl = ModuleProblem(lambda _: _Bowl(size), lambda module, _: module.x.square().sum(), name="bowl")
        estimator.episode(bowl.sample(0), net, protocol, net.zero_grad)

    episode(64)  # what is allocated once
    if isinstance(estimator, SyntheticGradients):
        estimator.predictors["net"].agreement.fill_(1.0)  # as in a run where predictions are made use of
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    episode(n)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("run", "memory", "table", "one-memory"))
    parser.add_argument("--problem", choices=SETTINGS, default="mnist")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--contender", choices=CONTENDERS, default="T=5")
    parser.add_argument("--numel", type=int, default=64 * 500)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.problem, arguments.results, arguments.seeds, arguments.contenders)
    elif arguments.command == "memory":
        show_memory(arguments.numel)
    elif arguments.command == "one-memory":
        print(peak_bytes(arguments.contender, arguments.numel))
    else:
        show_table(arguments.results)


if __name__ == "__main__":
    main()
