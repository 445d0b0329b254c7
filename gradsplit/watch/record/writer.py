"""RunWriter: the sink that keeps rows in a run file of bounded size, with one transaction per flush."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...resume.actions import GuardAction
from .codec import Thinning, pack_counts, pack_exact, pack_wide
from .rows import Rows, Turns
from .run_file import create, finish, tell

__all__ = ["ROW_COLUMNS", "RunWriter"]

ROW_COLUMNS: dict[str, str] = {
    "step": "i8",
    "time": "f8",
    "loss": "f4",
    "lr": "f4",
    "own_scale": "f4",
    "skipped": "u1",
    "total": "f4",
    "given": "f4",
}
"""The columns with one number per row, and their types in the file."""

_MAX_EVENTS = 200  # per flush; otherwise a broken run would write an event per leaf and step for ever


class RunWriter:
    """Write rows to a new run file; a sink of `Recorder`.

    When the disk is full or gone, the training goes on. There is one warning, and nothing more is written. What was
    written stays whole.

    Args:
        path: a file that does not exist yet.
        meta: what to keep about the run, plain data.
        max_megabytes: above this, old rows are thinned (see `Thinning`); in units of 10^6 bytes.

    Attributes:
        tell: what says that the recording stopped.

    Raises:
        RunFileError: the file cannot be made.
    """

    tell = staticmethod(tell)

    def __init__(
        self, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None, *, max_megabytes: float = 400.0
    ) -> None:
        self.path = Path(path)
        about = {"started": time.time(), "pid": os.getpid(), "max_megabytes": max_megabytes, **(meta or {})}
        self._connection: sqlite3.Connection | None = create(path, about)
        self.failed = ""  # why the recording stopped before the run did
        self._pid = os.getpid()
        self._rows: dict[int, int] = {}
        self._actions: list[dict[str, Any]] = []
        self._remarks: list[dict[str, Any]] = []
        self._thinning = Thinning(max_bytes=int(max_megabytes * 1e6))

    @property
    def num_rows(self) -> int:
        """Rows in the file, over all streams; the last of them may be lost where the disk failed."""
        return sum(self._rows.values())

    def write(self, batch: Sequence[Rows]) -> None:
        """Add rows of any streams in one transaction."""
        if not batch:
            return
        with self._transaction() as connection:
            if connection is None:
                return
            for rows in batch:
                self._add(connection, rows)
            self._thinning.apply(connection)

    def note(self, action: GuardAction) -> None:
        """Keep what a guard did: one event for those who watch, and the whole action in the table ``meta``."""
        with self._transaction() as connection:
            if connection is None:
                return
            self._actions.append(action.to_dict())
            _set_meta(connection, {"guard": self._actions})
            connection.execute(
                "INSERT INTO event VALUES (NULL, 0, ?, ?, NULL, ?, ?)",
                (action.step, action.time, action.kind, action.num_undone),
            )

    def add_lengths(self, lengths: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """Keep lengths of weights: (stream, step, (T,) lengths before the update of that step)."""
        with self._transaction() as connection:
            if connection is not None:
                connection.executemany(
                    "INSERT INTO weight VALUES (NULL, ?, ?, ?)",
                    [(stream, step, pack_exact(length_T, "f4")) for stream, step, length_T in lengths],
                )

    def add_turns(self, turns: Turns) -> None:
        """Keep what GSO's steps did."""
        with self._transaction() as connection:
            if connection is not None:
                columns = (turns.turned_KT, turns.limit_KT, turns.bounded_KT)
                connection.executemany(
                    "INSERT INTO turn VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                    [
                        (turns.stream.index, int(step), float(factor), *(pack_exact(one[k], "f4") for one in columns))
                        for k, (step, factor) in enumerate(zip(turns.step_K, turns.factor_K, strict=True))
                    ],
                )

    def remark(self, values: Mapping[str, Any]) -> None:
        """Keep something that was seen beside the rows, plain data, in the table ``meta``."""
        self._remarks.append(dict(values))
        with self._transaction() as connection:
            if connection is not None:
                _set_meta(connection, {"remarks": self._remarks})

    def close(self, **meta: Any) -> None:
        """Write the end of the run and fold everything into one file."""
        if self._connection is None or os.getpid() != self._pid:
            return
        with self._transaction() as connection:
            if connection is not None:
                _set_meta(connection, {"ended": time.time(), **meta})
        if self._connection is not None:
            finish(self._connection)
            self._connection = None

    def _transaction(self) -> _Transaction:
        return _Transaction(self)

    def _give_up(self, error: Exception) -> None:
        """Stop recording for good: a second attempt on a full disk would fail at every flush."""
        connection, self._connection, self.failed = self._connection, None, str(error)
        if connection is not None:
            connection.close()
        self.tell(
            f"recording to {self.path} stopped, the training goes on ({error}). Free some space, or record elsewhere "
            "with --record; what was written until now can be read."
        )

    def _add(self, connection: sqlite3.Connection, rows: Rows) -> None:
        stream, outline = rows.stream, rows.stream.outline
        if stream.index not in self._rows:
            self._rows[stream.index] = 0
            connection.execute(
                "INSERT INTO stream VALUES (?, ?, ?, ?, ?, ?)",
                (
                    stream.index,
                    stream.optimizer,
                    int(stream.controlled),
                    outline.num_leaves,
                    json.dumps(outline.to_dict()),
                    json.dumps(stream.about),
                ),
            )
        exact = {
            "given": np.full(len(rows), np.nan) if rows.given_S is None else rows.given_S,
            "step": rows.step_S,
            "time": rows.time_S,
            "loss": rows.loss_S,
            "lr": rows.lr_S,
            "own_scale": rows.own_scale_S,
            "skipped": rows.skipped_S,
            "total": np.minimum(
                rows.total_S, np.finfo(np.float32).max, where=np.isfinite(rows.total_S), out=rows.total_S
            ),
        }
        values: dict[str, Any] = {name: pack_exact(exact[name], dtype) for name, dtype in ROW_COLUMNS.items()}
        values |= {
            "stream": stream.index,
            "first_row": self._rows[stream.index],
            "num_rows": len(rows),
            "stride": 1,
            "norm": pack_wide(rows.norm_SL),
            "kept": None if rows.kept_SL is None else pack_wide(rows.kept_SL),
            "scaled": None if rows.scaled_SL is None else pack_counts(rows.scaled_SL),
            "zeroed": None if rows.zeroed_SL is None else pack_counts(rows.zeroed_SL),
        }
        insert_chunk(connection, values)
        self._rows[stream.index] += len(rows)
        connection.executemany("INSERT INTO event VALUES (NULL, ?, ?, ?, ?, ?, ?)", _events(rows)[:_MAX_EVENTS])


def insert_chunk(connection: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    """Add one row to the table of chunks."""
    names = ", ".join(values)
    connection.execute(f"INSERT INTO chunk ({names}) VALUES ({', '.join('?' * len(values))})", tuple(values.values()))


def _events(rows: Rows) -> list[tuple[Any, ...]]:
    """What a reader wants to be told at once: leaves that were not finite, and steps that were not made."""
    found: list[tuple[Any, ...]] = []
    index, zeroed = rows.stream.index, rows.zeroed_SL
    bad_SL = ~np.isfinite(rows.norm_SL)
    for s in np.flatnonzero(bad_SL.any(axis=1) | (rows.skipped_S != 0)).tolist():
        step, when = int(rows.step_S[s]), float(rows.time_S[s])
        if rows.skipped_S[s]:
            found.append((index, step, when, None, "skipped", int(bad_SL[s].sum())))
        for leaf in np.flatnonzero(bad_SL[s]).tolist():
            bins = 1 if zeroed is None else int(zeroed[s, leaf])
            found.append((index, step, when, leaf, "nonfinite" if zeroed is None else "zeroed", bins))
    return found


def _set_meta(connection: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    pairs = [(key, json.dumps(value)) for key, value in values.items()]
    connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs)


class _Transaction:
    """``BEGIN IMMEDIATE … COMMIT``; an error of the disk ends the recording and not the training."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer

    def __enter__(self) -> sqlite3.Connection | None:
        writer = self._writer
        self._rows = dict(writer._rows)
        if writer._connection is None or os.getpid() != writer._pid:
            return None  # given up, or a forked child: SQLite connections must not cross a fork
        try:
            writer._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            writer._give_up(error)
        return writer._connection

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        connection = self._writer._connection
        if connection is None:
            return isinstance(error, (sqlite3.Error, OSError))
        try:
            connection.execute("ROLLBACK" if error else "COMMIT")
        except sqlite3.Error as failure:
            error = error if isinstance(error, (sqlite3.Error, OSError)) else failure
        if error is not None:
            self._writer._rows = self._rows  # what was rolled back is not in the file
        if isinstance(error, (sqlite3.Error, OSError)):
            self._writer._give_up(error)
            return True
        return False
