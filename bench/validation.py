"""What general optimizers are chosen by: kinds of optimizees that their training does not have, beside tuned Adam.

    python -m bench.validation general mine.safetensors --out runs/validation

Ten tasks of ``Zoo("validation")``, four problems each, 1,000 steps. Adam, constant and with a cosine, is tuned over
half decades on the very same tasks, which favours it. Printed are ln ratios of losses: of the last 5 % of the steps to
Adam's at its best constant rate, to the best of both schedules, and of steps 90 to 109 to the former's. Runs in one
thread; Adam's results are kept in the folder.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from l2l_fast.cli.console import network
from l2l_fast.evaluation.suite.measures import interquartile_mean
from l2l_fast.networks.lstm import CoordinatewiseLSTM
from l2l_fast.optim.optimizer import LearnedOptimizer
from l2l_fast.problems.zoo import Zoo, ZooTask

TASKS = (
    *(("residual-perceptron", seed) for seed in (0, 1)),
    *(("vision-transformer", seed) for seed in (0, 1)),
    *(("residual-convolutions", seed) for seed in (0, 1)),
    *(("patch-mixer", seed) for seed in (0, 1)),
    ("variational-autoencoder", 0),
    ("deep-gru", 0),
)
PROBLEMS, STEPS = 4, 1000
HALF_DECADES = range(-10, 1)


def sample(family: str, seed: int) -> ZooTask:
    """The task, in its usual units."""
    zoo = Zoo(family, problems=PROBLEMS, rescale=False, data="mnist-10k-embedded")
    task = zoo.sample(seed, "validation")
    assert isinstance(task, ZooTask)
    return task


def adam(family: str, seed: int, lr: float, cosine: bool) -> Tensor:
    """Losses ``[steps]``, means over the problems; inf from where they are not finite."""
    task = sample(family, seed)
    optimizer = torch.optim.Adam(task.parameters(), lr=lr, fused=True)
    losses = []
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * t / STEPS) if cosine else 1.0)
        loss = task.losses()
        losses.append(loss.detach().mean())
        if not losses[-1].isfinite():
            return torch.cat([torch.stack(losses[:-1]), torch.full((STEPS - t,), math.inf)])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return torch.stack(losses)


def learned(net: CoordinatewiseLSTM, family: str, seed: int) -> Tensor:
    """The same of a network, which optimises every problem by itself: its tensors are those of one problem."""
    task = sample(family, seed)
    own = [{name: nn.Parameter(p.detach()[k].clone()) for name, p in task.named_parameters()} for k in range(PROBLEMS)]
    groups = [{"params": list(parameters.values())} for parameters in own]
    optimizer = LearnedOptimizer(groups, net, total_steps=STEPS)
    losses = []
    for _ in range(STEPS):
        theta = {name: torch.stack([parameters[name] for parameters in own]) for name in own[0]}
        loss = task.losses_of(theta, task.minibatch())
        losses.append(loss.detach().mean())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return torch.stack(losses)


def final(losses: Tensor) -> float:
    """The mean over the last 5 % of the steps; inf where that is not finite."""
    found = float(losses[-STEPS // 20 :].double().mean())
    return found if math.isfinite(found) else math.inf


def early(losses: Tensor) -> float:
    """The mean over steps 90 to 109."""
    return float(losses[90:110].double().mean())


def tuned(family: str, seed: int, cosine: bool) -> dict[str, float]:
    """Adam at the half decade with the lowest final loss: rates are tried until both neighbours are worse."""
    tried: dict[int, tuple[float, float]] = {}

    def at(half: int) -> float:
        if half not in tried:
            losses = adam(family, seed, 10 ** (half / 2), cosine)
            tried[half] = final(losses), early(losses)
        return tried[half][0]

    best = min((-6, -5, -4, -3), key=at)
    while at(better := min({best - 1, best + 1} & set(HALF_DECADES), key=at)) < at(best):
        best = better
    return {"lr": 10 ** (best / 2), "final": tried[best][0], "early": tried[best][1]}


def baselines(folder: Path) -> dict[str, dict[str, float]]:
    """Adam on all tasks, from the folder as far as it is there."""
    path = folder / "adam.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for family, seed in TASKS:
        for cosine in (False, True):
            key = f"{family} {seed} {'cosine' if cosine else 'constant'}"
            if key not in found:
                found[key] = tuned(family, seed, cosine)
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(f"{key}: {found[key]}", flush=True)
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer", nargs="+", help="files, or names of pretrained optimizers")
    parser.add_argument("--out", default="runs/validation", help="folder (%(default)s)")
    arguments = parser.parse_args()
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    beside = baselines(folder)
    for name in arguments.optimizer:
        net = network(name)
        rows: dict[str, list[float]] = {"tuned Adam": [], "best of both schedules": [], "tuned Adam at step 100": []}
        for family, seed in TASKS:
            constant, cosine = (beside[f"{family} {seed} {schedule}"] for schedule in ("constant", "cosine"))
            losses = learned(net, family, seed)
            ratios = (
                math.log(final(losses) / constant["final"]),
                math.log(final(losses) / min(constant["final"], cosine["final"])),
                math.log(early(losses) / constant["early"]),
            )
            for values, ratio in zip(rows.values(), ratios, strict=True):
                values.append(ratio)
            print(f"{name}, {family} {seed}: " + ", ".join(f"{ratio:+.3f}" for ratio in ratios), flush=True)
        for beside_what, values in rows.items():
            middle = interquartile_mean(values)
            print(f"{name}: ln ratio to {beside_what}: interquartile mean {middle:+.3f}, worst {max(values):+.3f}")


if __name__ == "__main__":
    main()
