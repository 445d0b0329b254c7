"""What a grid of runs says: each method's best cell, its scores on fresh seeds, and its curve over learning rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from .cells import Cell, Grid
from .methods import METHODS
from .registry import workload
from .sweep import Row
from .train import smoothed

__all__ = ["fresh_cells", "median_score", "reference_method", "summarise"]


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
    best = {name: _best(grid, name, held) for name in grid.methods}
    return [Cell(seed, name, *best[name]) for seed in range(grid.fresh_seeds) for name in grid.methods]


Key = tuple[float | None, float]  # strength and learning rate


def _choosing_rows(grid: Grid, method: str, rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """A method's rows of the seeds that choose, by strength and learning rate."""
    asked = {cell for cell in grid.cells() if cell.method == method}
    cells: dict[Key, list[Row]] = {}
    for row in rows:
        if Cell(row["seed"], row["method"], row["strength"], row["lr"]) in asked:
            cells.setdefault((row["strength"], row["lr"]), []).append(row)
    return cells


def _first_best(cells: dict[Key, list[Row]], *, higher: bool) -> Key:
    """The key of the best median; ties go to the first in the grid."""
    sign = 1 if higher else -1
    return max(cells, key=lambda key: sign * median_score(cells[key], higher_is_better=higher))


def _best(grid: Grid, method: str, rows: Iterable[Row]) -> Key:
    return _first_best(_choosing_rows(grid, method, rows), higher=workload(grid.workload).higher_is_better)


def reference_method(grid: Grid) -> str:
    """The method whose training loss at the end is the others' target: the global clip, else the nearest to it."""
    return next((name for name in ("clip", "adamw+clip+warmup") if name in grid.methods), grid.methods[0])


def summarise(grid: Grid, rows: list[Row]) -> list[dict[str, Any]]:
    """One entry a method: its best cell, that cell's scores on choosing and on fresh seeds, and its curve over rates.

    "curve" has for every learning rate the best strength there and its scores. "steps_to_target" counts steps until
    the running mean of the training loss is down to where `reference_method` ends with the same seed; the median over
    runs, None where most never get there.
    """
    higher = workload(grid.workload).higher_is_better
    best = {name: _best(grid, name, rows) for name in grid.methods}
    of_best = {
        name: [row for row in rows if row["method"] == name and (row["strength"], row["lr"]) == best[name]]
        for name in grid.methods
    }
    target_of_seed = {row["seed"]: _final_loss(row) for row in of_best[reference_method(grid)]}
    entries = []
    for name in grid.methods:
        cells = _choosing_rows(grid, name, rows)
        chosen_by = [row["seed"] for row in cells[best[name]]]
        fresh = [row for row in of_best[name] if row["seed"] not in chosen_by]
        shown = fresh or of_best[name]
        scaled = [row["scaled_share"] for row in shown if row["scaled_share"] is not None]
        worst = [row["worst"][0][0] for row in shown if row["worst"]]
        steps = statistics.median(_steps_to(row, target_of_seed.get(row["seed"])) for row in shown)
        entries.append({
            "method": name,
            "summary": METHODS[name].summary,
            "ours": METHODS[name].ours,
            "tuned": bool(METHODS[name].strengths),
            "strength": best[name][0],
            "lr": best[name][1],
            "choosing": _spread(cells[best[name]], higher),
            "fresh": _spread(fresh, higher) if fresh else None,
            "diverged": sum(row["diverged"] for row in shown),
            "runs": len(shown),
            "seconds": statistics.median(row["seconds"] for row in shown),
            "scaled_share": statistics.median(scaled) if scaled else None,
            "worst_bin": max(set(worst), key=worst.count) if worst else None,
            "steps_to_target": steps if math.isfinite(steps) else None,
            "curve": [_point(lr, cells, higher) for lr in grid.lrs_of(name)],
        })  # fmt: skip
    return entries


def _point(lr: float, cells: dict[Key, list[Row]], higher: bool) -> dict[str, Any]:
    key = _first_best({key: rows for key, rows in cells.items() if key[1] == lr}, higher=higher)
    return {"lr": lr, "strength": key[0], **_spread(cells[key], higher)}


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


POINTS = 5  # of the kept curve, whose mean is compared


def _final_loss(row: Row) -> float | None:
    """Where a run ends; None where it was lost, since then everything would be better at once."""
    means = smoothed([math.inf if loss is None else loss for loss in row["losses"]], POINTS)
    return means[-1] if means and math.isfinite(means[-1]) and not row["diverged"] else None


def _steps_to(row: Row, target: float | None) -> float:
    """Steps until the mean of `POINTS` neighbouring points of the kept curve is at most the target; inf: never."""
    if target is None or not row["losses"]:
        return math.inf
    losses = [math.inf if loss is None else loss for loss in row["losses"]]
    window, stride = min(POINTS, len(losses)), row["steps_run"] / len(losses)
    means = smoothed(losses, window)
    return next((round((at + window) * stride) for at, mean in enumerate(means) if mean <= target), math.inf)
