"""What a training step of `gradsplit.GSO` costs beside other optimizers, and the steps that equal seconds buy.

    python benchmarks/gso.py seconds --part batches     # beside fused AdamW with a clip, at four batches: seconds.json
    python benchmarks/gso.py seconds --part methods     # beside all others on the text tasks: equal.json

All methods take turns in one process, four steps at a time, so that a busy moment of the machine meets all of them.
One thread, and processor time of the process, which on a free core is wall time. A ratio is the median, with the range,
over blocks of five turns: twenty steps, in which SOAP renews its bases twice. "steps" is how many steps of a method fit
into the time of AdamW's whole run. AdamW is the fused one. Both files lie in benchmarks/results/gso.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.gso.plan import Job, frozen_pairs
from benchmarks.gso.runs import METHODS, RESULTS, Prepared
from benchmarks.gso.tasks import build, evidence, tasks
from gradsplit import GSO
from gradsplit.lab import workload

# ---- fused AdamW and GSO at four batches

BATCHES, TURNS, TURN, WARM, BLOCK = (8, 16, 32, 64), 30, 4, 8, 5


def blocks(times: Sequence[float]) -> list[float]:
    """The mean of each block of turns."""
    return [statistics.fmean(times[start : start + BLOCK]) for start in range(0, len(times), BLOCK)]


def ratio_of(times: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The median and the range of the ratios block by block.

    >>> ratio_of([2.0] * 5 + [3.0] * 5, [1.0] * 10)
    {'ratio': 2.5, 'ratio_range': [2.0, 3.0]}
    """
    ratios = [a / b for a, b in zip(blocks(times), blocks(others), strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def _optimizer(name: str, task: tasks.Task) -> Callable[[], Any]:
    parameters = list(task.model.parameters())
    if name == "gso":
        return GSO(task.model).step
    adamw = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()

    return step


def batch_turns(batch: int) -> dict[str, list[dict[str, float]]]:
    """Milliseconds per training step and per optimizer step, one entry per turn, for both."""
    made = {}
    for name in ("adamw", "gso"):
        task = workload("gpt").build(0, batch=batch)
        made[name] = (task, _optimizer(name, task), [task.batch(step) for step in range(TURN)])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for turn in range(-1, TURNS):
        for name, (task, step, batches) in made.items():
            whole, alone = time.process_time(), 0.0
            for number in range(WARM if turn < 0 else TURN):
                task.model.zero_grad()
                task.loss(task.model, batches[number % TURN]).backward()
                before = time.process_time()
                step()
                alone += time.process_time() - before
            if turn >= 0:
                whole = time.process_time() - whole
                found[name].append({"whole": 1e3 * whole / TURN, "step": 1e3 * alone / TURN})
    return found


def _batch_row(batch: int) -> dict[str, Any]:
    found = batch_turns(batch)
    middle = {
        name: {part: statistics.median(blocks([t[part] for t in times])) for part in ("whole", "step")}
        for name, times in found.items()
    }
    whole = {name: [turn["whole"] for turn in times] for name, times in found.items()}
    return {
        "batch": batch,
        "median_ms": middle,
        **ratio_of(whole["gso"], whole["adamw"]),
        "turns": found,
    }


def batches() -> list[dict[str, Any]]:
    """One row per batch size, printed as it is made."""
    rows = []
    print("batch | AdamW + clip, ms per step (optimizer) | GSO, ms per step (optimizer) | ratio [range]")
    for batch in BATCHES:
        found = _batch_row(batch)
        rows.append(found)
        texts = [f"{m['whole']:.1f} ({m['step']:.2f})" for m in found["median_ms"].values()]
        low, high = found["ratio_range"]
        print(f"{batch} | {texts[0]} | {texts[1]} | {found['ratio']:.3f} [{low:.3f} to {high:.3f}]", flush=True)
    return rows


# ---- all methods on the text tasks

TEXTS: dict[str, tuple[str, int, dict[str, Any]]] = {
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


def method_turns(name: str, steps: int, options: dict[str, Any]) -> dict[str, list[float]]:
    """CPU milliseconds per training step of each method, one entry per turn."""
    made = {}
    for method in RATES:
        task, _ = build(Job(name, steps, method, RATES[method], 0, options=frozen_pairs(options)))
        made[method] = (task, _prepared(method, task, steps), [task.batch(step) for step in range(TURN)])
    found: dict[str, list[float]] = {method: [] for method in made}
    for turn in range(-1, TURNS):
        for method, (task, prepared, some) in made.items():
            used = time.process_time()
            for number in range(WARM if turn < 0 else TURN):
                for optimizer in prepared.optimizers:
                    optimizer.zero_grad()
                torch.autograd.backward(task.loss(task.model, some[number % TURN]))
                prepared.before()
                for optimizer in prepared.optimizers:
                    optimizer.step()
            if turn >= 0:
                found[method].append(1e3 * (time.process_time() - used) / TURN)
    return found


def methods() -> list[dict[str, Any]]:
    """One row per task and method, printed as it is made."""
    rows = []
    print("task | method | CPU ms per step | ratio to AdamW [range] | steps in AdamW's time")
    for title, (name, steps, options) in TEXTS.items():
        found = method_turns(name, steps, options)
        for method, times in found.items():
            row = {"task": title, "method": method, "ms": statistics.median(blocks(times))}
            row |= ratio_of(times, found["adamw"])
            ratio, (low, high) = row["ratio"], row["ratio_range"]
            row |= {"steps": round(steps / ratio), "turns_ms": times}
            rows.append(row)
            text = f"{row['ms']:.1f} | {ratio:.3f} [{low:.3f} to {high:.3f}] | {row['steps']}"
            print(f"{title} | {method} | {text}", flush=True)
    return rows


PARTS = {"batches": (batches, "seconds.json", TURN), "methods": (methods, "equal.json", TURN)}


def main(asked: Sequence[str]) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="gso.py seconds", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=sorted(PARTS), action="append", help="default: both")
    torch.set_num_threads(1)
    for part in parser.parse_args(asked).part or PARTS:
        measure, name, turn = PARTS[part]
        made = {**evidence.conditions(), "turn_steps": turn, "block_turns": BLOCK, "rows": measure()}
        (RESULTS / name).write_text(json.dumps(made, indent=1) + "\n", "utf8")
