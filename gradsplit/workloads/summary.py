"""What a grid of runs says: each method's best cell, its scores on fresh seeds, and its curve over learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from gradsplit.workloads.cells import Cell, Grid
from gradsplit.workloads.methods import METHODS
from gradsplit.workloads.registry import workload
from gradsplit.workloads.sweep import Row
from gradsplit.workloads.train import smoothed

__all__ = ["fresh_cells", "median_score", "summarise"]


def median_score(rows: Iterable[Row], *, higher_is_better: bool) -> float:
    """Median of the scores; a run without a finite score counts as the worst possible.

    >>> median_score([{"score": 1.0}, {"score": None}, {"score": 3.0}], higher_is_better=False)
    3.0
    """
    worst = float("-inf") if higher_is_better else float("inf")
    scores = [worst if row["score"] is None else row["score"] for row in rows]
    return statistics.median(scores) if scores else worst


def fresh_cells(grid: Grid, rows: Iterable[Row]) -> list[Cell]:
    """The best cell of each method on seeds that did not choose it."""
    held = list(rows)
    best = {name: _best(grid, [row for row in held if row["method"] == name]) for name in grid.methods}
    return [Cell(seed, name, *best[name]) for seed in range(grid.fresh_seeds) for name in grid.methods]


def _choosing(grid: Grid) -> set[int]:
    return {cell.seed for cell in grid.cells()}


def _by_cell(grid: Grid, rows: list[Row]) -> dict[tuple[float | None, float], list[Row]]:
    """The rows of the seeds that choose, by (strength, learning rate)."""
    cells: dict[tuple[float | None, float], list[Row]] = {}
    asked = set(grid.cells())
    for row in rows:
        if Cell(row["seed"], row["method"], row["strength"], row["lr"]) in asked:
            cells.setdefault((row["strength"], row["lr"]), []).append(row)
    return cells


def _best(grid: Grid, rows: list[Row]) -> tuple[float | None, float]:
    """(strength, learning rate) of the best median score; ties go to the first in the grid."""
    higher = workload(grid.workload).higher_is_better
    cells = _by_cell(grid, rows)
    sign = 1 if higher else -1
    return max(cells, key=lambda key: sign * median_score(cells[key], higher_is_better=higher))


def summarise(grid: Grid, rows: list[Row]) -> list[dict[str, Any]]:
    """One entry a method: its best cell, that cell's scores on choosing and on fresh seeds, and its curve over rates.

    "curve" has for every learning rate the best strength there and its scores. "steps_to_target" counts steps until
    the running mean of the training loss is down to where the tuned global clip ends (else the first method); None:
    never.
    """
    higher = workload(grid.workload).higher_is_better
    choosing = _choosing(grid)
    best = {name: _best(grid, [row for row in rows if row["method"] == name]) for name in grid.methods}

    def of_best(name: str) -> list[Row]:
        return [row for row in rows if row["method"] == name and (row["strength"], row["lr"]) == best[name]]

    reference = "clip" if "clip" in grid.methods else grid.methods[0]
    ends = [_final_loss(row) for row in of_best(reference)]
    target = statistics.median(ends) if ends else None
    entries = []
    for name in grid.methods:
        cells = _by_cell(grid, [row for row in rows if row["method"] == name])
        curve = []
        for lr in grid.lrs_of(name):
            here = {key: value for key, value in cells.items() if key[1] == lr}
            sign = 1 if higher else -1
            key = max(here, key=lambda key: sign * median_score(here[key], higher_is_better=higher))
            curve.append({"lr": lr, "strength": key[0], **_spread(here[key], higher)})
        fresh = [row for row in of_best(name) if row["seed"] not in choosing]
        shown = fresh or of_best(name)
        scaled = [row["scaled_share"] for row in shown if row["scaled_share"] is not None]
        worst = [row["worst"][0][0] for row in shown if row["worst"]]
        reached = [_steps_to(row, target) for row in shown]
        steps = [step for step in reached if step is not None]
        entries.append({
            "method": name,
            "summary": METHODS[name].summary,
            "ours": METHODS[name].ours,
            "tuned": bool(METHODS[name].strengths),
            "strength": best[name][0],
            "lr": best[name][1],
            "choosing": _spread([row for row in of_best(name) if row["seed"] in choosing], higher),
            "fresh": _spread(fresh, higher) if fresh else None,
            "diverged": sum(row["diverged"] for row in shown),
            "runs": len(shown),
            "seconds": statistics.median(row["seconds"] for row in shown),
            "scaled_share": statistics.median(scaled) if scaled else None,
            "worst_bin": max(set(worst), key=worst.count) if worst else None,
            "steps_to_target": statistics.median(steps) if steps and len(steps) == len(reached) else None,
            "curve": curve,
        })  # fmt: skip
    return entries


def _spread(rows: list[Row], higher: bool) -> dict[str, Any]:
    scores = [row["score"] for row in rows]
    finite = [score for score in scores if score is not None]
    return {
        "median": median_score(rows, higher_is_better=higher),
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "n": len(scores),
        "lost": len(scores) - len(finite),
    }


def _final_loss(row: Row) -> float:
    tail = [loss for loss in row["losses"][-5:] if loss is not None]
    return statistics.fmean(tail) if len(tail) == len(row["losses"][-5:]) and not row["diverged"] else float("inf")


def _steps_to(row: Row, target: float | None) -> float | None:
    """Steps until the mean of five neighbouring points of the kept curve is at most the target."""
    if target is None or not row["losses"]:
        return None
    losses = [float("inf") if loss is None else loss for loss in row["losses"]]
    means = smoothed(losses, 5)
    window = min(5, len(losses))
    stride = row["steps_run"] / len(losses)
    return next((round((at + window) * stride) for at, mean in enumerate(means) if mean <= target), None)
