"""Making and opening the SQLite file of a run, with errors that say what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["APPLICATION_ID", "SCHEMA", "VERSION", "RunFileError", "create", "finish", "open_to_read", "tell"]

APPLICATION_ID = 0x47535246
"""The letters GSRF in SQLite's header: what `file` and this package know a run file by."""

VERSION = 1
"""Written to ``PRAGMA user_version``; raised by any change a reader would notice."""

SCHEMA = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL              -- JSON
) WITHOUT ROWID;

CREATE TABLE stream (
    id INTEGER PRIMARY KEY,          -- 0, 1, ... in the order of first steps
    optimizer TEXT NOT NULL,         -- class name
    controlled INTEGER NOT NULL,     -- 1: gradients were bounded; 0: only measured
    num_leaves INTEGER NOT NULL,
    outline TEXT NOT NULL,           -- JSON: the recorded nodes
    about TEXT NOT NULL              -- JSON: layout, plan, budget
);

CREATE TABLE chunk (
    id INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL REFERENCES stream (id),
    first_row INTEGER NOT NULL,      -- rows are counted from 0 within a stream
    num_rows INTEGER NOT NULL,
    stride INTEGER NOT NULL,         -- rows a window, usually; 1: nothing was thinned
    starts BLOB,                     -- int64: each window's first row in the chunk; NULL: every row
    step BLOB NOT NULL,              -- int64 a row
    time BLOB NOT NULL,              -- float64 a row
    loss BLOB NOT NULL,              -- float32 a row
    lr BLOB NOT NULL,                -- float32 a row
    own_scale BLOB NOT NULL,         -- float32 a row
    skipped BLOB NOT NULL,           -- uint8 a row
    total BLOB NOT NULL,             -- float32 a row
    given BLOB,                      -- float32 a row: size of the batch; NULL: nobody looked
    norm BLOB NOT NULL,              -- wide: the window's first row
    peak BLOB,                       -- wide: the window's largest; NULL: stride is 1
    kept BLOB,                       -- wide: the window's smallest; NULL: nothing was controlled
    scaled BLOB,                     -- counts: the window's sum; NULL: all 0
    zeroed BLOB                      -- counts: the window's sum; NULL: all 0
);
CREATE UNIQUE INDEX chunk_by_row ON chunk (stream, first_row);

CREATE TABLE event (
    id INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL REFERENCES stream (id),
    step INTEGER NOT NULL,
    time REAL NOT NULL,
    leaf INTEGER,                    -- NULL: the whole step
    kind TEXT NOT NULL,              -- 'nonfinite', 'zeroed', 'skipped'
    count INTEGER NOT NULL           -- bins or leaves concerned
);

CREATE TABLE weight (
    id INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL REFERENCES stream (id),
    step INTEGER NOT NULL,           -- read before the update of this step
    length BLOB NOT NULL             -- float32 a tensor, in the order of the layout
);

CREATE TABLE turn (
    id INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL REFERENCES stream (id),
    step INTEGER NOT NULL,           -- of GSO, read now and then
    factor REAL NOT NULL,            -- by which the whole gradient was multiplied
    turned BLOB NOT NULL,            -- float32 a tensor: degrees between gradients and steps; nan: not measured
    at_limit BLOB NOT NULL,          -- float32 a tensor: share of rows at their growth limit
    bounded BLOB NOT NULL            -- float32 a tensor: share of rows that were bounded
);

CREATE TABLE thinning (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    stream INTEGER NOT NULL REFERENCES stream (id),
    first_row INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    stride_before INTEGER NOT NULL,
    stride_after INTEGER NOT NULL,
    bytes_before INTEGER NOT NULL,
    bytes_after INTEGER NOT NULL
);
"""


class RunFileError(RuntimeError):
    """A run file cannot be made, opened or read; the text says why and what to do."""


def tell(text: str) -> None:
    """Warn; where warnings are errors, or standard error is gone, the training is not disturbed all the same."""
    try:
        warnings.warn(f"gradsplit: {text}", RuntimeWarning, stacklevel=3)
    except Exception:
        with contextlib.suppress(Exception):
            if sys.stderr is not None:
                print(f"gradsplit: {text}", file=sys.stderr)


def create(path: str | os.PathLike[str], meta: Mapping[str, Any]) -> sqlite3.Connection:
    """Make a new run file and return a connection that may be used from any one thread at a time.

    A write-ahead log with ``synchronous=NORMAL``: a commit does not wait for the disk, a reader never blocks the
    writer, and a process that is killed leaves every committed transaction (docs/decisions/0008-the-run-file.md). Where
    the file system cannot share memory (some network drives) SQLite keeps its rollback journal instead.

    Raises:
        RunFileError: the folder is missing or read-only, or the file exists: evidence is never overwritten.
    """
    place, connection, made = Path(path), None, False
    try:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        made = True
        connection = sqlite3.connect(place, isolation_level=None, check_same_thread=False, timeout=5.0)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(f"BEGIN IMMEDIATE;{SCHEMA}")
        rows = [(key, json.dumps(value)) for key, value in meta.items()]
        connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except FileExistsError as error:
        raise RunFileError(
            f"run file {place}: expected a new file, got one that exists. Choose another name; none is overwritten."
        ) from error
    except (sqlite3.Error, OSError) as error:
        if connection is not None:
            connection.close()
        for left in (place, Path(f"{place}-wal"), Path(f"{place}-shm"), Path(f"{place}-journal")) if made else ():
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)  # half a file is none
        raise RunFileError(
            f"run file {place}: expected a place that can be written to, got: {error}. Choose another, for example "
            "--record ~/runs/run.db."
        ) from error
    return connection


def finish(connection: sqlite3.Connection) -> None:
    """Fold the log into the file, so that a finished run is one file, and close."""
    with contextlib.suppress(sqlite3.Error):  # a reader or a full disk: the log stays beside the file, still whole
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()


def open_to_read(path: str | os.PathLike[str]) -> sqlite3.Connection:
    """Open a run file, also while it is written to or after its writer was killed.

    Raises:
        RunFileError: no such file, not a run file, one of another version, or a broken one.
    """
    place = Path(path)
    if not place.is_file():
        raise RunFileError(f"run file {place}: expected a file, got none. Record one: gradsplit run --watch SCRIPT.")
    if place.stat().st_size == 0:
        raise RunFileError(f"run file {place}: expected a recording, got an empty file: the run ended before it began.")
    connection = None
    try:
        connection = sqlite3.connect(f"{place.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if connection is not None:
            connection.close()
        connection = _open_at_rest(place)
        if connection is None:
            raise RunFileError(
                f"run file {place}: expected a file written by gradsplit run, got {error}. If it was copied while it "
                "was being written, copy it again together with its -wal file."
            ) from error
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        connection.close()
        raise RunFileError(f"run file {place}: expected a file written by gradsplit run, got another SQLite file.")
    if version != VERSION:
        connection.close()
        newer = "Install a newer gradsplit" if version > VERSION else "Use the gradsplit that wrote it"
        raise RunFileError(f"run file {place}: expected version {VERSION}, got version {version}. {newer} to read it.")
    return connection


def _open_at_rest(place: Path) -> sqlite3.Connection | None:
    """Open a file whose folder cannot be written to, where SQLite cannot make the log's index; None if it is broken."""
    connection = sqlite3.connect(f"{place.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        connection.execute("SELECT count(*) FROM meta").fetchone()
    except sqlite3.DatabaseError:
        connection.close()
        return None
    return connection
