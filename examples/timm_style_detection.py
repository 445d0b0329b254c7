"""Detection in the style of timm's training script: accumulation, a scaler, and bounding where it clips.

    python examples/timm_style_detection.py --steps 200

The step has the order of timm's `train_one_epoch` and `NativeScaler`: backward, unscale, bound, step, update. At the
place of `splitter.step()` timm has `dispatch_clip_grad(model_parameters(model, exclude_head=True), value, "agc")`.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch

import gradsplit as gs
from gradsplit.lab.registry import workload


class Scaler:
    """Backward, and on the last micro-batch the update, as timm's `NativeScaler` has it."""

    def __init__(self, device: str, *, enabled: bool) -> None:
        self.scaler = torch.amp.GradScaler(device, enabled=enabled)

    def __call__(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        splitter: gs.GradientSplitter | None,
        *,
        need_update: bool,
    ) -> None:
        """Take one micro-batch's loss; bound and step if it is the last."""
        self.scaler.scale(loss).backward()
        if need_update:
            self.scaler.unscale_(optimizer)  # the splitter's limits are in true units
            if splitter is not None:
                splitter.step()
            self.scaler.step(optimizer)
            self.scaler.update()


def main() -> None:
    """Train, and print the score."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--lr", type=float, default=0.1)
    options.add_argument("--grad-accum-steps", type=int, default=1)
    options.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    options.add_argument("--without", action="store_true", help="leave the splitter out")
    chosen = options.parse_args()

    torch.set_num_threads(1)
    task = workload("detection").build(seed=0)
    model = task.model
    optimizer = torch.optim.SGD(model.parameters(), lr=chosen.lr, momentum=0.9, nesterov=True)
    splitter = None if chosen.without else gs.GradientSplitter(model, optimizer=optimizer)
    scaler = Scaler("cpu", enabled=False)  # bfloat16 and float32 need no scale
    for step in range(chosen.steps):
        need_update = (step + 1) % chosen.grad_accum_steps == 0
        with torch.autocast("cpu", torch.bfloat16) if chosen.amp else nullcontext():
            loss = task.loss(model, task.batch(step))
        scaler(loss / chosen.grad_accum_steps, optimizer, splitter, need_update=need_update)
        if need_update:
            optimizer.zero_grad()
    print(f"score {task.evaluate(model)['score']:.3f}")


if __name__ == "__main__":
    main()
