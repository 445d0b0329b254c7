"""A character GPT in the style of torchtitan: model parts with an optimizer each, and one distributed checkpoint.

    python examples/torchtitan_style_gpt.py --steps 200

torchtitan calls `dist_utils.clip_grad_norm_` on all parts at the place of `splitter.step()`. Splitters are entries of
the checkpoint like the schedulers: torch.distributed.checkpoint takes anything with a state.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import gradsplit as gs
from gradsplit.lab.registry import workload
from gradsplit.lab.task import Task


class Trainer:
    """A loop with its state; each of `model_parts` (stages of a pipeline) has an optimizer, a schedule, a splitter."""

    def __init__(self, task: Task, *, steps: int, lr: float) -> None:
        self.task, self.step = task, 0
        self.model_parts: list[nn.Module] = [task.model]
        self.optimizers = [torch.optim.SGD(part.parameters(), lr=lr, momentum=0.9) for part in self.model_parts]
        self.schedulers = [torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.1, steps) for one in self.optimizers]
        pairs = zip(self.model_parts, self.optimizers, strict=True)
        self.splitters = [gs.GradientSplitter(part, optimizer=optimizer) for part, optimizer in pairs]

    def train_step(self) -> None:
        """One update of every part."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.task.loss(self.model_parts[0], self.task.batch(self.step)).backward()
        for splitter in self.splitters:
            splitter.step()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, by the part it belongs to."""
        state: dict[str, Any] = {"trainer.step": self.step}
        for i, (part, optimizer) in enumerate(zip(self.model_parts, self.optimizers, strict=True)):
            state[f"model{i}"], state[f"optimizer{i}"] = get_state_dict(part, optimizer)
            state[f"lr_scheduler{i}"], state[f"splitter{i}"] = self.schedulers[i], self.splitters[i]
        return state

    def load(self, folder: str) -> None:
        """Go on where the checkpoint in a folder left off; what has a state of its own is loaded in place."""
        state = self.state_dict()
        dcp.load(state, checkpoint_id=folder)
        for i, (part, optimizer) in enumerate(zip(self.model_parts, self.optimizers, strict=True)):
            model, moments = state[f"model{i}"], state[f"optimizer{i}"]
            set_state_dict(part, optimizer, model_state_dict=model, optim_state_dict=moments)
        self.step = state["trainer.step"]


def main() -> None:
    """Train half, save, go on in a trainer made anew, and print the loss on held-out text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--lr", type=float, default=0.3)
    chosen = options.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainer = Trainer(workload("gpt").build(seed=0), steps=chosen.steps, lr=chosen.lr)
    while trainer.step < chosen.steps // 2:
        trainer.train_step()
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(trainer.state_dict(), checkpoint_id=folder)
        trainer = Trainer(workload("gpt").build(seed=0), steps=chosen.steps, lr=chosen.lr)
        trainer.load(folder)
    while trainer.step < chosen.steps:
        trainer.train_step()
    print(f"val_loss {trainer.task.evaluate(trainer.model_parts[0])['val_loss']:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
