"""Why `GSO(direction="adam")` fails on the hot residual stack at a high rate: every step is as long as it may be.

Rows grow by it.

    python benchmarks/gso.py hot-stack       # 5 minutes on one core; goes on where it stopped

Writes benchmarks/results/gso-hot-stack.json: per rule the accuracy, and at ten steps the loss, the mean length of the
blocks' kernels over that at the start, and the mean relative step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradsplit as gs
from gradsplit.budget import DEFAULT_OF_GSO
from gradsplit.lab.evidence import conditions
from gradsplit.lab.optimizers import Settings, make_schedule
from gradsplit.lab.registry import workload

OUT = Path(__file__).parents[1] / "results" / "gso-hot-stack.json"
SEED, POINTS = 1000, 10
SMALL, WHOLE = (40, 12, 300), (48, 16, 900)  # blocks, channels, steps

RULES: dict[str, tuple[Any, bool]] = {
    "default": (DEFAULT_OF_GSO, False),
    "1 % a step": ((gs.Relative(0.2), gs.RelativeStep(0.01)), False),
    "rows 0.04 before the moments": ((gs.Relative(0.04), gs.RelativeStep(0.03)), False),
    "global clip at 1 before the moments": ({"root": gs.Fixed(1.0), "bin": gs.RelativeStep(0.03)}, False),
    "default, rows may not grow beyond 1": (DEFAULT_OF_GSO, True),
}
"""Rule -> (budget, whether a row longer than 1 is put back to its length after every step)."""


JOBS = [
    *((rule, 0.1, *SMALL) for rule in RULES),
    *(("global clip at 1 before the moments", lr, *WHOLE) for lr in (0.1, 0.3)),
    *(("1 % a step", lr, *WHOLE) for lr in (0.1, 0.3)),
]


def run(rule: str, lr: float, blocks: int, channels: int, num_steps: int) -> dict[str, Any]:
    """Train once, with a cosine schedule, and return what happened."""
    budget, keep_length = RULES[rule]
    task = workload("residual-stack").build(seed=SEED, blocks=blocks, channels=channels)
    settings = Settings(num_steps, "adamw", schedule="cosine")
    optimizer = gs.GSO(task.model, lr, budget=budget, **settings.adam, direction="adam")
    schedule = make_schedule(optimizer, settings, warmup=0)
    weights = [p for p in task.model.parameters() if p.dim() > 1]
    kernels = [p for name, p in task.model.named_parameters() if name.startswith("blocks") and p.dim() > 1]
    start = [float(p.detach().norm()) for p in kernels]
    steps, losses, lengths, moves = [], [], [], []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step))
        torch.autograd.backward(loss)
        before = [p.detach().clone() for p in kernels] if step % (num_steps // POINTS) == 0 else []
        rows = [_lengths(p) for p in weights]
        optimizer.step()
        schedule.step()
        if keep_length:
            _shorten(weights, rows)
        if before:
            pairs = list(zip(kernels, before, start, strict=True))
            steps.append(step)
            losses.append(float(loss.detach()))
            lengths.append(statistics.fmean(float(p.detach().norm()) / s for p, _, s in pairs))
            moves.append(statistics.fmean(float((p.detach() - b).norm() / b.norm()) for p, b, _ in pairs))
    accuracy = task.evaluate(task.model)["accuracy"]
    setting = {"rule": rule, "lr": lr, "blocks": blocks, "channels": channels, "num_steps": num_steps}
    return {**setting, "accuracy": accuracy, "steps": steps, "loss": losses, "length": lengths, "move": moves}


def _lengths(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).norm(dim=1)


@torch.no_grad()
def _shorten(weights: list[Tensor], rows: list[Tensor]) -> None:
    """Put rows that have grown back to the length they had, or to 1 where they were shorter."""
    for weight, before in zip(weights, rows, strict=True):
        times = (before.clamp(min=1.0) / _lengths(weight).clamp(min=1e-30)).clamp(max=1.0)
        weight.mul_(times.reshape(-1, *[1] * (weight.dim() - 1)))


def main(asked: Sequence[str]) -> None:
    """Run what the file does not hold yet; save after every run."""
    parser = argparse.ArgumentParser(prog="gso.py hot-stack", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args(asked).out
    rows = json.loads(out.read_text(encoding="utf8"))["rows"] if out.is_file() else []
    done = {(row["rule"], row["lr"], row["blocks"], row["channels"], row["num_steps"]) for row in rows}
    for job in JOBS:
        if job not in done:
            rows.append(run(*job))
            print(job, rows[-1]["accuracy"], [round(length, 3) for length in rows[-1]["length"]], flush=True)
            data = {"conditions": conditions(), "rows": rows}
            out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf8")
