"""One process of test_shards_step_as_the_whole_tensors: holds its rows of every tensor of the optimizee."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import l2l_fast as l2l

SHAPES = ((11, 4), (7,), (3, 2, 5))


def wholes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(t: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + t)
    return [torch.randn(shape, generator=generator) * 10.0 ** (-k) for k, shape in enumerate(SHAPES)]


def rows(whole: Tensor, rank: int) -> Tensor:
    """This process's part: nearly all of it is the first one's, so that another may have nothing."""
    first = whole.shape[0] - whole.shape[0] // 4
    return whole[:first] if rank == 0 else whole[first:] if rank == 1 else whole[:0]


def main(folder: str, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    params = [nn.Parameter(rows(whole, rank).clone()) for whole in wholes()]
    net = l2l.load_pretrained("general")
    opt = l2l.LearnedOptimizer(params, net, total_steps=9, process_group=dist.group.WORLD)
    for t in range(6):
        for param, grad in zip(params, gradients(t), strict=True):
            param.grad = rows(grad, rank).clone()
        opt.step()
    torch.save([param.detach() for param in params], Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
