"""Mixed precision: autocast to bfloat16 around the loss; parameters, gradients and optimizer stay in float32."""

import torch
from torch import nn

import l2l_fast as l2l

STEPS = 60
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
)
optimizer = l2l.LearnedOptimizer(model.parameters(), l2l.load_pretrained("general"), total_steps=STEPS)
patterns = torch.randn(10, 1, 8, 8)  # one for each class, under noise

losses = []
for _ in range(STEPS):
    labels = torch.randint(10, (32,))
    images = patterns[labels] + 2 * torch.randn(32, 1, 8, 8)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # "cuda" on a GPU
        scores = model(images)
        loss = nn.functional.cross_entropy(scores, labels)
    assert scores.dtype == torch.bfloat16
    # bfloat16 has float32's range: no GradScaler. (With float16, torch.amp.GradScaler works as with any optimizer.)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] - 0.5
assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
assert all(optimizer.state[p]["lstm_state"].dtype == torch.float32 for p in model.parameters())
