"""One optimizer on one of the suite's networks, as a user would write the loop.

A seed is an initial theta and a sequence of minibatches, the same for every optimizer. A run computes in one thread and
is bit-identical from run to run; torch's generator, threads and defaults are afterwards as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...kernels.surroundings import own_loop
from ..baselines.schedules import factor
from .curves import Run, summarise
from .material import Folder
from .networks import Network

Make = Callable[[Iterable[nn.Parameter], int], Optimizer]

START_BATCHES = 20  # of the loss at theta_0
_CHECK = 100  # steps between two looks at whether a run is hopeless
_HOPELESS = 5.0  # times the loss at theta_0


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread, in float32, on the CPU, and its generator may be seeded."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(own_loop())
        # Only where it is needed: inside, every call of torch takes a way through Python, a third of a small step.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


def initial(network: Network, seed: int) -> nn.Module:
    """The module at theta_0; torch's generator is left in a state that depends on the seed alone."""
    torch.default_generator.manual_seed(_stream(seed, 0))
    module = network.build()
    torch.default_generator.manual_seed(_stream(seed, 1))  # for optimizers that draw, whatever building has drawn
    return module.train()


def minibatches(network: Network, folder: Folder, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """The seed's minibatches, from the first on."""
    return network.batches(folder)(torch.Generator("cpu").manual_seed(_stream(seed, 2)))


def _stream(seed: int, which: int) -> int:
    """Seeds of a task's three generators: numbers of one must not come again in another, as theta_0 would be the
    quadratic's minimum."""
    return 3 * seed + which


def start_loss(network: Network, folder: Folder, seed: int) -> float:
    """The loss at theta_0, the mean over the seed's first minibatches."""
    with one_thread(), torch.no_grad():
        module, batches = initial(network, seed), minibatches(network, folder, seed)
        return sum(network.loss(module, *next(batches)).item() for _ in range(START_BATCHES)) / START_BATCHES


def run(
    network: Network,
    make: Make,
    seed: int,
    steps: int,
    *,
    folder: Folder | None = None,
    schedule: str = "constant",
    give_up: bool = False,
) -> Run:
    """Train ``network`` for ``steps`` steps with the optimizer ``make(parameters, steps)``.

    Args:
        folder: where data sets lie; default: the digits in the package.
        schedule: what every group's rate is multiplied by, see :func:`~..baselines.schedules.factor`.
        give_up: end a run whose loss is five times that of theta_0 or more; it counts as diverged. For searches.

    Raises:
        ValueError: ``steps`` is less than 1. What ``make`` and its optimizer raise.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    folder = folder or Folder()
    start = start_loss(network, folder, seed)
    losses: list[float] = []
    with one_thread():
        module, batches = initial(network, seed), minibatches(network, folder, seed)
        optimizer = make(module.parameters(), steps)
        first = [group["lr"] for group in optimizer.param_groups] if schedule != "constant" else []
        begin = time.perf_counter()
        for step, batch in zip(range(steps), batches):
            loss = network.loss(module, *batch)
            value = loss.item()
            losses.append(value)
            if not abs(value) < float("inf"):
                break
            if give_up and len(losses) % _CHECK == 0 and sum(losses[-_CHECK:]) > _HOPELESS * _CHECK * start:
                break
            optimizer.zero_grad()
            loss.backward()
            for group, rate in zip(optimizer.param_groups, first):
                group["lr"] = rate * factor(schedule, step, steps)
            optimizer.step()
        seconds = (time.perf_counter() - begin) / len(losses)
    return summarise(losses, steps, start, seconds)
