"""Meta-training that starts where the memory already works: NTM-BFGS from BFGS, beside heavy ball and a plain LSTM.

    python bench/memory_that_pays.py --out runs    # trains what is not there yet (resumable), then prints the tables
    python bench/memory_that_pays.py --out runs --families noisy --seeds 0    # a part of it

Four families: uniform quadratics, quadratics of condition 1e3, the same with noise on every gradient, and logistic
regression on real digits. Each network is trained from three seeds; heavy ball has rate, momentum and schedule tuned
(l2l_fast.evaluation.baselines). Every choice is made on validation tasks, all figures are of test tasks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast.evaluation import baselines
from l2l_fast.meta import SegmentTrace
from l2l_fast.meta.evaluation import evaluate
from l2l_fast.problems import Problem, Quadratic, Task
from l2l_fast.problems.data import load_mnist
from l2l_fast.problems.quadratic import QuadraticTask

TEST_SEEDS = range(100, 104)
SEEDS = (0, 1, 2)
VALIDATION_TASKS = 4
FLOOR = 1e-12  # of losses in a logarithm: where float32 ends


class NoisyTask(QuadraticTask):
    """A quadratic whose gradient has noise: of standard deviation ``noise`` per coordinate, drawn at every evaluation.
    The loss itself is exact."""

    noise = 0.0

    def forward(self) -> Tensor:
        noise = self.noise * torch.randn(self.theta.shape, generator=self.generator).to(self.theta)
        tilt = (noise * self.theta).sum()
        return super().forward() + (tilt - tilt.detach())


class NoisyQuadratic(Quadratic):
    name = "noisy_quadratic"

    def __init__(self, batch: int, noise: float = 0.1) -> None:
        super().__init__(batch=batch, family="ill_conditioned")
        self.noise = noise

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> NoisyTask:
        options = (self.family, self.condition, self.batch, self.dim, self.init_std)
        task = NoisyTask(generator, *options, device)
        task.noise = self.noise
        return task

    def config(self) -> dict[str, Any]:
        return {**super().config(), "name": self.name, "noise": self.noise}


class DigitsTask(Task):
    """Logistic regression on a fixed set of images: mean cross-entropy, without minibatches."""

    def __init__(self, generator: torch.Generator, images: Tensor, labels: Tensor, device: torch.device) -> None:
        super().__init__(generator)
        self.register_buffer("images", images.to(device))
        self.register_buffer("labels", labels.to(device))
        self.weight = nn.Parameter((0.01 * torch.randn(10, 784, generator=generator)).to(device))
        self.bias = nn.Parameter(torch.zeros(10, device=device))

    def forward(self) -> Tensor:
        return F.cross_entropy(F.linear(self.images, self.weight, self.bias), self.labels)


class Digits(Problem):
    """Logistic regression (784 x 10 weights and 10 biases) on ``size`` images of MNIST, other ones in every task, of
    splits without an image in common."""

    name = "digits"

    def __init__(self, size: int = 1000) -> None:
        self.size, self.data = size, load_mnist(None)

    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> DigitsTask:
        images = self.data.split(split)
        chosen = torch.randperm(len(images.labels), generator=generator)[: self.size]
        pixels = images.images[chosen].view(-1, 784).float() / 255
        return DigitsTask(generator, pixels, images.labels[chosen], device)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.size, "data": self.data.name}


def log_loss(trace: SegmentTrace) -> Tensor:
    """The mean logarithm of the segment's losses: a factor counts the same early and late."""
    return (trace.losses[1:] + FLOOR).log().mean()


@dataclass(frozen=True)
class Family:
    """A family of problems, and how networks are trained on it."""

    title: str
    problem: Callable[[int], Problem]  # of so many problems side by side, where there are any
    bfgs: dict[str, Any]  # of NTMBFGS.from_bfgs
    lr: float  # of meta-Adam, for networks that begin as BFGS
    episodes: int = 32
    lstm_episodes: int = 160
    horizon: int = 100
    unroll: int = 20
    steps: tuple[int, ...] = (10, 20, 40, 60, 80, 100)  # of the table
    lstm: str = "identity"  # its preprocess
    output_scale: float = 1.0  # of the LSTM


SMALL = {"hidden_size": 8, "num_layers": 1}  # a controller that has little to say needs no more
FAMILIES = {
    "uniform": Family(
        "uniform quadratics", lambda b: Quadratic(batch=b, family="uniform"), {**SMALL, "memory": "low_rank"}, 5e-3
    ),
    "ill_conditioned": Family(
        "quadratics of condition 1e3", lambda b: Quadratic(batch=b, family="ill_conditioned"), SMALL, 5e-3
    ),
    "noisy": Family(
        "the same with noisy gradients",
        lambda b: NoisyQuadratic(b),
        {**SMALL, "memory": "low_rank", "history": 5, "growth": 3.0},
        1e-2,
    ),
    "digits": Family(
        "logistic regression on digits",
        lambda b: Digits(),
        {**SMALL, "memory": "low_rank"},
        5e-3,
        lstm_episodes=32,
        horizon=25,
        unroll=25,
        steps=(2, 5, 10, 15, 20, 25),
        lstm="log_sign",
        output_scale=0.1,
    ),
}
NETWORKS = ("NTM-BFGS from BFGS", "LSTM")
TRAIN_BATCH, TEST_BATCH = 64, 128


def network(name: str, family: Family) -> l2l.CoordinatewiseLSTM:
    """A new network, made of the global random state."""
    if name == "NTM-BFGS from BFGS":
        return l2l.NTMBFGS.from_bfgs(**family.bfgs)
    return l2l.CoordinatewiseLSTM(preprocess=family.lstm, output_scale=family.output_scale)


def test_curves(net: l2l.CoordinatewiseLSTM, family: Family) -> Tensor:
    """Mean losses by task and step, ``[tasks, horizon + 1]``, of tasks that nothing was chosen on."""
    return evaluate(net, family.problem(TEST_BATCH), TEST_SEEDS, family.horizon)


def train(name: str, key: str, seed: int, out: Path, lr: float | None = None, episodes: int | None = None) -> None:
    """One run: ``{name}-{family}-{seed}.json`` with its curves on test tasks, and the network beside it."""
    path = out / f"{name.replace(' ', '-')}-{key}-{seed}.json"
    if path.exists():
        return
    family = FAMILIES[key]
    torch.manual_seed(seed)
    net = network(name, family)
    begins = isinstance(net, l2l.NTMBFGS)
    if episodes is None:
        episodes = family.episodes if begins else family.lstm_episodes
    lr = (family.lr if begins else 1e-2) if lr is None else lr
    trainer = l2l.MetaTrainer(
        net,
        family.problem(TRAIN_BATCH),
        family.horizon,
        family.unroll,
        lr,
        seed,
        meta_loss=log_loss if begins else None,
        betas=(0.9, 0.99),
        clip_norm=1.0,
        decay_episodes=episodes,
        validate_every=episodes // 4,
        validation_episodes=VALIDATION_TASKS,
    )
    validation = family.problem(TRAIN_BATCH), range(VALIDATION_TASKS)
    start = evaluate(net, *validation, family.horizon, split="validation")[:, -1].mean().item() if begins else None
    begin = time.monotonic()
    trainer.fit(episodes, progress=False)
    best, found = trainer.best_net(), trainer.counters.best_loss
    result = {
        "episodes": episodes,
        "lr": lr,
        "seconds": time.monotonic() - begin,
        "skipped_updates": trainer.counters.skipped_updates,
        "best_episode": trainer.counters.best_episode,
        "validation": found,
        "validation_untrained": start,
        "curves": test_curves(best, family).tolist(),
    }
    best.save(path.with_suffix(".safetensors"))
    path.write_text(json.dumps(result))
    final = torch.tensor(result["curves"])[:, -1].mean()
    print(
        f"{path.stem}: final {final:.3g}, validation {found:.3g} (untrained {start}), best after "
        f"{result['best_episode']} of {episodes} episodes, {result['seconds']:.0f} s",
        flush=True,
    )


def untrained(key: str, out: Path) -> None:
    path = out / f"untrained-{key}.json"
    if not path.exists():
        curves = test_curves(network("NTM-BFGS from BFGS", FAMILIES[key]), FAMILIES[key])
        path.write_text(json.dumps({"curves": curves.tolist()}))


def heavy_ball(key: str, out: Path) -> None:
    """Rate, momentum and schedule tuned on validation tasks."""
    path = out / f"heavy-ball-{key}.json"
    if path.exists():
        return
    tuned = baselines.compare(
        FAMILIES[key].problem(TEST_BATCH),
        FAMILIES[key].horizon,
        TEST_SEEDS,
        names=["momentum"],
        tuning_seeds=range(VALIDATION_TASKS),
        search_options={"sweep_tasks": 1, "points_per_decade": 8},
        cache=out / f"trials-{key}",
    )["momentum"]
    path.write_text(json.dumps({"setup": tuned.search.setup.describe(), "curves": tuned.losses.tolist()}))


def _mean(path: Path) -> Tensor:
    return torch.tensor(json.loads(path.read_text())["curves"], dtype=torch.float64).mean(0)


def rows(key: str, out: Path) -> list[tuple[str, list[Tensor]]]:
    """Optimizers and their mean test curves, one for every seed of training."""
    found: list[tuple[str, list[Tensor]]] = []
    path = out / f"heavy-ball-{key}.json"
    if path.exists():
        found.append((f"heavy ball: {json.loads(path.read_text())['setup']}", [_mean(path)]))
    for name in NETWORKS:
        if name == "NTM-BFGS from BFGS" and (out / f"untrained-{key}.json").exists():
            found.append(("NTM-BFGS from BFGS, untrained", [_mean(out / f"untrained-{key}.json")]))
        paths = sorted(out.glob(f"{name.replace(' ', '-')}-{key}-[0-9]*.json"))
        if paths:
            found.append((name, [_mean(path) for path in paths]))
    return found


def table(key: str, out: Path) -> str:
    """Markdown: mean test losses at a few steps, and the final one of every seed."""
    steps = FAMILIES[key].steps
    lines = [f"**{FAMILIES[key].title}**", "", f"| step | {' | '.join(map(str, steps))} | final, by seed |"]
    lines.append("|---" * (len(steps) + 2) + "|")
    for name, curves in rows(key, out):
        mean = torch.stack(curves).mean(0)
        seeds = ", ".join(f"{curve[-1]:.3g}" for curve in curves) if len(curves) > 1 else ""
        lines.append(f"| {name} | {' | '.join(f'{mean[t]:.3g}' for t in steps)} | {seeds} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--episodes", type=int, help="of training, in the place of the family's own number")
    parser.add_argument("--lr", type=float, help="of meta-Adam, in the place of the family's")
    parser.add_argument("--report", action="store_true", help="train nothing, print what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for key in [] if arguments.report else arguments.families:
        untrained(key, arguments.out)
        for name in arguments.networks:
            for seed in arguments.seeds:
                train(name, key, seed, arguments.out, arguments.lr, arguments.episodes)
        heavy_ball(key, arguments.out)
    for key in arguments.families:
        print(table(key, arguments.out))


if __name__ == "__main__":
    main()
