"""What one tensor of 3e38 leaves in Adam's moments behind the splitter, with and without a history beside it."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from benchmarks.faults.grid import BEHIND_ADAM, RAW, SEEDS
from benchmarks.faults.methods import METHODS, WITH_HISTORY
from benchmarks.faults.workloads import WORKLOADS
from gradsplit.lab.evidence import conditions

__all__ = ["main", "measure"]

AT = 100  # the faulty step
AFTER = (0, 10, 100)  # looks, in steps after it


def measure(workload: str, method: str, seed: int) -> dict[str, Any]:
    """Fill the gradient of the largest tensor with 3e38 at one step, and follow its moments.

    Returns:
        "limit_over_usual": 0.2 of a row's weights over its gradient before the fault, median over rows; "first" and
        "second": root mean square of the first moment, and of the root of the second, over those of the step before.
    """
    row = WORKLOADS[workload]
    task = row.build(seed)
    optimizer = row.optimizer(task)
    control = (METHODS | WITH_HISTORY)[method](task, optimizer)
    hit = max(task.model.parameters(), key=lambda p: p.numel())
    found: dict[str, Any] = {"workload": workload, "method": method, "seed": seed, "first": {}, "second": {}}
    before = (1.0, 1.0)
    for step in range(AT + max(AFTER) + 1):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step))
        torch.autograd.backward(loss)
        if step == AT:
            limit = 0.2 * hit.detach().norm(dim=1) / hit.grad.norm(dim=1)
            found["limit_over_usual"] = float(limit.median())
            before = _sizes(optimizer.state[hit])
            hit.grad.fill_(3e38)
        control.update(loss.detach())
        if step - AT in AFTER:
            first, second = _sizes(optimizer.state[hit])
            found["first"][step - AT], found["second"][step - AT] = first / before[0], second / before[1]
    return found


def _sizes(state: dict[str, torch.Tensor]) -> tuple[float, float]:
    return float(state["exp_avg"].square().mean().sqrt()), float(state["exp_avg_sq"].mean().sqrt())


def main(arguments: list[str]) -> None:
    """Measure, print medians over the seeds, and keep what was measured."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    methods = ("splitter", *WITH_HISTORY)
    rows = [measure(w, m, seed) for w in BEHIND_ADAM for m in methods for seed in range(SEEDS)]
    for workload in BEHIND_ADAM:
        for method in methods:
            ours = [row for row in rows if (row["workload"], row["method"]) == (workload, method)]
            said = [f"limit {statistics.median(row['limit_over_usual'] for row in ours):.0f} x usual"]
            for moment in ("first", "second"):
                said += [f"{moment} +{k}: {statistics.median(row[moment][k] for row in ours):.2f}" for k in AFTER]
            print(f"{workload}, {method}: {', '.join(said)}")
    place = RAW.with_name("faults-moments.json")
    place.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n", encoding="utf8")
