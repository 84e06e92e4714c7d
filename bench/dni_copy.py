"""How far back truncated back-propagation reaches with and without synthetic gradients: recall, copy, repeat copy.

    python -m bench.dni_copy                          # every run that the results lack, then the table
    python -m bench.dni_copy --tasks copy --steps 2 --ways bptt dni --seeds 0      # some
    python -m bench.dni_copy --table                  # what there is

Recall: one character, to be given out after a gap of --gap steps, from the start; the table has the number of segments
after which it was solved (below 0.15 bits per character in 20 minibatches). Copy and repeat copy are the paper's:
sequences grow when they are solved; the table has the longest one solved, beside the published ones, which come of far
longer runs. The ways have the same core, optimizer, segments of T steps and number of segments. Networks of one task
and T are trained side by side, in one program. Runs are kept in --results, one line each, and are not done again. One
thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_fast import dni

ROOT = Path(__file__).parent.parent
WAYS = ("bptt", "dni", "aux")
TASKS = ("recall", "copy", "repeat")
# Jaderberg et al. 2017, table 2, for T = 2, 3, 4, 5.
PUBLISHED = {
    "copy": {"bptt": (7, 8, 10, 8), "dni": (16, 14, 18, 18), "aux": (16, 17, 19, 18)},
    "repeat": {"bptt": (7, 5, 19, 23), "dni": (39, 33, 39, 59), "aux": (39, 59, 67, 59)},
}
HORIZONS = (2, 3, 4, 5)


class Linears(nn.Module):
    """A linear map for each of some networks side by side: from ``[replicas * batch, fan_in]``, network by network."""

    def __init__(
        self, replicas: int, fan_in: int, fan_out: int, zero: bool = False, bound: float | None = None
    ) -> None:
        super().__init__()
        self.bound = 0.0 if zero else fan_in**-0.5 if bound is None else bound
        self.weight = nn.Parameter(torch.zeros(replicas, fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(replicas, 1, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.view(len(self.weight), -1, x.shape[1]), self.weight).flatten(0, 1)


class Cores(nn.Module):
    """LSTMs side by side, initialised as ``nn.LSTM`` is; states ``[replicas * batch, units]``."""

    def __init__(self, replicas: int, inputs: int, units: int) -> None:
        super().__init__()
        self.gates = Linears(replicas, inputs + units, 4 * units, bound=units**-0.5)

    def forward(self, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        (h, c), outputs = state, []
        for x in inputs:
            i, f, g, o = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)


class Of(nn.Module):
    """What a module gives, for some of the networks; zero for the others."""

    def __init__(self, module: nn.Module, chosen: list[bool], batch: int) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("share", torch.tensor(chosen).float().repeat_interleave(batch)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.share


class Stream:
    """One network's episodes, one after the other, in segments of T steps (the last one filled up with silence)."""

    def __init__(self, task: str, gap: int, batch: int, horizon: int, seed: int) -> None:
        self.task, self.gap = dni.CopyTask(repeat=task == "repeat"), gap
        self.curriculum = dni.Curriculum(repeat=task == "repeat")
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.horizon = batch, horizon
        self.history: list[list[int]] = []
        self._begin()

    def _begin(self) -> None:
        now = self.curriculum
        self.episode = self.task.sample(now.length, self.batch, self.generator, now.repeats, self.gap)
        self.at, self.nats = 0, 0.0

    def next(self, inputs: Tensor, targets: Tensor) -> bool:
        """Write the next segment; whether it is the episode's last."""
        piece = slice(self.at, self.at + self.horizon)
        steps = len(self.episode.targets[piece])
        inputs[:steps], targets[:steps] = self.episode.inputs[piece], self.episode.targets[piece]
        inputs[steps:], targets[steps:] = 0.0, -100
        self.at += self.horizon
        return self.at >= len(self.episode.targets)

    def took(self, nats: float, last: bool, segments: int) -> None:
        """The segment's loss, a sum over its steps."""
        self.nats += nats
        if last:
            if self.curriculum.record(self.nats / self.episode.scored / math.log(2)):
                self.history.append([segments, self.curriculum.solved])
            if self.gap:  # recall does not grow
                self.curriculum.length = 1
            self._begin()


def train(options: argparse.Namespace, task: str, horizon: int, wanted: list[tuple[str, int]]) -> list[dict]:
    """Train the wanted (way, seed) side by side; networks of one seed start alike and see the same characters."""
    count, units, batch = len(wanted), options.units, options.batch
    streams = [Stream(task, options.gap if task == "recall" else 0, batch, horizon, seed) for _, seed in wanted]
    about = streams[0].task
    hidden = [Linears(count, 2 * units, options.hidden), nn.ReLU()] if options.hidden else []
    predictor = nn.Sequential(*hidden, Linears(count, options.hidden or 2 * units, 2 * units, zero=True))
    net = dni.Recurrent(
        Cores(count, about.inputs, units),
        2 * units,
        # At zero, where it starts, it is truncated back-propagation.
        Of(predictor, [way != "bptt" for way, _ in wanted], batch),
        batch_dim=0,
        auxiliary=Of(Linears(count, units, 2 * units, zero=True), [way == "aux" for way, _ in wanted], batch),
        auxiliary_weight=count,  # a mean over all networks' samples; the loss below is a sum of means
        gradient_scale=batch,
    )
    head = Linears(count, units, about.classes)
    start_alike([net, head], [seed for _, seed in wanted])
    parameters = [p for module in (net, head) for p in module.parameters()]
    opt = torch.optim.Adam(parameters, lr=options.lr, fused=True)
    inputs = torch.zeros(horizon, count, batch, about.inputs)
    targets = torch.zeros(horizon, count, batch, dtype=torch.int64)
    state = tuple(torch.zeros(count * batch, units) for _ in range(2))
    nats = torch.zeros(count)

    def loss_fn(outputs: Tensor) -> Tensor:
        logits = head(outputs.view(horizon, count, batch, units).transpose(0, 1).reshape(-1, units))
        losses = F.cross_entropy(logits, targets.transpose(0, 1).reshape(-1), reduction="none")
        losses = losses.view(count, -1).sum(1) / batch
        nats.copy_(losses.detach())
        return losses.sum()

    start = time.process_time()
    for done in range(1, options.segments + 1):
        last = [stream.next(inputs[:, k], targets[:, k]) for k, stream in enumerate(streams)]
        ends = torch.tensor(last).repeat_interleave(batch)
        opt.zero_grad()
        segment = net.segment(inputs.flatten(1, 2), state, loss_fn, last=ends)
        opt.step()
        state = tuple(part.masked_fill(ends[:, None], 0.0) for part in segment.state)
        for stream, value, end in zip(streams, nats.tolist(), last, strict=True):
            stream.took(value, end, done)
    seconds = round((time.process_time() - start) / count, 1)
    return [
        {
            **setting(options, task, way, horizon, seed),
            "solved": stream.curriculum.solved,
            "history": stream.history,
            "cpu_seconds": seconds,
        }
        for (way, seed), stream in zip(wanted, streams, strict=True)
    ]


@torch.no_grad()
def start_alike(parts: list[nn.Module], seeds: list[int]) -> None:
    """Every network's parameters become those that its seed gives, whatever stands beside it: as ``nn.Linear``'s."""
    maps = [each for part in parts for each in part.modules() if isinstance(each, Linears)]
    for k, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for each in maps:
            for p in (each.weight[k], each.bias[k]):
                p.uniform_(-each.bound, each.bound, generator=generator)


def setting(options: argparse.Namespace, task: str, way: str, horizon: int, seed: int) -> dict:
    """What tells one run from another."""
    same = {name: getattr(options, name) for name in ("segments", "units", "batch", "lr")}
    hidden = options.hidden if way != "bptt" else None
    same |= {"gap": options.gap} if task == "recall" else {}
    return {"task": task, "way": way, "T": horizon, "seed": seed, "hidden": hidden, **same}


def kept(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict]) -> str:
    """By seed: in recall segments until solved, otherwise the longest sequence solved and (published)."""
    lines = ["| task, T | " + " | ".join(WAYS) + " |", "|---|" + "---:|" * len(WAYS)]
    for task in TASKS:
        for k, horizon in enumerate(HORIZONS):
            cells = []
            for way in WAYS:
                found = [r for r in rows if (r["task"], r["way"], r["T"]) == (task, way, horizon)]
                found.sort(key=lambda row: row["seed"])
                mine = " ".join(str(row["solved"]) for row in found)
                if task == "recall":
                    mine = " ".join(str(row["history"][0][0]) if row["history"] else "never" for row in found)
                cells.append(f"{mine} ({PUBLISHED[task][way][k]})" if task in PUBLISHED else mine)
            lines.append(f"| {task}, {horizon} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, nargs="+", default=HORIZONS, help="T, the steps of a segment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--segments", type=int, default=3_000, help="of every run")
    parser.add_argument("--gap", type=int, default=9, help="of recall, >= 1")
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=0, help="units of the predictor's hidden layer; 0: linear")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "dni_copy.jsonl")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = kept(options.results)
    for task in options.tasks if not options.table else []:
        for horizon in options.steps:
            wanted = [(way, seed) for way in options.ways for seed in options.seeds]
            keys = [setting(options, task, way, horizon, seed) for way, seed in wanted]
            there = [any(key.items() <= row.items() for row in rows) for key in keys]
            missing = [one for one, done in zip(wanted, there, strict=True) if not done]
            if missing:
                found = train(options, task, horizon, missing)
                rows += found
                with options.results.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
                for row in found:
                    shown = {name: value for name, value in row.items() if name != "history"}
                    print(json.dumps(shown), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
