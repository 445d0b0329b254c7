"""Faults in front of each optimizer, with and without a splitter; resumable: a run that stands in the file is left out.

    python -m benchmarks.any_optimizer rates                # three learning rates without a fault
    python -m benchmarks.any_optimizer faults --seeds 0 1 --shares .05 .2 --controls none default "clip 1" ZClip skip
    python -m benchmarks.any_optimizer clean --seeds 0 1 2 3 4
    python -m benchmarks.any_optimizer faults --optimizers SGD --seeds 0 1 2 --controls isolation "tau .1" "tau .3"
    python -m benchmarks.any_optimizer clean --optimizers SGD --seeds 0 1 2 3 4 --controls isolation "tau .1" "tau .3"

Two small tasks: text (a GPT of one block, width 32, 8 windows of 32 characters per step, 200 steps) and detection (the
two-tower detector, width 8, loss in logarithms, 8 scenes per step, 200 steps). The score is the loss on held-out data.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsplit as gs
from benchmarks.faults.methods import ZClip
from benchmarks.faults.workloads import WORKLOADS
from gradsplit.lab.task import Task
from gradsplit.lab.workloads.detection import build_detection
from gradsplit.lab.workloads.text import build_gpt

__all__ = ["CONTROLS", "FAULTS", "OPTIMIZERS", "TASKS", "run"]

FOLDER = Path(__file__).parent / "results" / "any-optimizer"
COLUMNS = ("task", "optimizer", "control", "fault", "rate", "seed", "lr", "final_loss", "dead", "seconds")
KEY = COLUMNS[:7]
STEPS = 200
WARMUP = 20
"""Steps of warm-up of the optimizers that warm up by themselves."""

TASKS: dict[str, tuple[Callable[[int], Task], Callable[[Task], float]]] = {
    "text": (
        lambda seed: build_gpt(seed, layers=1, width=32, heads=2, context=32, batch=8),
        WORKLOADS["text"].held_out,
    ),
    "detection": (
        lambda seed: build_detection(seed, healthy=True, width=8, batch=8),
        WORKLOADS["detection"].held_out,
    ),
}
"""Seed -> task, and the loss on data that is not trained on."""

Made = list[torch.optim.Optimizer]


def _others(package: str, name: str, parameters: Any, **options: Any) -> torch.optim.Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):  # some announce themselves
        made: torch.optim.Optimizer = getattr(__import__(package), name)(parameters, **options)
    return made


def _matrices(model: nn.Module, *, are: bool) -> list[nn.Parameter]:
    named = model.named_parameters()
    return [p for name, p in named if (p.dim() >= 2 and "token" not in name and "position" not in name) == are]


def _muon(model: nn.Module, lr: float) -> Made:
    """torch's where all are matrices; it takes no convolutions, so these get pytorch_optimizer's, which flattens."""
    matrices = _matrices(model, are=True)
    if all(p.dim() == 2 for p in matrices):
        first: torch.optim.Optimizer = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)
    else:
        first = _others("pytorch_optimizer", "Muon", [{"params": matrices, "use_muon": True}], lr=lr, weight_decay=0.0)
    return [first, torch.optim.AdamW(_matrices(model, are=False), lr=3e-3)]


OPTIMIZERS: dict[str, Callable[[nn.Module, float], Made]] = {
    "Adam": lambda m, lr: [torch.optim.Adam(m.parameters(), lr=lr)],
    "AdamW": lambda m, lr: [torch.optim.AdamW(m.parameters(), lr=lr)],
    "Muon": _muon,
    "SOAP": lambda m, lr: [_others("pytorch_optimizer", "SOAP", m.parameters(), lr=lr)],
    "Lion": lambda m, lr: [_others("pytorch_optimizer", "Lion", m.parameters(), lr=lr)],
    "Adafactor": lambda m, lr: [torch.optim.Adafactor(m.parameters(), lr=lr)],
    "SGD": lambda m, lr: [torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9)],
    "schedule-free": lambda m, lr: [
        _others("schedulefree", "AdamWScheduleFree", m.parameters(), lr=lr, warmup_steps=WARMUP)
    ],
    "Prodigy": lambda m, lr: [_others("prodigyopt", "Prodigy", m.parameters(), lr=lr)],
}

GRID: dict[str, dict[str, tuple[float, float, float]]] = {
    "text": {
        "Adam": (9e-4, 3e-3, 9e-3),
        "AdamW": (9e-4, 3e-3, 9e-3),
        "Muon": (0.006, 0.02, 0.06),
        "SOAP": (9e-4, 3e-3, 9e-3),
        "Lion": (3e-4, 1e-3, 3e-3),
        "Adafactor": (0.009, 0.03, 0.09),
        "SGD": (0.09, 0.3, 0.9),
        "schedule-free": (0.003, 0.01, 0.03),
        "Prodigy": (0.3, 1.0, 3.0),
    }
}
GRID["detection"] = GRID["text"] | {"SGD": (0.009, 0.03, 0.09)}
BEST = {
    "text": dict(zip(OPTIMIZERS, (2, 2, 2, 2, 2, 2, 1, 1, 0), strict=True)),
    "detection": dict(zip(OPTIMIZERS, (2, 2, 1, 2, 2, 2, 1, 1, 0), strict=True)),
}
RATES = {task: {name: GRID[task][name][best] for name, best in row.items()} for task, row in BEST.items()}
"""The best of the three rates without a fault and without a control, seed 0 (`rates`)."""


def _one(gradients: list[Tensor], draw: torch.Generator) -> Tensor:
    return gradients[int(torch.randint(len(gradients), (), generator=draw))]


def _nan(gradients: list[Tensor], draw: torch.Generator) -> None:
    gradient = _one(gradients, draw)
    gradient.view(-1)[int(torch.randint(gradient.numel(), (), generator=draw))] = math.nan


def _row(gradients: list[Tensor], draw: torch.Generator) -> None:
    gradient = _one(gradients, draw)
    gradient[int(torch.randint(len(gradient), (), generator=draw))] *= 1e6


def _batch(gradients: list[Tensor], draw: torch.Generator) -> None:
    for gradient in gradients:
        gradient *= 1e3


def _layer(gradients: list[Tensor], draw: torch.Generator) -> None:
    gradient = _one(gradients, draw)
    gradient *= 1e3


FAULTS: dict[str, Callable[[list[Tensor], torch.Generator], None] | None] = {
    "clean": None,
    "one NaN": _nan,
    "row x 1e6": _row,
    "batch x 1e3": _batch,
    "layer x 1e3": _layer,
}

Bound = Callable[[], bool]


def _none(task: Task, optimizers: Made) -> Bound:
    return lambda: True


def _clip(task: Task, optimizers: Made) -> Bound:
    return lambda: bool(nn.utils.clip_grad_norm_(task.model.parameters(), 1.0).numel())


def _skip(task: Task, optimizers: Made) -> Bound:
    """Leave a step out that is not finite, or above ten times the median of the last 50 norms that were let through."""
    usual: deque[float] = deque(maxlen=50)

    def bound() -> bool:
        norm = float(nn.utils.get_total_norm([p.grad for p in task.model.parameters() if p.grad is not None]))
        if not math.isfinite(norm) or (len(usual) >= 10 and norm > 10 * statistics.median(usual)):
            return False
        usual.append(norm)
        return True

    return bound


def _split(**options: Any) -> Callable[[Task, Made], Bound]:
    def make(task: Task, optimizers: Made) -> Bound:
        splitters = []
        for optimizer in optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            pairs = [(name, p) for name, p in task.model.named_parameters() if id(p) in held]
            splitters.append(gs.GradientSplitter(pairs, optimizer=optimizer, **options))

        def step() -> bool:
            for splitter in splitters:
                splitter.step()
            return True

        return step

    return make


CONTROLS: dict[str, Callable[[Task, Made], Bound]] = {
    "none": _none,
    "default": _split(),
    "isolation": _split(budget=gs.Relative(0.2), collective=True),  # the name of "relative .2" in front of SGD
    "relative .2": _split(budget=gs.Relative(0.2), collective=True),
    "relative .5": _split(budget=gs.Relative(0.5), collective=True),
    "tau .06": _split(budget=gs.RelativeStep(0.06, length=1.0)),
    "tau .1": _split(budget=gs.RelativeStep(0.1, length=1.0)),
    "tau .3": _split(budget=gs.RelativeStep(0.3, length=1.0), collective=True),
    "clip 1": _clip,
    "ZClip": lambda task, optimizers: ZClip(task, optimizers[0]).bound,
    "skip": _skip,
}
"""What stands between the backward pass and the step; False: the step is left out."""


def run(
    task_name: str, optimizer: str, control: str, fault: str, rate: float, seed: int, lr: float, steps: int = STEPS
) -> dict[str, Any]:
    """Train once under a fault in a share of the steps; return one row of the file."""
    began = time.process_time()
    build, held_out = TASKS[task_name]
    task = build(seed)

    def row(loss: float) -> dict[str, Any]:
        values = (task_name, optimizer, control, fault, rate, seed, lr, loss, int(not math.isfinite(loss)))
        return dict(zip(COLUMNS, (*values, time.process_time() - began), strict=True))

    optimizers = OPTIMIZERS[optimizer](task.model, lr)
    bound = CONTROLS[control](task, optimizers)
    flat = optimizer == "schedule-free"  # its promise is to need no schedule
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 1.0 if flat else 0.0, total_iters=steps) for o in optimizers]
    draw, spoil = torch.Generator().manual_seed(1_000 + seed), FAULTS[fault]
    _turn(optimizers, "train")
    for step in range(steps):
        task.model.zero_grad()
        torch.autograd.backward(task.loss(task.model, task.batch(step)))
        if spoil is not None and float(torch.rand((), generator=draw)) < rate:
            spoil([p.grad for p in task.model.parameters() if p.grad is not None], draw)
        try:
            if bound():
                for each in optimizers:
                    each.step()
        except torch.linalg.LinAlgError:  # SOAP, whose bases are not finite
            return row(math.nan)
        for schedule in schedules:
            schedule.step()
    _turn(optimizers, "eval")
    return row(held_out(task))


def _turn(optimizers: Made, mode: str) -> None:
    """Schedule-free shows other weights while it trains than while it is asked."""
    for optimizer in optimizers:
        if hasattr(optimizer, mode):
            getattr(optimizer, mode)()


Job = tuple[str, str, str, str, float, int, float]


def _faults(options: argparse.Namespace) -> Iterator[Job]:
    for rate, seed, task, optimizer, fault, control in product(
        options.shares, options.seeds, options.tasks, options.optimizers, options.faults, options.controls
    ):
        yield task, optimizer, control, fault, 0.0 if fault == "clean" else rate, seed, RATES[task][optimizer]


def _clean(options: argparse.Namespace) -> Iterator[Job]:
    for seed, task, optimizer, control in product(options.seeds, options.tasks, options.optimizers, options.controls):
        yield task, optimizer, control, "clean", 0.0, seed, RATES[task][optimizer]


def _rates(options: argparse.Namespace) -> Iterator[Job]:
    for task, optimizer in product(options.tasks, options.optimizers):
        yield from ((task, optimizer, "none", "clean", 0.0, 0, lr) for lr in GRID[task][optimizer])


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("faults", "clean", "rates"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--controls", nargs="+", default=["none", "default"], choices=list(CONTROLS))
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05], help="of the steps, with a fault")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "runs.csv"
    rows = list(csv.DictReader(path.open(encoding="utf8"))) if path.exists() else []
    done = {tuple(row[key] for key in KEY) for row in rows}
    with path.open("a", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for job in {"faults": _faults, "clean": _clean, "rates": _rates}[options.what](options):
            if tuple(map(str, job)) not in done:
                row = run(*job)
                row |= {"final_loss": f"{row['final_loss']:.4f}", "seconds": f"{row['seconds']:.2f}"}
                writer.writerow(row)
                file.flush()
                done.add(tuple(map(str, job)))


if __name__ == "__main__":
    main()
