"""What a step costs: all methods of a row in one process, ten steps of each in turn, processor time.

Turns make the comparison fair on a machine that others use too: what slows one method slows the next one as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.proof import plan, store
from gradsplit.lab import evidence, workload
from gradsplit.lab.methods import METHODS, Arrangement, arrange
from gradsplit.lab.optimizers import Settings, state_per_weight
from gradsplit.lab.task import MissingDataError, Task

__all__ = ["main"]

ROUNDS, STRETCH = 9, 10  # SOAP renews its rotation every ten steps
ROWS = (*plan.CHEAP, "adapters", "experts", "photographs")


def measure(name: str) -> dict[str, Any]:
    """Method -> milliseconds per step in each round, and bytes of state per byte of weights."""
    case, arrangements = plan.CASES[name], {}
    for method in plan.RATES:
        task = workload(case.workload).build(seed=plan.CHOOSING, **case.options)
        settings = Settings((ROUNDS + 2) * STRETCH, "adamw", schedule="linear")
        arrangement = arrange(METHODS[method], task, plan.RATES[method][0], None, settings)
        arrangement.mode(training=True)
        arrangements[method] = (task, arrangement)
    taken: dict[str, list[float]] = {method: [] for method in arrangements}
    for turn in range(ROUNDS + 2):
        for method, (task, arrangement) in arrangements.items():
            seconds = _stretch(task, arrangement, turn * STRETCH)
            if turn >= 2:  # the first steps compile and allocate
                taken[method].append(round(1e3 * seconds / STRETCH, 4))
    return {
        method: {
            "ms": times,
            "over_adamw": _ratio(times, taken["adamw+clip1+warmup"]),
            "state_per_weight": round(
                state_per_weight(arrangements[method][1].optimizer, arrangements[method][0].model), 3
            ),
        }
        for method, times in taken.items()
    }


def _ratio(times: list[float], base: list[float]) -> float:
    return round(statistics.median(mine / other for mine, other in zip(times, base, strict=True)), 4)


def _stretch(task: Task, arrangement: Arrangement, first: int) -> float:
    begun = time.process_time()
    for step in range(first, first + STRETCH):
        arrangement.optimizer.zero_grad()
        torch.autograd.backward(task.loss(task.model, task.batch(step)))
        arrangement.update()
    return time.process_time() - begun


def main(asked_for: Sequence[str]) -> None:
    """Measure the rows that are asked for, and keep those that were measured before."""
    parser = argparse.ArgumentParser(prog="proof.py costs", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="names of rows, comma-separated")
    names = parser.parse_args(asked_for).rows.split(",")
    torch.set_num_threads(1)
    held = json.loads(store.COSTS.read_text(encoding="utf8")) if store.COSTS.is_file() else {"rows": {}}
    held["conditions"] = evidence.conditions()
    for name in names:
        try:
            held["rows"][name] = measure(name)
        except MissingDataError as error:
            print(f"left out: {name}: {error}", flush=True)
            continue
        ratios = ", ".join(f"{method} {found['over_adamw']:.2f}" for method, found in held["rows"][name].items())
        print(f"{name}: {ratios}", flush=True)
        store.COSTS.write_text(json.dumps(held, indent=1) + "\n", encoding="utf8")
