"""accelerate: prepare(), gradient accumulation and clipping through the Accelerator, save_state() and load_state()."""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

import l2l_fast as l2l

EPOCHS, ACCUMULATE = 4, 2


def set_up():
    set_seed(0)
    labels = torch.randint(10, (1024,))
    images = torch.randn(10, 64)[labels] + 2 * torch.randn(1024, 64)  # one pattern for each class, under noise
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    # Steps of the optimizer, not minibatches; the minibatches of an epoch are shared among the processes.
    total_steps = EPOCHS * len(loader) // (ACCUMULATE * accelerator.num_processes)
    optimizer = l2l.LearnedOptimizer(model.parameters(), l2l.load_pretrained("general"), total_steps=total_steps)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def train(accelerator, model, optimizer, loader, epochs):
    losses = []
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # does nothing before the last of ACCUMULATE minibatches
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


with tempfile.TemporaryDirectory() as folder:
    accelerator, model, optimizer, loader = set_up()
    losses = train(accelerator, model, optimizer, loader, EPOCHS // 2)
    accelerator.save_state(folder)  # with the random number generators, which the loader shuffles by
    losses += train(accelerator, model, optimizer, loader, EPOCHS // 2)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 0.5

    accelerator, resumed, optimizer, loader = set_up()
    accelerator.load_state(folder)
    train(accelerator, resumed, optimizer, loader, EPOCHS // 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    print("resumed bit for bit")
