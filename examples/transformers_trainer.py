"""transformers' Trainer: as a ready optimizer, as a class with its arguments, and resumed from a checkpoint."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import l2l_fast as l2l

STEPS = 60


class Counting(torch.utils.data.Dataset):
    """Sequences of tokens that count upwards, by 1 or by 2 or by 3, modulo 32."""

    def __len__(self):
        return 480

    def __getitem__(self, k):
        tokens = (k + (k % 3 + 1) * torch.arange(16)) % 32
        return {"input_ids": tokens, "labels": tokens}


def make_model():
    set_seed(0)
    tiny = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**tiny, bos_token_id=None, eos_token_id=None))


def arguments(folder):
    return TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",  # Trainer's default, linear, would anneal once more what anneals by itself
        save_steps=STEPS // 2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def train(trainer, checkpoint=None):
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    print(f"loss {before:.3f} -> {after:.3f}")
    assert after < before - 0.5
    return trainer.model


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


network = l2l.load_pretrained("general")

with tempfile.TemporaryDirectory() as folder:
    print("optimizers=(optimizer, None)")
    model = make_model()
    optimizer = l2l.LearnedOptimizer(model.parameters(), network, total_steps=STEPS)
    train(Trainer(model, arguments(folder), train_dataset=Counting(), optimizers=(optimizer, None)))

# Trainer makes the optimizer, after it has moved the model, with a parameter group of its own for what does not decay.
# Of args.learning_rate it then makes no use, which is as well: lr=1.0 is what the network was trained for.
kind = (l2l.LearnedOptimizer, {"network": network, "total_steps": STEPS})
with tempfile.TemporaryDirectory() as folder:
    print("optimizer_cls_and_kwargs")
    whole = Trainer(make_model(), arguments(folder), train_dataset=Counting(), optimizer_cls_and_kwargs=kind)
    model = train(whole)

    print("the same, resumed half-way")
    again = Trainer(make_model(), arguments(folder), train_dataset=Counting(), optimizer_cls_and_kwargs=kind)
    resumed = train(again, f"{folder}/checkpoint-{STEPS // 2}")
    assert same(model, resumed), "the resumed run ended elsewhere"
    print("resumed bit for bit")
