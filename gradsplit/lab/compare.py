"""A comparison: the grid swept, the best cell of each method chosen on some seeds and confirmed on others."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cells import Cell, Grid
from .evidence import conditions
from .registry import workload
from .summary import fresh_cells, reference_method, summarise
from .sweep import RawFile, Row, finite_or_none, sweep
from .task import Workload

__all__ = ["compare"]


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
        What `results.json` holds: "conditions", "grid", "workload", "summary" (one entry a method) and "cells"; None
        stands for a number that was not finite.
    """
    raw = RawFile(folder, grid)
    total = len(list(grid.cells())) + len(grid.methods) * grid.fresh_seeds
    wanted = list(grid.cells())
    for stage in ("choose", "confirm"):
        if stage == "confirm":
            wanted += fresh_cells(grid, raw.rows.values())
        done = sum(cell in raw.rows for cell in wanted)
        for cell, row in sweep(grid, wanted, raw, jobs=jobs):
            done += 1
            on_cell(cell, row, done, total)
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
    }
    plain: dict[str, Any] = finite_or_none(results)
    (folder / "results.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf8")
    _write_csv(folder / "cells.csv", rows)
    return plain


def _described(row: Workload) -> dict[str, Any]:
    return {"name": row.name, "title": row.title, "metric": row.metric, "higher_is_better": row.higher_is_better,
            "data_note": row.data_note}  # fmt: skip


def _order(grid: Grid) -> Callable[[Cell], tuple[Any, ...]]:
    place = {name: at for at, name in enumerate(grid.methods)}
    return lambda cell: (place[cell.method], cell.lr, -1.0 if cell.strength is None else cell.strength, cell.seed)


def _write_csv(path: Path, rows: list[Row]) -> None:
    """The rows without their loss curves; metrics and the worst bin as columns of their own."""
    metrics = sorted({name for row in rows for name in row["metrics"]})
    plain = [key for key in rows[0] if key not in ("metrics", "losses", "worst")] if rows else []
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, "worst_bin", *metrics])
        for row in rows:
            worst = row["worst"][0][0] if row["worst"] else ""
            writer.writerow([*(row[key] for key in plain), worst, *(row["metrics"].get(name) for name in metrics)])
