"""Boxes and classes of handwriting with Lightning, its gradients bounded row by row.

    python examples/lightning_detection.py --steps 200

Two lines are new in a Lightning script: the import and the callback. `--without` trains without it.
"""

from __future__ import annotations

import argparse
import logging

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from gradsplit.integrations.lightning import GradientSplitting
from gradsplit.lab.registry import workload
from gradsplit.lab.task import Task


class Batches(Dataset):
    """The task's batches, one an item."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.steps = task, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        return self.task.draw(step)


class Detection(pl.LightningModule):
    """A task as a Lightning module."""

    def __init__(self, task: Task, lr: float) -> None:
        super().__init__()
        self.task, self.net, self.lr = task, task.model, lr

    def training_step(self, batch: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
        """Return the loss."""
        return self.task.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)


def main() -> None:
    """Train, and print the score."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--lr", type=float, default=0.1)
    options.add_argument("--without", action="store_true", help="leave the callback out")
    chosen = options.parse_args()

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = workload("detection").build(seed=0)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if chosen.without else [GradientSplitting()],
    )
    trainer.fit(Detection(task, chosen.lr), DataLoader(Batches(task, chosen.steps), batch_size=None))
    print(f"score {task.evaluate(task.model)['score']:.3f}")


if __name__ == "__main__":
    main()
