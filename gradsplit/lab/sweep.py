"""Many runs in worker processes, one thread each; a finished one is written at once, so that a sweep can go on.

`cells.jsonl` holds one finished run per line. Starting the same sweep again skips what is there; a larger grid adds to
it; another workload or another schedule is refused.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from .cells import Cell, Grid, run_cell
from .task import MissingDataError, MissingPackageError

__all__ = ["RawFile", "finite_or_none", "one_thread", "sweep", "write_whole"]

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


def write_whole(path: Path, text: str) -> None:
    """Write a file that is made from the raw one.

    Raises:
        OSError: the disk took no more; the text names the file and says what to do.
    """
    try:
        path.write_text(text, encoding="utf8", newline="")
    except OSError as error:
        raise OSError(
            f"compare(out={str(path.parent)!r}): expected room for {path.name}, got {type(error).__name__}: "
            f"{error.strerror or error}. The finished runs are in cells.jsonl: make room, then start the same command "
            "again."
        ) from error


class RawFile:
    """The finished runs of one sweep, a line each.

    Args:
        folder: made if it does not exist.
        grid: what is trained; its first line is compared with that of the file.

    Raises:
        ValueError: the folder holds runs of something else.
        OSError: the disk has no room for the first line.
    """

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.path = folder / "cells.jsonl"
        self.rows: dict[Cell, Row] = {}
        self.unwritten: list[Row] = []
        self.refusal = ""
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(grid.what_is_trained()))
        if not self.path.exists() or not self.path.stat().st_size:  # empty: a full disk refused the first line
            self._begin(wanted)
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

    def _begin(self, wanted: Row) -> None:
        try:
            self._write({"what_is_trained": wanted})
        except OSError as error:
            raise OSError(
                f"compare(out={str(self.path.parent)!r}): expected room for {self.path.name}, got "
                f"{type(error).__name__}: {error.strerror or error}. Make room, or choose another folder."
            ) from error

    def add(self, cell: Cell, row: Row) -> None:
        """Write one finished run; where the disk refuses it, keep it, and try again with the next.

        `unwritten` holds what the disk has refused so far, and `refusal` its last word.
        """
        self.rows[cell] = json.loads(json.dumps(finite_or_none(row)))
        self.unwritten.append(self.rows[cell])
        try:
            while self.unwritten:
                self._write(self.unwritten[0])
                self.unwritten.pop(0)
        except OSError as error:
            self.refusal = f"{type(error).__name__}: {error.strerror or error}"

    def check_written(self) -> None:
        """Raise where finished runs are not in the file.

        Raises:
            OSError: the disk refused them; the text says how many, and what to do.
        """
        if self.unwritten:
            raise OSError(
                f"compare(out={str(self.path.parent)!r}): expected room for every finished run, got {self.refusal} "
                f"for the last {len(self.unwritten)} of {len(self.rows)}. The others are in {self.path.name}: make "
                "room, then start the same command again."
            )

    def _write(self, row: Row) -> None:
        """Append a line, whole or not at all: a piece of one would spoil the next."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cell_of(row: Row) -> Cell:
    """The cell that a row of raw results belongs to."""
    return Cell(row["seed"], row["method"], row["strength"], row["lr"])


def _pairs(held: dict[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key}={held.get(key)!r}" for key in keys)


Failed = Callable[[Cell, str], None]
"""(cell, what went wrong in one sentence)."""


def sweep(grid: Grid, cells: Iterable[Cell], raw: RawFile, *, jobs: int, on_failure: Failed) -> Iterator[Cell]:
    """Run the cells that are not in the raw file, and yield each as it is finished; a run that fails ends no other.

    Args:
        grid: what is trained.
        cells: in the order in which they are started.
        raw: takes each row.
        jobs: worker processes; 0 runs them in this process, with this process's threads.
        on_failure: told each run that failed, and why. A worker that was ended from outside takes the runs with it
            that were under way: these are run once more, one at a time, and the one that ends its worker again is
            named. After one refusal for want of data or of a package, the other runs of that method are not tried.

    Raises:
        MissingDataError: the workload's data is not installed.
    """
    missing = [cell for cell in cells if cell not in raw.rows]
    runs = _Runs(grid, raw, on_failure)
    if jobs == 0:
        yield from runs.here(missing)
    elif missing:
        ended = yield from runs.in_workers(missing, min(jobs, len(missing)))
        yield from runs.one_by_one(sorted(ended, key=missing.index))


class _Runs:
    """The three ways to run cells; each yields those that ended well, once their rows are in the raw file."""

    def __init__(self, grid: Grid, raw: RawFile, on_failure: Failed) -> None:
        self._grid, self._raw, self._on_failure = grid, raw, on_failure
        self._lacking: dict[str, str] = {}  # method -> the package that it asked for in vain

    def here(self, cells: Iterable[Cell]) -> Iterator[Cell]:
        """Run the cells in this process."""
        for cell in cells:
            if not self._skipped(cell) and self._taken(cell, functools.partial(run_cell, self._grid, cell)):
                yield cell

    def in_workers(self, cells: Iterable[Cell], jobs: int) -> Generator[Cell, None, list[Cell]]:
        """Run the cells in processes, and return those whose worker was ended from outside."""
        ended = []
        with worker_pool(jobs, one_thread) as pool:
            futures: dict[Future[Row], Cell] = {pool.submit(run_cell, self._grid, cell): cell for cell in cells}
            try:
                for future in as_completed(futures):
                    cell = futures[future]
                    try:
                        if self._taken(cell, future.result):
                            yield cell
                    except BrokenExecutor:
                        ended.append(cell)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return ended

    def one_by_one(self, cells: Iterable[Cell]) -> Iterator[Cell]:
        """Run the cells in one process at a time; a cell that ends its process again has failed."""
        pool: ProcessPoolExecutor | None = None
        for cell in cells:
            if self._skipped(cell):
                continue
            pool = pool or worker_pool(1, one_thread)
            try:
                if self._taken(cell, pool.submit(run_cell, self._grid, cell).result):
                    yield cell
            except BrokenExecutor:
                pool.shutdown()
                pool = None
                self._on_failure(cell, "its worker process was ended from outside, twice, perhaps for want of memory")
        if pool is not None:
            pool.shutdown()

    def _taken(self, cell: Cell, result: Callable[[], Row]) -> bool:
        """Whether the run has ended well."""
        try:
            self._raw.add(cell, result())
        except MissingPackageError as error:
            self._lacking[cell.method] = str(error)
            self._on_failure(cell, str(error))
        except (BrokenExecutor, MissingDataError):
            raise
        except Exception as error:
            self._on_failure(cell, f"{type(error).__name__}: {error}")
        return cell in self._raw.rows

    def _skipped(self, cell: Cell) -> bool:
        if cell.method in self._lacking:
            self._on_failure(cell, self._lacking[cell.method])
        return cell.method in self._lacking
