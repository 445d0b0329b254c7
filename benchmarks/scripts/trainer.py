"""A tiny GPT-2 under transformers' own Trainer: warm-up, linear decay, clip_grad_norm_ by default."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.scripts.planted import Planted

planted = Planted(steps=70)
width = planted.width(32)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=40, n_positions=24, n_embd=width, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)


class Text(torch.utils.data.Dataset):
    """Sequences that count up by their own stride."""

    def __len__(self):
        return 8 * planted.steps

    def __getitem__(self, index):
        first, stride = (index * 7919) % 40, 1 + (index * 31) % 3
        ids = (first + stride * torch.arange(20)) % 40
        return {"input_ids": ids, "labels": ids}


class Steps(TrainerCallback):
    """Tells where an optimizer step begins, and raises the rate behind the schedule's back."""

    def on_step_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **rest):
        """Called by the trainer."""
        if planted.now < 0:
            planted._optimizers = (optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer,)
        planted.begin()
        if planted.asked.fault == "rate" and planted.now == planted.asked.at:
            lr_scheduler.base_lrs = [30 * rate for rate in lr_scheduler.base_lrs]


class Noting(Trainer):
    """Keeps each loss."""

    def training_step(self, *args, **kwargs):
        """Called by the trainer."""
        loss = super().training_step(*args, **kwargs)
        planted.note(loss)
        return loss


planted.into([], model=model)
with tempfile.TemporaryDirectory() as folder:
    Noting(
        model,
        TrainingArguments(
            folder,
            max_steps=planted.steps,
            per_device_train_batch_size=8,
            learning_rate=planted.rate(2e-3),
            warmup_steps=10,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=planted.seed,
        ),
        train_dataset=Text(),
        callbacks=[Steps()],
    ).train()
planted.tell()
