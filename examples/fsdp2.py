"""FSDP2: parameters, gradients and the optimizer's state sharded over processes, saved and resumed by
torch.distributed.checkpoint.

    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import l2l_fast as l2l

STEPS = 60
torch.manual_seed(0)
PATTERNS = torch.randn(10, 64)  # one for each class, under noise


def set_up():
    torch.manual_seed(1)  # alike in every process
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    # After fully_shard, which replaces the parameters.
    optimizer = l2l.LearnedOptimizer(model.parameters(), l2l.load_pretrained("general"), total_steps=STEPS)
    return model, optimizer


def train(model, optimizer, first, last):
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())  # every process has its own data
        labels = torch.randint(10, (16,), generator=generator)
        images = PATTERNS[labels] + 2 * torch.randn(16, 64, generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # the norm over all processes
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def say(text):
    if dist.get_rank() == 0:
        print(text)


def save(folder, model, optimizer):
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(folder, model, optimizer):
    weights, state = get_state_dict(model, optimizer)  # what to look for: of a new optimizer, its state is made
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


dist.init_process_group("gloo")  # "nccl" on GPUs
scratch = tempfile.TemporaryDirectory() if dist.get_rank() == 0 else None
shared = [scratch and scratch.name]
dist.broadcast_object_list(shared)
folder = shared[0]

model, optimizer = set_up()
losses = train(model, optimizer, 0, STEPS // 2)
save(folder, model, optimizer)
losses += train(model, optimizer, STEPS // 2, STEPS)
say(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] - 0.5

resumed, optimizer = set_up()
load(folder, resumed, optimizer)
train(resumed, optimizer, STEPS // 2, STEPS)
for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
    assert torch.equal(one.to_local(), other.to_local())
say("resumed bit for bit")
dist.destroy_process_group()
