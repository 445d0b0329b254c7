"""A character GPT with Accelerate: SGD with momentum, gradients of two batches added up, then bounded row by row.

    python examples/accelerate_gpt.py --steps 200
    torchrun --nproc-per-node 2 examples/accelerate_gpt.py --steps 200

`split_gradients` is one line after `prepare`; it acts where the gradients are complete.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from gradsplit.integrations.accelerate import split_gradients
from gradsplit.lab.registry import workload


def main() -> None:
    """Train, and print the loss on held-out text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--lr", type=float, default=0.3)
    chosen = options.parse_args()

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    task = workload("gpt").build(seed=0)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=chosen.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen.steps // 2)
    windows = [window for step in range(chosen.steps) for window in zip(*task.draw(step), strict=True)]
    batches = DataLoader(windows, batch_size=len(windows) // chosen.steps)
    model, optimizer, batches, scheduler = accelerator.prepare(task.model, optimizer, batches, scheduler)
    split_gradients(accelerator, model, optimizer)

    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(task.loss(model, batch))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    if accelerator.is_main_process:
        print(f"val_loss {task.evaluate(accelerator.unwrap_model(model))['val_loss']:.3f}")


if __name__ == "__main__":
    main()
