"""Whether a guard with its defaults leaves healthy runs alone, and what becomes of runs whose rate is too high.

Healthy: each workload at a rate that trains it; counted are rollbacks (false alarms) and bad steps. Hot: rates at which
the loss becomes nan or stays far above where it was; scored are the same runs with and without a guard.

Run: python benchmarks/guard_runs.py --out benchmarks/results/guard_runs.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
import platform
from pathlib import Path
from typing import Any

import torch

import gradsplit as gs
from gradsplit.lab.optimizers import Settings, make_optimizer
from gradsplit.lab.registry import REGISTRY

HEALTHY = {
    "gpt": ("adamw", 3e-3),
    "lstm": ("adamw", 3e-3),
    "detection": ("adamw", 3e-3),
    "temporal-order": ("sgd", 0.01),
}
HOT = {"gpt": ("sgdm", 3.0), "detection": ("sgdm", 0.1), "temporal-order": ("sgdm", 1.0)}


def trained(name: str, optimizer_name: str, lr: float, seed: int, steps: int, guarded: bool) -> dict[str, Any]:
    """Train a workload and say how it went."""
    workload = REGISTRY[name]
    task = workload.build(seed=seed)
    optimizer = make_optimizer(optimizer_name, task.model, lr, Settings(steps, optimizer_name))
    guard = gs.Guard(task.model, optimizer) if guarded else None
    torch.manual_seed(seed)
    bad, stopped = 0, False
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step))
        loss.backward()
        optimizer.step()
        if guard is not None:
            try:
                guard.step(loss)
            except gs.DivergenceError:
                stopped = True
                break
            bad += guard._divergence.bad > 0
    score = task.evaluate(task.model)[workload.metric]
    return {
        "workload": name,
        "optimizer": optimizer_name,
        "lr": lr,
        "seed": seed,
        "guarded": guarded,
        "score": score if math.isfinite(score) else None,
        "rollbacks": 0 if guard is None else guard.num_rollbacks,
        "bad_steps": bad,
        "stopped": stopped,
        "actions": [] if guard is None else [str(action) for action in guard.actions],
    }


def main() -> None:
    """Train all, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("gradsplit").setLevel(logging.ERROR)
    runs = []
    for kind, table in (("healthy", HEALTHY), ("hot", HOT)):
        for name, (optimizer, lr) in table.items():
            for seed in range(asked.seeds):
                for guarded in (True,) if kind == "healthy" else (False, True):
                    run = {"kind": kind, **trained(name, optimizer, lr, seed, asked.steps, guarded)}
                    runs.append(run)
                    shown = {key: value for key, value in run.items() if key != "actions"}
                    print(json.dumps(shown), flush=True)
                    if asked.out:
                        about = {
                            "command": f"python benchmarks/guard_runs.py --steps {asked.steps} --seeds {asked.seeds}",
                            "date": datetime.date.today().isoformat(),
                            "machine": f"{platform.machine()}, 1 thread of 2 shared cores, torch {torch.__version__}",
                        }
                        asked.out.write_text(
                            json.dumps({"about": about, "runs": runs}, indent=1) + "\n", encoding="utf8"
                        )


if __name__ == "__main__":
    main()
