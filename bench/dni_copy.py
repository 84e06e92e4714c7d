"""How far back truncated back-propagation reaches with and without synthetic gradients: copy and repeat copy.

    python -m bench.dni_copy                          # every run that the results lack, then the table
    python -m bench.dni_copy --tasks copy --steps 2 --ways bptt dni --seeds 0      # some
    python -m bench.dni_copy --table                  # what there is

Sequences grow when they are solved (below 0.15 bits per character). The ways have the same core, optimizer, segments of
T steps and number of segments; the table has the longest sequence solved, beside the published ones, which come of far
longer runs. Runs are kept in --results, one line each, and are not done again. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from l2l_fast import dni

ROOT = Path(__file__).parent.parent
WAYS = ("bptt", "dni", "aux")
TASKS = ("copy", "repeat")
# Jaderberg et al. 2017, table 2, for T = 2, 3, 4, 5.
PUBLISHED = {
    "copy": {"bptt": (7, 8, 10, 8), "dni": (16, 14, 18, 18), "aux": (16, 17, 19, 18)},
    "repeat": {"bptt": (7, 5, 19, 23), "dni": (39, 33, 39, 59), "aux": (39, 59, 67, 59)},
}
HORIZONS = (2, 3, 4, 5)


def train(options: argparse.Namespace, task_name: str, way: str, horizon: int, seed: int) -> dict:
    torch.manual_seed(seed)
    task, curriculum = dni.CopyTask(repeat=task_name == "repeat"), dni.Curriculum(repeat=task_name == "repeat")
    units, batch = options.units, options.batch
    net = dni.Recurrent(
        nn.LSTM(task.inputs, units),
        2 * units,
        hidden=options.hidden,
        auxiliary=way == "aux",
        output_size=units,
    )
    head = nn.Linear(units, task.classes)
    if way == "bptt":
        net.predictor.requires_grad_(False)  # at zero, where it starts: truncated back-propagation
    opt = torch.optim.Adam([p for m in (net, head) for p in m.parameters() if p.requires_grad], lr=options.lr)
    generator = torch.Generator().manual_seed(seed)
    done, history, start = 0, [], time.process_time()
    while done < options.segments:
        episode = task.sample(curriculum.length, batch, generator, curriculum.repeats)
        state, nats = None, 0.0
        pieces = list(zip(episode.inputs.split(horizon), episode.targets.split(horizon), strict=True))
        for k, (inputs, targets) in enumerate(pieces):

            def loss_fn(outputs, targets=targets):
                return F.cross_entropy(head(outputs).flatten(0, 1), targets.flatten(), reduction="sum") / batch

            opt.zero_grad()
            segment = net.segment(inputs, state, loss_fn, last=k == len(pieces) - 1)
            opt.step()
            state = segment.state
            nats += segment.loss.item()
            done += 1
        if curriculum.record(nats / episode.scored / math.log(2)):
            history.append([done, curriculum.solved])
    return {
        **setting(options, task_name, way, horizon, seed),
        "solved": curriculum.solved,
        "history": history,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def setting(options: argparse.Namespace, task: str, way: str, horizon: int, seed: int) -> dict:
    """What tells one run from another."""
    same = {name: getattr(options, name) for name in ("segments", "units", "batch", "lr")}
    hidden = options.hidden if way != "bptt" else None
    return {"task": task, "way": way, "T": horizon, "seed": seed, "hidden": hidden, **same}


def kept(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict]) -> str:
    """Longest sequences solved, by seed, with the published ones in brackets."""
    lines = ["| task, T | " + " | ".join(WAYS) + " |", "|---|" + "---:|" * len(WAYS)]
    for task in TASKS:
        for k, horizon in enumerate(HORIZONS):
            cells = []
            for way in WAYS:
                found = [r for r in rows if (r["task"], r["way"], r["T"]) == (task, way, horizon)]
                mine = " ".join(str(row["solved"]) for row in sorted(found, key=lambda row: row["seed"]))
                cells.append(f"{mine} ({PUBLISHED[task][way][k]})")
            lines.append(f"| {task}, {horizon} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, nargs="+", default=HORIZONS, help="T, the steps of a segment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--segments", type=int, default=30_000, help="of every run")
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=128, help="units of the predictor's hidden layer; 0: linear")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "dni_copy.jsonl")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        (task, way, horizon, seed)
        for seed in options.seeds
        for task in options.tasks
        for horizon in options.steps
        for way in options.ways
    ]
    rows = kept(options.results)
    for one in wanted if not options.table else []:
        key = setting(options, *one)
        if not any(key.items() <= row.items() for row in rows):
            rows.append(train(options, *one))
            with options.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
