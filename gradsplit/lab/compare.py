"""A comparison: the grid swept, the best cell of each method chosen on some seeds and confirmed on others.

The summary gives for each method its best cell, that cell's scores on fresh seeds, and its curve over learning rates.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .cells import Cell, Grid
from .evidence import conditions
from .methods import METHODS
from .registry import workload
from .sweep import RawFile, Row, finite_or_none, sweep, write_whole
from .task import Workload
from .train import smoothed

__all__ = ["compare", "fresh_cells", "median_score", "reference_method", "summarise"]


def compare(
    grid: Grid,
    folder: Path,
    *,
    jobs: int = 2,
    on_cell: Callable[[Cell, Row, int, int], None] = lambda cell, row, done, total: None,
) -> dict[str, Any]:
    """Sweep a grid and write raw results and summary into a folder.

    Args:
        grid: what to run.
        folder: holds `cells.jsonl` (appended to), `cells.csv` and `results.json`.
        jobs: worker processes; 0: none.
        on_cell: called with each finished run, the number of finished ones and of all.

    Returns:
        What `results.json` holds: "conditions", "grid", "workload", "summary" (one entry per method), "cells" and
        "failed" (a run that did not end, and why); None stands for a number that was not finite. A method without one
        finished run has no entry.

    Raises:
        MissingDataError: the workload's data is not installed.
        RuntimeError: no run ended; the text has the first reason.
        OSError: the disk took no more; the text says what is kept.
    """
    failed: dict[Cell, str] = {}
    raw = RawFile(folder, grid)
    asked, wanted = grid, list(grid.cells())
    total = len(wanted) + len(grid.methods) * grid.fresh_seeds
    for stage in ("choose", "confirm"):
        if stage == "confirm":
            grid = _finished(asked, raw, failed)
            wanted = [cell for cell in wanted if cell in raw.rows]
            wanted += fresh_cells(grid, raw.rows.values())
        done = sum(cell in raw.rows for cell in wanted)
        for cell in sweep(grid, wanted, raw, jobs=jobs, on_failure=failed.__setitem__):
            done += 1
            on_cell(cell, raw.rows[cell], done, total)
    raw.check_written()
    wanted = [cell for cell in wanted if cell in raw.rows]
    rows = [raw.rows[cell] for cell in sorted(wanted, key=_order(grid))]
    results = {
        "conditions": conditions(),
        "grid": {
            **grid.what_is_trained(),
            "methods": list(grid.methods),
            "lrs": list(grid.lrs),
            "strengths": {name: list(grid.strengths_of(name)) for name in grid.methods},
            "seeds": grid.seeds,
            "fresh_seeds": grid.fresh_seeds,
        },
        "workload": _described(workload(grid.workload)),
        "target_method": reference_method(grid),
        "summary": summarise(grid, rows),
        "cells": rows,
        "failed": [{**asdict(cell), "why": why} for cell, why in failed.items()],
    }
    plain: dict[str, Any] = finite_or_none(results)
    write_whole(folder / "results.json", json.dumps(plain, indent=1) + "\n")
    _write_csv(folder / "cells.csv", rows)
    return plain


def _finished(grid: Grid, raw: RawFile, failed: Mapping[Cell, str]) -> Grid:
    """The grid without the methods of which no run ended."""
    ended = {cell.method for cell in grid.cells() if cell in raw.rows}
    if not ended:
        raise RuntimeError(
            f"compare({grid.workload!r}): expected a run that ends, got none; the first: {next(iter(failed.values()))}"
        )
    return replace(grid, methods=tuple(name for name in grid.methods if name in ended))


def _described(row: Workload) -> dict[str, Any]:
    return {"name": row.name, "title": row.title, "metric": row.metric, "higher_is_better": row.higher_is_better,
            "data_note": row.data_note}  # fmt: skip


def _order(grid: Grid) -> Callable[[Cell], tuple[Any, ...]]:
    place = {name: at for at, name in enumerate(grid.methods)}
    return lambda cell: (place[cell.method], cell.lr, -1.0 if cell.strength is None else cell.strength, cell.seed)


def _write_csv(path: Path, rows: list[Row]) -> None:
    """The rows without their loss curves; metrics and the worst bin as columns of their own."""
    metrics = sorted({name for row in rows for name in row["metrics"]})
    names = dict.fromkeys(key for row in rows for key in row)
    plain = [key for key in names if key not in ("metrics", "losses", "worst")]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow([*plain, "worst_bin", *metrics])
    for row in rows:
        worst = row["worst"][0][0] if row["worst"] else ""
        writer.writerow([*(row.get(key) for key in plain), worst, *(row["metrics"].get(name) for name in metrics)])
    write_whole(path, file.getvalue())


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
    """One entry per method: its best cell, that cell's scores on choosing and on fresh seeds, and its curve over rates.

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
            "cpu_ms_a_step": _median_of(shown, "cpu_ms_a_step"),
            "state_per_weight": _median_of(shown, "state_per_weight"),
            "usual_lr": METHODS[name].usual_lr,
            "scaled_share": statistics.median(scaled) if scaled else None,
            "worst_bin": max(set(worst), key=worst.count) if worst else None,
            "steps_to_target": steps if math.isfinite(steps) else None,
            "curve": [_point(lr, cells, higher) for lr in grid.lrs_of(name) if any(key[1] == lr for key in cells)],
        })  # fmt: skip
    return entries


def _median_of(rows: list[Row], key: str) -> float | None:
    """The median over the rows that have it: files of earlier versions do not."""
    held = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(held) if held else None


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
