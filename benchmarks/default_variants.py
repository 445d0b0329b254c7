"""Could another untuned rule serve the exploding detector and the hot residual stack at once? Variants of the default.

    OMP_NUM_THREADS=1 python benchmarks/default_variants.py         # 6 minutes on one core; goes on where it stopped

Writes benchmarks/results/default-variants.json: one row a run, and the median of each variant's cells; the
default's rows are those of its own sweeps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import gradsplit as gs
from gradsplit.lab.controls import Split, Tally
from gradsplit.lab.evidence import conditions
from gradsplit.lab.methods import Method
from gradsplit.lab.optimizers import Settings
from gradsplit.lab.registry import workload
from gradsplit.lab.train import train
from gradsplit.plan import Boxes, Layout, Plan, xsp

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "default-variants.json"
OF_DEFAULT = {"detection": "detection-default", "residual-stack": "residual-default"}


@dataclass(frozen=True)
class LongVectors(gs.RelativeStep):
    """The default, but a vector too counts as at least ``length`` long."""

    def least(self, xp: Any, numel: Any, num_rows: Any) -> Any:
        """See `RelativeStep.least`; vectors are the bins without rows."""
        return xp.where(num_rows == 0, self.length + 0.0 * numel, super().least(xp, numel, num_rows))


def joined(layout: Layout) -> Plan:
    """Rows of matrices, each with its entry of the same module's bias: one limit and one scale for [W_i, b_i]."""
    base = xsp(layout)
    boxes = base.boxes
    first_bin = dict(zip(layout.names, boxes.bin_K[boxes.slices_T(len(layout))[:-1]].tolist(), strict=True))
    columns = []
    for t, name in enumerate(layout.names):
        weight = name.removesuffix("bias") + "weight"
        if name.endswith("bias") and len(layout.shapes[layout.names.index(weight)] if weight in first_bin else ()) > 1:
            size = layout.cols[t]
            at = np.arange(size)
            columns.append((at * 0 + t, at * 0, at * 0 + 1, at, at + 1, first_bin[weight] + at))
        else:
            part = slice(*boxes.slices_T(len(layout))[t : t + 2])
            columns.append(tuple(column[part] for column in vars(boxes).values()))
    merged = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    merged[5] = np.unique(merged[5], return_inverse=True)[1]  # numbered without gaps
    return Plan(layout, Boxes.from_columns(*merged))


VARIANTS: dict[str, tuple[Callable[[Layout], Plan], gs.RelativeStep]] = {
    "5 % a step": (xsp, gs.RelativeStep(0.05, length=1.0)),
    "vectors 1 long": (xsp, LongVectors(0.03, length=1.0)),
    "bias joined to its row": (joined, gs.RelativeStep(0.03, length=1.0)),
    "bias joined to its row, 5 % a step": (joined, gs.RelativeStep(0.05, length=1.0)),
}
CHOOSING, FRESH = (1000, 1001), (0, 1, 2, 3, 4)
JOBS = [
    *itertools.product(VARIANTS, ["detection"], [0.3], CHOOSING),
    *itertools.product(["bias joined to its row"], ["detection"], [0.3], FRESH),
    *itertools.product(list(VARIANTS)[:3], ["residual-stack"], [0.1, 1.0], CHOOSING[:1]),
]


def run(variant: str, name: str, lr: float, seed: int) -> dict[str, Any]:
    """Train once and return one row of raw results."""
    plan, budget = VARIANTS[variant]
    row = workload(name)
    task = row.build(seed=seed)
    method = Method(variant, variant, lambda task, optimizer, *_: _Variant(task, optimizer, plan, budget))
    result = train(task, method, lr=lr, settings=Settings(row.steps, row.optimizer))
    return {
        "variant": variant,
        "workload": name,
        "lr": lr,
        "seed": seed,
        "score": float(result.metrics[row.metric]),
        "scaled_share": result.scaled_share,
        "worst": result.worst[:3],
    }


class _Variant(Split):
    """A splitter with any plan and budget, counted as the registered methods are."""

    def __init__(self, task: Any, optimizer: Any, plan: Callable[[Layout], Plan], budget: gs.RelativeStep) -> None:
        self.splitter = gs.GradientSplitter(task.model, plan, budget, optimizer=optimizer)
        bins = self.splitter.plan.bins
        self.tally = Tally(len(bins), lambda b: bins[b].name)
        self.splitter.sinks.append(self.tally.add_record)


def of_default() -> list[dict[str, Any]]:
    """The default's own rows, from the sweeps that docs/results/splitter.md prints."""
    rows = []
    for name, folder in OF_DEFAULT.items():
        cells = json.loads((RESULTS / folder / "results.json").read_text(encoding="utf8"))["cells"]
        wanted = {(lr, seed) for _, workload_name, lr, seed in JOBS if workload_name == name}
        rows += [
            {"variant": "default", "workload": name, **{key: cell[key] for key in ("lr", "seed", "score")}}
            for cell in cells
            if cell["method"] == "default" and (cell["lr"], cell["seed"]) in wanted
        ]
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median score of each variant's cells, choosing and fresh seeds apart."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = (row["variant"], row["workload"], row["lr"], "fresh" if row["seed"] in FRESH else "choosing")
        found.setdefault(key, []).append(row["score"])
    names = ("variant", "workload", "lr", "seeds")
    return [
        {**dict(zip(names, key, strict=True)), "n": len(scores), "median": statistics.median(scores)}
        for key, scores in found.items()
    ]


def main() -> None:
    """Run what the file does not hold yet; save after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    rows = json.loads(out.read_text(encoding="utf8"))["rows"] if out.is_file() else of_default()
    done = {(row["variant"], row["workload"], row["lr"], row["seed"]) for row in rows}
    for job in JOBS:
        if job not in done:
            rows.append(run(*job))
            print(rows[-1], flush=True)
            data = {"conditions": conditions(), "summary": summary(rows), "rows": rows}
            out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
