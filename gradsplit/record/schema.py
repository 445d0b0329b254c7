"""The tables of the run file and their version; docs/run-file.md says what every column holds."""

from __future__ import annotations

__all__ = ["APPLICATION_ID", "SCHEMA", "VERSION"]

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
