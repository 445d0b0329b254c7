"""A character GPT with Hugging Face's Trainer, optimised by GSO, or by SGD with bounded gradients.

    python examples/transformers_gpt.py --steps 200
    python examples/transformers_gpt.py --steps 200 --sgd

GSO goes in through `optimizer_cls_and_kwargs`, a splitter as a callback; both want `max_grad_norm=0`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainingArguments

import gradsplit as gs
from gradsplit.integrations.transformers import GradientSplitting
from gradsplit.lab.registry import workload
from gradsplit.lab.task import Task


class Batches(IterableDataset):
    """The task's batches in their order, one an item."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.steps = task, steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.steps):
            yield dict(zip(("input_ids", "labels"), self.task.draw(step), strict=True))


class WithLoss(nn.Module):
    """A model that returns its loss, as Trainer wants it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.loss = task.model, task.loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch."""
        return {"loss": self.loss(self.model, (input_ids, labels))}


def main() -> None:
    """Train, and print the loss on held-out text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--sgd", action="store_true", help="SGD with momentum and bounded gradients, not GSO")
    chosen = options.parse_args()

    torch.set_num_threads(1)
    task = workload("gpt").build(seed=0)
    sgd: tuple[Any, dict[str, Any]] = (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            WithLoss(task),
            TrainingArguments(
                folder,
                max_steps=chosen.steps,
                per_device_train_batch_size=1,
                max_grad_norm=0,
                lr_scheduler_type="cosine",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            data_collator=lambda items: items[0],
            train_dataset=Batches(task, chosen.steps),
            callbacks=[GradientSplitting()] if chosen.sgd else [],
            optimizer_cls_and_kwargs=sgd if chosen.sgd else (gs.GSO, {"params": task.model, "lr": 0.03}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    print(f"val_loss {task.evaluate(task.model)['val_loss']:.3f}")


if __name__ == "__main__":
    main()
