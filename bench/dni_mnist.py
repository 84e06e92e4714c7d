"""Fully connected networks on MNIST, by back-propagation and by synthetic gradients (docs/dni.md has the results).

    python -m bench.dni_mnist                        # every run that the results lack, the table, the picture
    python -m bench.dni_mnist --layers 3 --ways conditioned --optimizers adam     # some
    python -m bench.dni_mnist --table                # what there is

The embedded 10,000 digits by default; with L2L_FAST_DATA the full set, which the published numbers are for. Runs are
kept in --results, one line each, and are not done again. One thread.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l2l_fast as l2l
from l2l_fast import dni

ROOT = Path(__file__).parent.parent
WAYS = ("backprop", "conditioned", "unconditioned")
OPTIMIZERS = ("adam", "general")
LAYERS = (3, 4, 5, 6)
MEAN, STD = 0.1307, 0.3081


def modules(layers: int, units: int = 256) -> list[nn.Module]:
    """Layers of linear map, batch normalization and ReLU, and the read-out: the paper's network."""
    sizes = [784, *[units] * layers]
    hidden = [
        nn.Sequential(nn.Linear(fan_in, fan_out, bias=False), nn.BatchNorm1d(fan_out), nn.ReLU())
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    return [*hidden, nn.Linear(units, 10)]


def network(layers: int, way: str, hidden: tuple[int, ...]) -> dni.Decoupled:
    chain = modules(layers)
    if way == "backprop":
        return dni.Decoupled([nn.Sequential(*chain)])
    make = functools.partial(dni.predictor_for, hidden=hidden)
    classes = 10 if way == "conditioned" else None
    return dni.Decoupled(chain, torch.zeros(2, 784), num_classes=classes, predictor=make)


def pictures(split: str) -> tuple[Tensor, Tensor]:
    images = l2l.data.load_mnist().split(split)
    return ((images.images.view(-1, 784).float() / 255 - MEAN) / STD), images.labels


def minibatches(count: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices, a new order in every epoch."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(count, generator=generator)
        yield order[:batch]
        order = order[batch:]


@torch.no_grad()
def error(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of wrong answers, in percent."""
    net.eval()
    pieces = zip(images.split(1000), labels.split(1000), strict=True)
    wrong = sum((net(x).argmax(1) != y).sum().item() for x, y in pieces)
    net.train()
    return 100.0 * wrong / len(labels)


def train(options: argparse.Namespace, layers: int, way: str, optimizer: str, seed: int) -> dict:
    torch.manual_seed(seed)
    net = network(layers, way, tuple(options.hidden))
    if optimizer == "general":
        groups = [{"params": list(net.module_parameters())}]
        if way != "backprop":
            groups += [{"params": list(net.predictor_parameters()), "lr": options.predictor_lr}]
        opt = l2l.LearnedOptimizer(groups, l2l.load_pretrained("general"), total_steps=options.steps)
    else:
        opt = torch.optim.Adam(net.parameters(), lr=options.lr)
    falls = 1.0 if optimizer == "adam" else 0.0  # the learned one has a schedule of its own
    decay = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - falls * step / options.steps)
    images, labels = pictures("train")
    held_out = {split: pictures(split) for split in ("validation", "test")}
    generator = torch.Generator().manual_seed(seed)
    curve, losses, start = [], [], time.process_time()
    for step, at in enumerate(minibatches(len(labels), options.batch, options.steps, generator), 1):
        opt.zero_grad()
        losses.append(net.backward(images[at], F.cross_entropy, labels[at]).loss.item())
        opt.step()
        decay.step()
        if step % options.every == 0 or step == options.steps:
            found = {split: error(net, *pair) for split, pair in held_out.items()}
            curve.append([step, sum(losses) / len(losses), found["validation"], found["test"]])
            losses.clear()
    return {
        **setting(options, layers, way, optimizer, seed),
        "test": curve[-1][3],
        "validation": curve[-1][2],
        "cpu_seconds": round(time.process_time() - start, 1),
        "curve": curve,
    }


def setting(options: argparse.Namespace, layers: int, way: str, optimizer: str, seed: int) -> dict:
    """What tells one run from another."""
    return {
        "data": l2l.data.load_mnist().name,
        "layers": layers,
        "way": way,
        "optimizer": optimizer,
        "seed": seed,
        "steps": options.steps,
        "batch": options.batch,
        "lr": options.lr if optimizer == "adam" else 1.0,
        "hidden": list(options.hidden) if way != "backprop" else [],
        "predictor_lr": options.predictor_lr if optimizer == "general" and way != "backprop" else None,
    }


def kept(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict]) -> str:
    """Test errors in percent, a row for every depth and length of the run."""
    columns = [(way, optimizer) for optimizer in OPTIMIZERS for way in WAYS]
    lines = ["| layers | steps | " + " | ".join(f"{way}, {optimizer}" for way, optimizer in columns) + " |"]
    lines += ["|---:|---:|" + "---:|" * len(columns)]
    for layers, steps in sorted({(row["layers"], row["steps"]) for row in rows}):
        cells = []
        for way, optimizer in columns:
            found = [r for r in rows if (r["layers"], r["steps"]) == (layers, steps)]
            found = [r for r in found if (r["way"], r["optimizer"]) == (way, optimizer)]
            cells.append(" / ".join(shown(row) for row in sorted(found, key=lambda row: row["seed"])))
        lines.append(f"| {layers} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(row: dict) -> str:
    """The error, and the rate of predictors where it is not the usual one."""
    return f"{row['test']:.2f}" + (" (rate 1)" if row["predictor_lr"] == 1.0 else "")


def draw(rows: list[dict], path: Path) -> None:
    """Test error against steps, a panel for every depth."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "l2l_fast"
    from matplotlib import pyplot

    longest = max(row["steps"] for row in rows)
    rows = [row for row in rows if row["steps"] == longest]
    depths = sorted({row["layers"] for row in rows})
    figure, axes = pyplot.subplots(1, len(depths), figsize=(3.2 * len(depths), 3.0), sharey=True, squeeze=False)
    colours = dict(zip(WAYS, ("black", "tab:blue", "tab:red"), strict=True))
    for axis, layers in zip(axes[0], depths, strict=True):
        for row in rows:
            if row["layers"] == layers:
                steps, _, _, test = zip(*row["curve"], strict=True)
                line = "-" if row["optimizer"] == "adam" else "--"
                line = ":" if row["predictor_lr"] == 1.0 else line
                label = f"{row['way']}, {row['optimizer']}" if row["seed"] == 0 else None
                axis.plot(steps, test, line, color=colours[row["way"]], label=label, linewidth=1.2)
        axis.set_title(f"{layers} layers of 256", fontsize=9)
        axis.set_yscale("log")
        axis.set_xlabel("steps")
    axes[0][0].set_ylabel("test error, %")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's first rate; it falls to zero in a line")
    parser.add_argument("--predictor-lr", type=float, default=0.1, help="the learned optimizer's, for predictors")
    parser.add_argument("--hidden", type=int, nargs="*", default=[512], help="widths of the predictors' hidden layers")
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "dni_mnist.jsonl")
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        (layers, way, optimizer, seed)
        for seed in options.seeds
        for optimizer in options.optimizers
        for layers in options.layers
        for way in options.ways
    ]
    rows = kept(options.results)
    for one in wanted if not options.table else []:
        key = setting(options, *one)
        if not any(key.items() <= row.items() for row in rows):
            rows.append(train(options, *one))
            with options.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps({name: value for name, value in rows[-1].items() if name != "curve"}), flush=True)
    print(table(rows))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
