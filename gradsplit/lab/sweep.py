"""Many runs in worker processes, one thread each; a finished one is written at once, so that a sweep can go on.

`cells.jsonl` holds one finished run per line. Starting the same sweep again skips what is there; a larger grid adds to
it; another workload or another schedule is refused.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from .cells import Cell, Grid, run_cell

__all__ = ["RawFile", "finite_or_none", "one_thread", "sweep"]

Row = dict[str, Any]


def one_thread() -> None:
    """Begin a worker: one thread, since more would only fight for the same cores; Ctrl-C ends it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def worker_pool(jobs: int, initializer: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """Processes that start anew, since a forked torch may hang; they must know the thread count before importing it."""
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=initializer, initargs=arguments)


def finite_or_none(value: Any) -> Any:
    """The same with None for every number that JSON cannot hold.

    >>> finite_or_none({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RawFile:
    """The finished runs of one sweep, a line each.

    Args:
        folder: made if it does not exist.
        grid: what is trained; its first line is compared with that of the file.

    Raises:
        ValueError: the folder holds runs of something else.
    """

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.path = folder / "cells.jsonl"
        self.rows: dict[Cell, Row] = {}
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(grid.what_is_trained()))
        if not self.path.exists():
            self._write({"what_is_trained": wanted})
            return
        first, *lines = self.path.read_text(encoding="utf8").splitlines()
        held = json.loads(first)["what_is_trained"]
        if held != wanted:
            differing = [key for key in wanted if held.get(key) != wanted[key]]
            raise ValueError(
                f"compare(out={str(folder)!r}): expected a folder of runs with {_pairs(wanted, differing)}, got "
                f"one with {_pairs(held, differing)}. Choose another folder, or remove this one."
            )
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut off when a sweep was ended; its run is done again
                continue
            self.rows[cell_of(row)] = row
        if len(self.rows) < len(lines):  # or the next row would be joined to what is left of the line
            kept = [json.dumps({"what_is_trained": held}), *map(json.dumps, self.rows.values())]
            self.path.write_text("\n".join(kept) + "\n", encoding="utf8")

    def add(self, cell: Cell, row: Row) -> None:
        """Write one finished run."""
        self.rows[cell] = json.loads(json.dumps(finite_or_none(row)))
        self._write(self.rows[cell])

    def _write(self, row: Row) -> None:
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def cell_of(row: Row) -> Cell:
    """The cell that a row of raw results belongs to."""
    return Cell(row["seed"], row["method"], row["strength"], row["lr"])


def _pairs(held: dict[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key}={held.get(key)!r}" for key in keys)


def sweep(grid: Grid, cells: Iterable[Cell], raw: RawFile, *, jobs: int) -> Iterator[tuple[Cell, Row]]:
    """Run the cells that are not in the raw file, and yield each as it is finished.

    Args:
        grid: what is trained.
        cells: in the order in which they are started.
        raw: takes each row.
        jobs: worker processes; 0 runs them in this process, with this process's threads.

    Raises:
        RuntimeError: a run failed; names the cell. Finished runs are kept.
    """
    missing = [cell for cell in cells if cell not in raw.rows]
    if jobs == 0:
        for cell in missing:
            raw.add(cell, _named(cell, functools.partial(run_cell, grid, cell)))
            yield cell, raw.rows[cell]
        return
    if not missing:
        return
    with worker_pool(min(jobs, len(missing)), one_thread) as pool:
        futures: dict[Future[Row], Cell] = {pool.submit(run_cell, grid, cell): cell for cell in missing}
        try:
            for future in as_completed(futures):
                cell = futures[future]
                raw.add(cell, _named(cell, future.result))
                yield cell, raw.rows[cell]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _named(cell: Cell, run: Callable[[], Row]) -> Row:
    try:
        return run()
    except Exception as error:
        from .task import MissingDataError

        if isinstance(error, MissingDataError):
            raise
        if isinstance(error, BrokenExecutor):
            raise RuntimeError(
                "compare(…): expected the worker processes to live, one of them was ended from outside, perhaps for "
                "want of memory. Finished runs are kept; start the same command again, with --jobs 1."
            ) from error
        strength = "" if cell.strength is None else f", strength={cell.strength:g}"
        raise RuntimeError(
            f"compare(…): expected every run to end, got {type(error).__name__} in method {cell.method!r}{strength}, "
            f"lr={cell.lr:g}, seed={cell.seed}: {error} Finished runs are kept; leave the method out to go on."
        ) from error
