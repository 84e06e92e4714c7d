"""One process of test_sharded_over_processes_equals_unsharded: owns every ranks-th tensor of the optimizee."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import l2l_fast as l2l
from tests.gac_helpers import gac_network
from tests.test_gac_optimizer import parameters, set_gradients


def main(folder: str, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    everything = parameters()
    own = list(range(rank, len(everything), ranks))
    mine = [everything[k] for k in own]
    opt = l2l.LearnedOptimizer(mine, gac_network(), num_problems=2, process_group=dist.group.WORLD)
    for t in range(5):
        set_gradients(everything, t, (2,) if t in (1, 3) else ())
        opt.step()
    state = opt.state_dict()["state"]
    result = {k: (everything[k].detach(), state[j]["lstm_state"]) for j, k in enumerate(own)}
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
