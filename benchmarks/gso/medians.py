"""What the collective rule of GSO sees in clean runs, and which scaled batches it finds in them.

    python benchmarks/gso.py medians          # 5 minutes; the norms of a run are kept, so a restart goes on

Trains each task with the reference and without the rule, keeps the norm of every row at every step, and replays both
rules over them: as they are, and with whole batches scaled by 1,000. Writes benchmarks/results/gso/medians.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.gso.plan import cells
from benchmarks.gso.reference import Collective, GSOReference, rows_of
from benchmarks.gso.tasks import CACHE, build, evidence, faulty, tasks

OUT = Path(__file__).parents[1] / "results" / "gso" / "medians.json"
RUNS: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    *(("gpt", 500, seed, {}) for seed in (0, 1, 2)),
    ("lstm", 500, 0, {}),
    ("mixer", 600, 0, {}),
    *(("detection", 500, seed, {}) for seed in (0, 1)),
    ("detection", 500, 0, {"healthy": True}),
    ("plain-stack", 350, 0, {}),
    ("temporal-order", 300, 0, {}),
    ("residual-stack", 900, 0, {}),
    ("residual-stack", 900, 0, {"gain": 0.5}),
)
SPOILED: tuple[tuple[float, int], ...] = ((0.05, 0), (0.2, 0), (0.35, 0), (0.05, 3))  # rate, number of first steps


def recorded(name: str, steps: int, seed: int, options: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """Norms (steps, rows) float32 of one clean run, and how many rows each tensor has."""
    suffix = "".join(f"-{key}-{value}" for key, value in options.items())
    path = CACHE / f"norms-{name}-{steps}-{seed}{suffix}.pt"
    if path.is_file():
        norms, sizes = torch.load(path)
        return norms, sizes
    task, _ = build(cells(name, steps, "reference", 0.03, [seed], options=options)[0])
    optimizer = GSOReference(task.model)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    parameters = list(task.model.parameters())
    rows = []
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(task.model, task.batch(step)).backward()
        rows.append(torch.cat([rows_of(p.grad).double().norm(dim=1) for p in parameters]).float())
        optimizer.step()
        schedule.step()
    norms, sizes = torch.stack(rows), [len(rows_of(p)) for p in parameters]
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save((norms, sizes), path)
    return norms, sizes


def replay(norms: Tensor, sizes: list[int], **options: Any) -> Collective:
    """The rule after it has seen a run whose gradients it does not change."""
    rule = Collective([], **options)
    for norm in norms.double():
        rule.decide(list(norm.split(sizes)))
    return rule


def main(asked: Sequence[str]) -> None:
    """Replay all runs and write the file."""
    argparse.ArgumentParser(prog="gso.py medians", description=__doc__.splitlines()[0]).parse_args(asked)
    torch.set_num_threads(1)
    rows = []
    for name, steps, seed, options in RUNS:
        norms, sizes = recorded(name, steps, seed, options)
        row: dict[str, Any] = {"task": name, "steps": steps, "seed": seed, "options": options}
        for rule, limit in (("slow", 3.0), ("recent", 5.0)):
            for median in ("exact", "tensors", "sample"):
                seen = replay(norms, sizes, rule=rule, median=median, limit=limit)
                free = replay(norms, sizes, rule=rule, median=median, limit=float("inf"))
                row[f"{rule} {median}"] = {"fired": len(seen.fired), "largest": float(f"{max(free.medians):.3g}")}
        for rate, first in SPOILED:
            sources = [tasks.generator(seed, 77, step) for step in range(steps)]
            fault = {"rate": rate, "first": first}
            bad = [step for step, source in enumerate(sources) if faulty(fault, step, source)]
            spoiled = norms.clone()
            spoiled[bad] *= 1e3
            fired = replay(spoiled, sizes).fired
            row[f"scaled at {rate:g}" + (f" and in the first {first}" if first else "")] = {
                "scaled": len(bad),
                "missed": len(set(bad) - set(fired)),
                "false": len(set(fired) - set(bad)),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    OUT.write_text(json.dumps({"conditions": evidence.conditions(), "rows": rows}, indent=1) + "\n", encoding="utf8")
