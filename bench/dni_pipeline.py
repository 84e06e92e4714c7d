"""What is gained where modules need not wait for each other: the time to a module's update, and two threads.

    python -m bench.dni_pipeline                    # some two minutes; wants two idle cores

Latency: from the start of a step until module i has been updated, by back-propagation (everything waits for the whole
backward pass) and by synthetic gradients. Throughput: minibatches per second of a chain in one thread, and with its
lower and upper half in a thread each, one minibatch apart; activities go up and gradients for the predictor come down
through queues. Medians over rounds that take one sample of each. One intra-operator thread everywhere.
"""

from __future__ import annotations

import argparse
import copy
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from bench.dni_mnist import modules
from l2l_fast import dni

LAYERS, BATCH = 6, 256
Adam = partial(torch.optim.Adam, lr=1e-3, fused=True)


def latencies_of_back_propagation(net: nn.Sequential, opt: torch.optim.Optimizer, x, y) -> list[float]:
    start = time.perf_counter()
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
    return [time.perf_counter() - start] * len(net)


def latencies_of_synthetic_gradients(net: dni.Decoupled, optimizers: list[torch.optim.Optimizer], x, y) -> list[float]:
    found, start = [], time.perf_counter()
    for update in net.updates(x, F.cross_entropy, y):
        optimizers[update.index].step()
        optimizers[update.index].zero_grad()
        found.append(time.perf_counter() - start)
    return found


def one_thread(net: dni.Decoupled, opt: torch.optim.Optimizer, x, y, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        opt.zero_grad()
        net.backward(x, F.cross_entropy, y)
        opt.step()
    return steps / (time.perf_counter() - start)


class Half:
    """Consecutive stages with their optimizers; runs in a thread of its own."""

    def __init__(self, stages: list[dni.Stage], first: bool) -> None:
        self.stages, self.first = stages, first
        self.modules = [Adam(stage.module.parameters()) for stage in stages]
        self.predictors = [Adam(s.predictor.parameters()) if s.predictor is not None else None for s in stages]

    def run(self, activity, y) -> dni.Local:
        """One minibatch through all stages; gives the first one's pass and the last one's output."""
        bottom = below = None
        for k, stage in enumerate(self.stages):
            first = self.first and k == 0
            if stage.predictor is None:
                local = stage.finish(activity, F.cross_entropy, y, first=first)
            else:
                local = stage.advance(activity, y, first=first)
            step(self.modules[k])
            if k:
                self.stages[k - 1].fit(below, local.input_gradient)
                step(self.predictors[k - 1])
            bottom = local if bottom is None else bottom
            activity, below = local.output, local.prediction
        return bottom._replace(output=activity)

    def told(self, activity, y, gradient) -> None:
        """The gradient for the topmost predictor has come down; it has been updated since it predicted, perhaps."""
        self.stages[-1].fit(self.stages[-1].predict(activity, y), gradient)
        step(self.predictors[-1])


def step(opt: torch.optim.Optimizer) -> None:
    opt.step()
    opt.zero_grad()


def two_threads(lower: Half, upper: Half, x, y, steps: int) -> float:
    up, down = queue.Queue(maxsize=1), queue.Queue()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(steps):
                activity = up.get()
                down.put((activity, upper.run(activity, y).input_gradient))
        except BaseException as error:
            failed.append(error)
            down.put(None)

    thread = threading.Thread(target=work, daemon=True)
    start = time.perf_counter()
    thread.start()
    owed = 0
    for _ in range(steps):
        up.put(lower.run(x, y).output)
        owed += 1
        while owed and (owed > 2 or not down.empty()):
            took(lower, down.get(), y, failed)
            owed -= 1
    while owed:
        took(lower, down.get(), y, failed)
        owed -= 1
    thread.join()
    return steps / (time.perf_counter() - start)


def took(lower: Half, message, y, failed: list[BaseException]) -> None:
    if message is None:
        raise failed[0]
    lower.told(message[0], y, message[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of a sample of throughput")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 784), torch.randint(10, (BATCH,))
    chain = modules(LAYERS)
    make = partial(dni.predictor_for, hidden=(256,))
    net = dni.Decoupled(copy.deepcopy(chain), x[:2], num_classes=10, predictor=make)
    plain = nn.Sequential(*copy.deepcopy(chain))
    plain_opt, optimizers = Adam(plain.parameters()), [Adam(unit) for unit in net.units()]
    whole = copy.deepcopy(net)
    whole_opt = Adam(whole.parameters())
    halved = list(copy.deepcopy(net).stages)
    lower, upper = Half(halved[:3], True), Half(halved[3:], False)
    measures: dict[str, Callable] = {
        "back-propagation": lambda: latencies_of_back_propagation(plain, plain_opt, x, y),
        "synthetic": lambda: latencies_of_synthetic_gradients(net, optimizers, x, y),
        "one thread": lambda: one_thread(whole, whole_opt, x, y, options.steps),
        "two threads": lambda: two_threads(lower, upper, x, y, options.steps),
    }
    samples: dict[str, list] = {name: [] for name in measures}
    before = os.getloadavg()[0]
    for _ in range(options.rounds + 1):
        for name, measure in measures.items():
            samples[name].append(measure())
    samples = {name: each[1:] for name, each in samples.items()}  # the first is for warming up
    print(f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after; {os.cpu_count()} cores")
    print(f"\nms from the start of a step to the update of module i, {LAYERS} layers of 256, batch {BATCH}:")
    for name in ("back-propagation", "synthetic"):
        print(f"{name:18}" + "".join(f"{1e3 * median(column):8.1f}" for column in zip(*samples[name], strict=True)))
    rates = {name: median(samples[name]) for name in ("one thread", "two threads")}
    ratio = median(b / a for a, b in zip(samples["one thread"], samples["two threads"], strict=True))
    print("\nminibatches per second: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()), end="")
    print(f"; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
