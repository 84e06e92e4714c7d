"""A loop of one's own: gradient accumulation, clipping by the global norm, and a checkpoint in plain torch."""

import tempfile

import torch
from torch import nn

import l2l_fast as l2l

STEPS, ACCUMULATE = 60, 4
torch.manual_seed(0)
PATTERNS = torch.randn(10, 64)  # one for each class, under noise


def minibatch(generator):
    labels = torch.randint(10, (16,), generator=generator)
    return PATTERNS[labels] + 2 * torch.randn(16, 64, generator=generator), labels


def set_up():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    # total_steps counts calls of step(), not minibatches.
    optimizer = l2l.LearnedOptimizer(model.parameters(), l2l.load_pretrained("general"), total_steps=STEPS)
    return model, optimizer, torch.Generator().manual_seed(2)


def train(model, optimizer, generator, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(ACCUMULATE):
            images, labels = minibatch(generator)
            loss = nn.functional.cross_entropy(model(images), labels) / ACCUMULATE
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        losses.append(total)
    return losses


model, optimizer, generator = set_up()
losses = train(model, optimizer, generator, STEPS // 2)
with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    torch.save(parts, file.name)
    losses += train(model, optimizer, generator, STEPS // 2)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 0.5

    # The network is not in the checkpoint (only a digest, to be compared): make the optimizer with it, then load.
    resumed, optimizer, generator = set_up()
    saved = torch.load(file.name, weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    train(resumed, optimizer, generator, STEPS // 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    print("resumed bit for bit")
