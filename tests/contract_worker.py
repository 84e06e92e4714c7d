"""One of the two processes of test_optimizer_contract.test_two_processes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import l2l_fast as l2l
from tests.helpers import random_network


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1))


def batches(rank: int | None, t: int) -> torch.Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
    return x if rank is None else x[4 * rank : 4 * rank + 4]


def train(model, optimizer, rank: int | None, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        model(batches(rank, t)).square().mean().backward()
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def zero(rank: int, folder: Path) -> None:
    """ZeroRedundancyOptimizer equals one process, and its checkpoint loads, in itself and in one process."""
    net, model, single = random_network(seed=1), build(), build()
    make = lambda m: ZeroRedundancyOptimizer(m.parameters(), l2l.LearnedOptimizer, network=net, lr=0.5)  # noqa: E731
    optimizer = make(model)
    train(model, optimizer, None, range(3))
    whole = l2l.LearnedOptimizer(single.parameters(), net, lr=0.5)
    train(single, whole, None, range(3))
    assert_same(model, single, 0.0)
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        torch.save(optimizer.state_dict(), folder / "zero.pt")
    dist.barrier()
    copied, third = copy.deepcopy(model), copy.deepcopy(model)
    other = make(copied)
    other.load_state_dict(torch.load(folder / "zero.pt", weights_only=True))
    alone = l2l.LearnedOptimizer(third.parameters(), net)
    alone.load_state_dict(torch.load(folder / "zero.pt", weights_only=True))
    for each, its in ((model, optimizer), (copied, other), (third, alone), (single, whole)):
        train(each, its, None, range(3, 6))
    for each in (copied, third, single):
        assert_same(model, each, 0.0)


def ddp(rank: int, folder: Path) -> None:
    """DistributedDataParallel on halves of a batch equals one process on all of it."""
    net, model, single = random_network(seed=1), build(), build()
    parallel = nn.parallel.DistributedDataParallel(model)
    train(parallel, l2l.LearnedOptimizer(parallel.parameters(), net), rank, range(4))
    train(single, l2l.LearnedOptimizer(single.parameters(), net), None, range(4))
    assert_same(model, single, 1e-4)


def main(case: str, folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    {"zero": zero, "ddp": ddp}[case](rank, Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
