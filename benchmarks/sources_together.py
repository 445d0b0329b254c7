"""What GSO, GradientSplitter and SampleSplitter give alone and together, on the exploding detector and on text.

    python benchmarks/sources_together.py        # runs what is missing, prints the table

A method is an optimizer with what stands around it. AdamW has a rate from a grid of three, chosen on seed 100 without
any splitter; GSO has nothing chosen. All have the same steps and a linear decay to zero. In `text, garbage` 5 % of
the sequences of every batch are random characters. One line per run in benchmarks/results/sources/together.jsonl.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import gradsplit as gs
from gradsplit.lab import evidence, workload
from gradsplit.lab.task import generator

PLACE = Path(__file__).parent / "results" / "sources" / "together.jsonl"
TASKS = {  # task -> (workload, steps, garbage sequences, score)
    "detector": ("detection", 500, 0.0, "score"),
    "text": ("gpt", 300, 0.0, "val_loss"),
    "text, garbage": ("gpt", 300, 0.05, "val_loss"),
}
METHODS = {  # method -> (optimizer, GradientSplitter, SampleSplitter)
    "AdamW": ("adamw", False, False),
    "AdamW + GradientSplitter": ("adamw", True, False),
    "AdamW + SampleSplitter": ("adamw", False, True),
    "AdamW + both": ("adamw", True, True),
    "GSO": ("gso", False, False),
    "GSO + SampleSplitter": ("gso", False, True),
}
RATES, CHOOSING, FRESH = (3e-3, 1e-2, 3e-2), 100, (0, 1, 2)


def run(task: str, method: str, lr: float | None, seed: int) -> dict[str, Any]:
    """Train once; the score and the processor time of the training."""
    name, steps, garbage, score = TASKS[task]
    made = workload(name).build(seed)
    kind, bounded, by_sample = METHODS[method]
    parameters = list(made.model.parameters())
    optimizer: torch.optim.Optimizer
    if kind == "gso":
        optimizer = gs.GSO(made.model)
    else:
        assert lr is not None
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with ExitStack() as stack:
        if bounded:
            gs.GradientSplitter(made.model, optimizer=optimizer).attach(optimizer)
        if by_sample:
            stack.enter_context(gs.SampleSplitter(made.model))
        began = time.process_time()
        for step in range(steps):
            batch = made.batch(step)
            if garbage:
                source = generator(seed, 55, step)
                rows = torch.rand(len(batch[0]), generator=source) < garbage
                batch = tuple(
                    torch.where(rows[:, None], torch.randint(int(part.max()) + 1, part.shape, generator=source), part)
                    for part in batch
                )
            optimizer.zero_grad()
            made.loss(made.model, batch).backward()
            optimizer.step()
            schedule.step()
        used = time.process_time() - began
    return {"score": made.evaluate(made.model)[score], "cpu_seconds": round(used, 2)}


def main() -> None:
    """Choose the rates, run the fresh seeds, print medians."""
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in PLACE.read_text("utf8").splitlines()] if PLACE.is_file() else []
    known = {(line["task"], line["method"], line["lr"], line["seed"]): line for line in lines}

    def result(task: str, method: str, lr: float | None, seed: int) -> dict[str, Any]:
        key = task, method, lr, seed
        if key not in known:
            found = run(*key) | {"task": task, "method": method, "lr": lr, "seed": seed}
            known[key] = found | evidence.conditions()
            with PLACE.open("a", encoding="utf8") as file:
                file.write(json.dumps(known[key]) + "\n")
        return known[key]

    for task, (name, *_) in TASKS.items():
        sign = 1 if workload(name).higher_is_better else -1
        best = max(RATES, key=lambda lr, t=task, s=sign: s * result(t, "AdamW", lr, CHOOSING)["score"])
        for method, (kind, *_) in METHODS.items():
            rows = [result(task, method, best if kind == "adamw" else None, seed) for seed in FRESH]
            scores = sorted(row["score"] for row in rows)
            middle, cpu = (statistics.median(row[part] for row in rows) for part in ("score", "cpu_seconds"))
            print(f"{task} | {method} | {middle:.4f} | {scores[0]:.4f} to {scores[-1]:.4f} | {cpu:.1f}", flush=True)


if __name__ == "__main__":
    main()
