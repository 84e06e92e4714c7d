"""torch.compile: of the model, and of a whole training step with the optimizer in it."""

import torch
from torch import nn

import l2l_fast as l2l

STEPS = 60
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10))
compiled = torch.compile(model)
# The compiled model has the model's own parameters; either may be given.
optimizer = l2l.LearnedOptimizer(compiled.parameters(), l2l.load_pretrained("general"), total_steps=STEPS)
patterns = torch.randn(10, 64)  # one for each class, under noise


def training_step(images, labels):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(compiled(images), labels)
    loss.backward()
    optimizer.step()  # breaks the graph: it is one launch already, of which nothing is left to fuse
    return loss


compiled_step = torch.compile(training_step)
losses = []
for k in range(STEPS):
    labels = torch.randint(10, (32,))
    images = patterns[labels] + 2 * torch.randn(32, 64)
    step = training_step if k < STEPS // 2 else compiled_step
    losses.append(step(images, labels).item())

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] - 0.5
