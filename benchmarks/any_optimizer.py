"""Faults in front of each optimizer, with and without a splitter; resumable: a run that stands in the file is left out.

    python -m benchmarks.any_optimizer --seeds 0 1 --optimizers AdamW Muon

The task is the text workload of the faults campaign: a character LSTM, width 64, 16 windows of 32 a step.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsplit as gs
from benchmarks.faults.workloads import WORKLOADS

__all__ = ["CONTROLS", "FAULTS", "OPTIMIZERS", "run"]

FILE = Path(__file__).parent / "results" / "any-optimizer" / "text.csv"
COLUMNS = ("optimizer", "control", "fault", "rate", "seed", "steps", "final_loss", "dead", "seconds")


def _others(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    import pytorch_optimizer

    made: torch.optim.Optimizer = getattr(pytorch_optimizer, name)(model.parameters(), **options)
    return made


def _matrices(model: nn.Module, *, are: bool) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if (p.dim() == 2 and "embed" not in name) == are]


OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "AdamW": lambda m: [torch.optim.AdamW(m.parameters(), lr=3e-3)],
    "Muon": lambda m: [
        torch.optim.Muon(_matrices(m, are=True), lr=0.01),
        torch.optim.AdamW(_matrices(m, are=False), lr=3e-3),
    ],
    "SOAP": lambda m: [_others("SOAP", m, lr=3e-3)],
    "Lion": lambda m: [_others("Lion", m, lr=3e-4)],
    "Adafactor": lambda m: [torch.optim.Adafactor(m.parameters(), lr=0.02)],
    "SGD": lambda m: [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9)],
}
"""Each with a usual rate; none was searched for."""


def _nan(gradients: list[Tensor], draw: torch.Generator) -> None:
    gradient = gradients[int(torch.randint(len(gradients), (), generator=draw))]
    gradient.view(-1)[int(torch.randint(gradient.numel(), (), generator=draw))] = math.nan


def _row(gradients: list[Tensor], draw: torch.Generator) -> None:
    gradient = gradients[int(torch.randint(len(gradients), (), generator=draw))]
    gradient[int(torch.randint(len(gradient), (), generator=draw))] *= 1e6


def _batch(gradients: list[Tensor], draw: torch.Generator) -> None:
    for gradient in gradients:
        gradient *= 1e3


def _layer(gradients: list[Tensor], draw: torch.Generator) -> None:
    gradients[int(torch.randint(len(gradients), (), generator=draw))] *= 1e3


FAULTS: dict[str, Callable[[list[Tensor], torch.Generator], None] | None] = {
    "clean": None,
    "one NaN": _nan,
    "row x 1e6": _row,
    "batch x 1e3": _batch,
    "layer x 1e3": _layer,
}


def _none(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Callable[[], bool]:
    return lambda: True


def _clip(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Callable[[], bool]:
    return lambda: bool(nn.utils.clip_grad_norm_(model.parameters(), 1.0).numel())


def _skip(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Callable[[], bool]:
    return lambda: all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def _split(budget: Any) -> Callable[[nn.Module, list[torch.optim.Optimizer]], Callable[[], bool]]:
    def make(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Callable[[], bool]:
        splitters = []
        for optimizer in optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            pairs = [(name, p) for name, p in model.named_parameters() if id(p) in held]
            splitters.append(gs.GradientSplitter(pairs, budget=budget, optimizer=optimizer))

        def step() -> bool:
            for splitter in splitters:
                splitter.step()
            return True

        return step

    return make


CONTROLS = {"none": _none, "clip 1": _clip, "skip": _skip, "default": _split(None), "Ema(1.5)": _split(gs.Ema(1.5))}
"""What stands between the backward pass and the step; False: the step is left out."""


def run(optimizer: str, control: str, fault: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once under a fault in a share of the steps; return one row of the file."""
    began = time.process_time()
    task = WORKLOADS["text"].build(seed)
    model = task.model
    optimizers = OPTIMIZERS[optimizer](model)
    bound = CONTROLS[control](model, optimizers)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=steps) for o in optimizers]
    draw, spoil = torch.Generator().manual_seed(1_000 + seed), FAULTS[fault]
    for step in range(steps):
        model.zero_grad()
        loss = task.loss(model, task.batch(step))
        torch.autograd.backward(loss)
        if spoil is not None and float(torch.rand((), generator=draw)) < rate:
            spoil([p.grad for p in model.parameters() if p.grad is not None], draw)
        if bound():
            for each in optimizers:
                each.step()
        for schedule in schedules:
            schedule.step()
    loss_at_end = WORKLOADS["text"].held_out(task)
    dead = not math.isfinite(loss_at_end)
    values = (optimizer, control, fault, rate, seed, steps, loss_at_end, int(dead), time.process_time() - began)
    return dict(zip(COLUMNS, values, strict=True))


def _jobs(options: argparse.Namespace) -> Iterator[tuple[str, str, str, float, int, int]]:
    for seed, optimizer, fault, control in product(options.seeds, options.optimizers, FAULTS, CONTROLS):
        if control != "skip" or fault == "one NaN":
            yield optimizer, control, fault, 0.0 if fault == "clean" else options.rate, seed, options.steps


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(FILE.open(encoding="utf8"))) if FILE.exists() else []
    done = {tuple(row[key] for key in COLUMNS[:6]) for row in rows}
    with FILE.open("a", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for job in _jobs(options):
            if tuple(map(str, job)) not in done:
                row = run(*job)
                row |= {"final_loss": f"{row['final_loss']:.4f}", "seconds": f"{row['seconds']:.1f}"}
                writer.writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
