"""CPU time per training step of GSO beside other optimizers on the text tasks, and the steps that equal seconds buy.

    python benchmarks/gso_equal.py          # two minutes; writes benchmarks/results/gso/equal.json and prints a table

All methods of a task take turns in one process, `TURN` steps at a time, so that a busy moment of the machine meets
all of them. What counts is the process' CPU time, one thread. A ratio is the median over turns of the ratios within a
turn. AdamW is the fused one. "steps" is how many steps of a method fit into the time of AdamW's whole run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gso import METHODS, Prepared
from benchmarks.gso_plan import Job, frozen_pairs
from benchmarks.gso_tasks import build, evidence, tasks

PLACE = Path(__file__).parent / "results" / "gso" / "equal.json"
TURNS, TURN, WARM = 11, 8, 8
TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "GPT": ("gpt", 1000, {}),
    "second text": ("gpt", 1000, {"text": "second"}),
    "LSTM": ("lstm", 500, {}),
}
"""Name, task, steps of a whole run, options of the task."""
RATES: dict[str, float] = {"adamw": 0.01, "gso": 0.03, "muon": 0.03, "schedulefree": 0.01, "soap": 0.01}


def _prepared(name: str, task: tasks.Task, steps: int) -> Prepared:
    made = METHODS[name](task, RATES[name], steps)
    if name == "adamw":
        parameters = list(task.model.parameters())
        made.optimizers = [torch.optim.AdamW(parameters, lr=RATES[name], betas=(0.9, 0.99), fused=True)]
    for optimizer in made.optimizers:
        getattr(optimizer, "train", lambda: None)()
    return made


def turns(name: str, steps: int, options: dict[str, Any]) -> dict[str, list[float]]:
    """CPU milliseconds per training step of each method, one entry per turn."""
    made = {}
    for method in RATES:
        task, _ = build(Job(name, steps, method, RATES[method], 0, options=frozen_pairs(options)))
        made[method] = (task, _prepared(method, task, steps), [task.batch(step) for step in range(TURN)])
    found: dict[str, list[float]] = {method: [] for method in made}
    for turn in range(-1, TURNS):
        for method, (task, prepared, batches) in made.items():
            used = time.process_time()
            for number in range(WARM if turn < 0 else TURN):
                for optimizer in prepared.optimizers:
                    optimizer.zero_grad()
                torch.autograd.backward(task.loss(task.model, batches[number % TURN]))
                prepared.before()
                for optimizer in prepared.optimizers:
                    optimizer.step()
            if turn >= 0:
                found[method].append(1e3 * (time.process_time() - used) / TURN)
    return found


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    rows = []
    print("task | method | CPU ms per step | ratio to AdamW [range] | steps in AdamW's time")
    for title, (name, steps, options) in TASKS.items():
        found = turns(name, steps, options)
        for method, times in found.items():
            ratios = sorted(a / b for a, b in zip(times, found["adamw"], strict=True))
            ratio = statistics.median(ratios)
            row = {"task": title, "method": method, "ms": statistics.median(times), "ratio": ratio}
            row |= {"ratio_range": [ratios[0], ratios[-1]], "steps": round(steps / ratio), "turns_ms": times}
            rows.append(row)
            text = f"{row['ms']:.1f} | {ratio:.3f} [{ratios[0]:.3f} to {ratios[-1]:.3f}] | {row['steps']}"
            print(f"{title} | {method} | {text}", flush=True)
    PLACE.write_text(json.dumps({**evidence.conditions(), "turn_steps": TURN, "rows": rows}, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
