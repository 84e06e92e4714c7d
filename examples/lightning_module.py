"""Lightning: configure_optimizers with the number of steps that the Trainer plans, and resumed from a checkpoint."""

import tempfile
import warnings

import lightning
import torch
from torch import nn

import l2l_fast as l2l


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.losses = []

    def training_step(self, batch, _):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.layers(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        # Steps of the optimizer in the whole run: epochs, max_steps and accumulation are accounted for.
        total_steps = int(self.trainer.estimated_stepping_batches)
        return l2l.LearnedOptimizer(self.parameters(), l2l.load_pretrained("general"), total_steps=total_steps)


def fit(folder, checkpoint=None):
    lightning.seed_everything(0, verbose=False)
    labels = torch.randint(10, (1024,))
    images = torch.randn(10, 64)[labels] + 2 * torch.randn(1024, 64)  # one pattern for each class, under noise
    data = torch.utils.data.TensorDataset(images, labels)
    every_epoch = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=4,
        gradient_clip_val=1.0,
        callbacks=[every_epoch],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=64), ckpt_path=checkpoint)
    return model


warnings.filterwarnings("ignore", "The '?train_dataloader'? does not have many workers")
with tempfile.TemporaryDirectory() as folder:
    model = fit(folder)
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    assert model.losses[-1] < model.losses[0] - 0.5

    # Lightning does not keep the random number generators; a loader that shuffles has to be seeded by the epoch.
    resumed = fit(folder, f"{folder}/epoch=1.ckpt")
    assert len(resumed.losses) == len(model.losses) // 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    print("resumed bit for bit")
