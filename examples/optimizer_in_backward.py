"""The optimizer inside backward(): one per parameter, which steps and frees its gradient as soon as it is there.

The gradients of all parameters are never in memory at once. The price: no accumulation, no clipping by the global norm.
"""

import torch
from torch import nn

import l2l_fast as l2l

STEPS = 60
torch.manual_seed(0)
PATTERNS = torch.randn(10, 64)  # one for each class, under noise


def set_up():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    network = l2l.load_pretrained("general")  # one for all
    # An optimizer of one parameter knows nothing of the others' gradients, whose size beside its own is one of the
    # fifteen inputs of "general": the run is like that of one optimizer for all, and not the same.
    optimizers = {
        name: l2l.LearnedOptimizer([parameter], network, total_steps=STEPS)
        for name, parameter in model.named_parameters()
    }
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizers[name]: step_and_free(optimizer))
    return model, optimizers, torch.Generator().manual_seed(2)


def step_and_free(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def train(model, generator, steps):
    losses = []
    for _ in range(steps):
        labels = torch.randint(10, (32,), generator=generator)
        images = PATTERNS[labels] + 2 * torch.randn(32, 64, generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # and every parameter has moved
        losses.append(loss.item())
    return losses


model, optimizers, generator = set_up()
losses = train(model, generator, STEPS // 2)
weights = {name: value.clone() for name, value in model.state_dict().items()}
states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}  # snapshots, to be saved as they are
generator_state = generator.get_state()
losses += train(model, generator, STEPS // 2)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] - 0.5
assert all(parameter.grad is None for parameter in model.parameters())

resumed, optimizers, generator = set_up()
resumed.load_state_dict(weights)
for name, optimizer in optimizers.items():
    optimizer.load_state_dict(states[name])
generator.set_state(generator_state)
train(resumed, generator, STEPS // 2)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
print("resumed bit for bit")
