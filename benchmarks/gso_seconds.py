"""What a training step of `gradsplit.GSO` costs beside fused AdamW with a clip, at four batch sizes of the text GPT.

    python benchmarks/gso_seconds.py                # writes benchmarks/results/gso/seconds.json and prints a table

The two runs take turns, `TURN` steps at a time, so that a busy moment of the machine meets both. One thread. A ratio
is that of the two medians over turns; its range is that of the ratios turn by turn.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from gradsplit import GSO
from gradsplit.lab import evidence, workload
from gradsplit.lab.task import Task

PLACE = Path(__file__).parent / "results" / "gso" / "seconds.json"
BATCHES, TURNS, TURN, WARM = (8, 16, 32, 64), 9, 10, 10


def _optimizer(name: str, task: Task) -> Callable[[], Any]:
    parameters = list(task.model.parameters())
    if name == "gso":
        return GSO(task.model).step
    adamw = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()

    return step


def turns(batch: int) -> dict[str, list[dict[str, float]]]:
    """Milliseconds per training step and per optimizer step, one entry per turn, for both."""
    made = {}
    for name in ("adamw", "gso"):
        task = workload("gpt").build(0, batch=batch)
        made[name] = (task, _optimizer(name, task), [task.batch(step) for step in range(TURN)])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for turn in range(-1, TURNS):
        for name, (task, step, batches) in made.items():
            whole, alone = time.perf_counter(), 0.0
            for number in range(WARM if turn < 0 else TURN):
                task.model.zero_grad()
                task.loss(task.model, batches[number % TURN]).backward()
                before = time.perf_counter()
                step()
                alone += time.perf_counter() - before
            if turn >= 0:
                whole = time.perf_counter() - whole
                found[name].append({"whole": 1e3 * whole / TURN, "step": 1e3 * alone / TURN})
    return found


def row(batch: int) -> dict[str, Any]:
    """Medians and ratios of one batch size."""
    found = turns(batch)
    middle = {
        name: {part: statistics.median(t[part] for t in times) for part in ("whole", "step")}
        for name, times in found.items()
    }
    ratios = sorted(g["whole"] / a["whole"] for g, a in zip(found["gso"], found["adamw"], strict=True))
    return {
        "batch": batch,
        "median_ms": middle,
        "ratio": middle["gso"]["whole"] / middle["adamw"]["whole"],
        "ratio_range": [ratios[0], ratios[-1]],
        "turns": found,
    }


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    rows = []
    print("batch | AdamW + clip, ms per step (optimizer) | GSO, ms per step (optimizer) | ratio [range]")
    for batch in BATCHES:
        found = row(batch)
        rows.append(found)
        texts = [f"{m['whole']:.1f} ({m['step']:.2f})" for m in found["median_ms"].values()]
        low, high = found["ratio_range"]
        print(f"{batch} | {texts[0]} | {texts[1]} | {found['ratio']:.3f} [{low:.3f} to {high:.3f}]", flush=True)
    PLACE.write_text(json.dumps({**evidence.conditions(), "turn_steps": TURN, "rows": rows}, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
