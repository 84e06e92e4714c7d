"""Do coordinates that communicate learn to optimise better? LSTM, LSTM+GAC and NTM-BFGS on two families of quadratics.

    python bench/communication.py train --out runs [--families ...] [--networks ...] [--seeds ...]   # resumable
    python bench/communication.py report --out runs --table docs/communication.md --plot docs/communication.png

Every network is meta-trained with the same budget (episodes, problems per episode, horizon, segments) from several
seeds and evaluated on the same fresh problems as the tuned hand-written optimizers (l2l_fast.baselines), and as torch's
L-BFGS, problem by problem, with a strong Wolfe line search (every function evaluation counts) or without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch

import l2l_fast as l2l
from l2l_fast.evaluation import baselines
from l2l_fast.problems import Problem, Quadratic

HORIZON, UNROLL, BATCH = 100, 20, 64
TEST_SEEDS, TEST_BATCH = range(4), 128
FAMILIES = ("uniform", "ill_conditioned")
STEPS = (1, 5, 10, 20, 40, 60, 80, 100)
# Name: class, options, meta-learning rate (1e-2 was best or close to it for all three in short pilot runs).
NETWORKS = {
    "LSTM": (l2l.CoordinatewiseLSTM, {}, 1e-2),
    "LSTM+GAC": (l2l.CoordinatewiseLSTM, {"gac_cells": 5}, 1e-2),
    "NTM-BFGS": (l2l.NTMBFGS, {"gac_cells": 2, "read_heads": 1, "write_heads": 3}, 1e-2),
    "NTM-BFGS, M0=I": (l2l.NTMBFGS, {"gac_cells": 2, "read_heads": 1, "write_heads": 3, "initial": "identity"}, 1e-2),
    "NTM-BFGS, M0=I, add_read": (l2l.NTMBFGS, {"initial": "identity", "add_read": True}, 1e-2),
}


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace("=", "")


def train(name: str, family: str, seed: int, episodes: int, out: Path, lr: float | None = None, **changes) -> None:
    """One run; writes ``{name}-{family}-{seed}.json`` with its test curves, and the network beside it."""
    path = out / f"{_slug(name)}-{family}-{seed}.json"
    if path.exists():
        return
    kind, options, default_lr = NETWORKS[name]
    lr = default_lr if lr is None else lr
    torch.manual_seed(seed)
    net = kind(preprocess="identity", output_scale=1.0, **options, **changes)
    trainer = l2l.MetaTrainer(
        net,
        Quadratic(batch=BATCH, family=family),
        HORIZON,
        UNROLL,
        lr,
        seed,
        betas=(0.9, 0.99),
        clip_norm=1.0,
        decay_episodes=episodes,
        validate_every=25,
        validation_episodes=4,
    )
    begin = time.monotonic()
    trainer.fit(episodes, progress=False)
    seconds = time.monotonic() - begin
    curve = trainer.evaluate(len(TEST_SEEDS), problem=Quadratic(batch=TEST_BATCH, family=family), seeds=TEST_SEEDS)
    best = trainer.best_net()
    best.save(path.with_suffix(".safetensors"))
    result = {
        "episodes": episodes,
        "lr": lr,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "seconds": seconds,
        "skipped_updates": trainer.counters.skipped_updates,
        "best_episode": trainer.counters.best_episode,
        "validation": trainer.counters.best_loss,
        "curves": curve.tolist(),
    }
    path.write_text(json.dumps(result))
    print(f"{path.stem}: final {curve[:, -1].mean():.4g}, validation {trainer.counters.best_loss:.4g}, {seconds:.0f} s")


def lbfgs_curve(W: torch.Tensor, y: torch.Tensor, theta: torch.Tensor, lr: float, line_search: bool) -> list[float]:
    """The lowest f among the first 1..HORIZON + 1 evaluations of torch's L-BFGS on one problem ||W theta - y||^2."""
    theta = theta.clone().requires_grad_()
    search = "strong_wolfe" if line_search else None
    options = {"max_iter": HORIZON, "max_eval": HORIZON, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS([theta], lr=lr, history_size=10, line_search_fn=search, **options)
    curve: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (W @ theta - y.squeeze(-1)).square().sum()
        loss.backward()
        value = loss.item() if math.isfinite(loss.item()) else math.inf
        curve.append(min(value, curve[-1]) if curve else value)
        return loss

    optimizer.step(closure)
    closure()
    return (curve + [curve[-1]] * HORIZON)[: HORIZON + 1]


def lbfgs(family: str, split: str, seeds: range, lr: float, line_search: bool, batch: int) -> torch.Tensor:
    """Mean curves per task, ``[tasks, HORIZON + 1]``."""
    curves = []
    for seed in seeds:
        task = Quadratic(batch=batch, family=family).sample(seed, split)
        each = [lbfgs_curve(task.W[k], task.y[k], task.theta.detach()[k], lr, line_search) for k in range(batch)]
        curves.append(torch.tensor(each, dtype=torch.float64).mean(0))
    return torch.stack(curves)


def run_baselines(family: str, out: Path) -> None:
    """The hand-written optimizers on the same test tasks; writes ``baselines-{family}.json``."""
    path = out / f"baselines-{family}.json"
    if path.exists():
        return
    problem: Problem = Quadratic(batch=TEST_BATCH, family=family)
    result = {}
    tuned = baselines.compare(
        problem, HORIZON, TEST_SEEDS, search_options={"sweep_tasks": 1}, cache=out / f"trials-{family}"
    )
    for name, baseline in tuned.items():
        setup = baseline.search.setup.describe()
        result[baselines.RULES[name].label] = {"setup": setup, "curves": baseline.losses.tolist()}
    rates = {
        lr: lbfgs(family, "validation", range(1), lr, False, 64)[:, -1].mean().item() for lr in (0.1, 0.3, 0.6, 1.0)
    }
    lr = min(rates, key=rates.__getitem__)
    result["L-BFGS"] = {
        "setup": f"lr {lr:g}",
        "curves": lbfgs(family, "test", TEST_SEEDS, lr, False, TEST_BATCH).tolist(),
    }
    curves = lbfgs(family, "test", TEST_SEEDS, 1.0, True, TEST_BATCH).tolist()
    result["L-BFGS, line search"] = {"setup": "", "curves": curves}
    path.write_text(json.dumps(result))
    for name, entry in result.items():
        print(f"{family} {name}: {entry['setup']}, final {torch.tensor(entry['curves'])[:, -1].mean():.4g}")


def collect(out: Path, family: str) -> dict[str, list[torch.Tensor]]:
    """Mean curves by optimizer: one per meta-training seed, or one of a baseline."""
    curves: dict[str, list[torch.Tensor]] = {}
    for name in NETWORKS:
        for path in sorted(out.glob(f"{_slug(name)}-{family}-*.json")):
            curve = torch.tensor(json.loads(path.read_text())["curves"], dtype=torch.float64).mean(0)
            curves.setdefault(name, []).append(curve)
    path = out / f"baselines-{family}.json"
    if path.exists():
        for name, entry in json.loads(path.read_text()).items():
            label = f"{name}: {entry['setup']}" if entry["setup"] else name
            curves[label] = [torch.tensor(entry["curves"], dtype=torch.float64).mean(0)]
    return curves


def table(out: Path) -> str:
    """Markdown: mean loss at a few steps, and the final loss of every meta-training seed."""
    lines = []
    for family in FAMILIES:
        head = " | ".join(map(str, STEPS))
        lines += [f"**{family.replace('_', '-')} quadratics**", "", f"| step | {head} | final, by seed |"]
        lines.append("|---" * (len(STEPS) + 2) + "|")
        for name, curves in collect(out, family).items():
            mean = torch.stack(curves).mean(0)
            cells = " | ".join(f"{mean[t]:.3g}" for t in STEPS)
            seeds = ", ".join(f"{curve[-1]:.3g}" for curve in curves) if len(curves) > 1 else ""
            lines.append(f"| {name} | {cells} | {seeds} |")
        lines.append("")
    return "\n".join(lines)


def plot(out: Path, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = dict(zip(NETWORKS, ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#D55E00")))
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for k, family in enumerate(FAMILIES):
        axes = figure.add_subplot(1, 2, k + 1)
        styles = itertools.cycle([":", "--", "-.", (0, (1, 3)), (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))])
        for name, curves in collect(out, family).items():
            learned = name in colours
            colour, style = (colours[name], "-") if learned else ("#777777", next(styles))
            label = name if learned else name.split(":")[0]
            for i, curve in enumerate(curves):
                width = 1.6 if learned else 1.1
                axes.semilogy(curve, linestyle=style, color=colour, lw=width, label=None if i else label)
        axes.set(title=f"{family.replace('_', '-')} quadratics", xlabel="gradient evaluations", ylabel="mean loss")
        axes.set_ylim(bottom=1e-2 if family == "uniform" else 2e-4)
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "report"))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.command == "train":
        for seed in arguments.seeds:
            for family in arguments.families:
                for name in arguments.networks:
                    train(name, family, seed, arguments.episodes, arguments.out, arguments.lr)
        for family in arguments.families:
            run_baselines(family, arguments.out)
        return
    print(table(arguments.out))
    if arguments.table is not None:
        arguments.table.write_text(table(arguments.out) + "\n")
    if arguments.plot is not None:
        plot(arguments.out, arguments.plot)


if __name__ == "__main__":
    main()
