"""Damaged run files: bytes overwritten, cut off or repeated, and sound SQLite whose values are wrong."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import sqlite3
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz.draws import damaged, name, number
from benchmarks.fuzz.verdict import outcome
from gradsplit.plan import Layout
from gradsplit.resume.actions import GuardAction
from gradsplit.watch.record import Outline, Rows, RunFile, RunWriter, Stream, recording_plan
from gradsplit.watch.report.account import account_of
from gradsplit.watch.report.run_page import run_page
from gradsplit.watch.report.text import report_text

__all__ = ["damaged_bytes", "damaged_rows", "read_whole", "sound_file"]

_COLUMNS = {
    "meta": ("key", "value"),
    "stream": ("id", "optimizer", "controlled", "num_leaves", "outline", "about"),
    "chunk": ("stream", "first_row", "num_rows", "stride", "starts", "step", "time", "loss", "lr", "own_scale",
              "skipped", "total", "norm", "peak", "kept", "scaled", "zeroed"),
    "event": ("stream", "step", "time", "leaf", "kind", "count"),
    "thinning": ("time", "stream", "first_row", "num_rows", "stride_before", "stride_after"),
}  # fmt: skip


@functools.cache
def sound_file() -> bytes:
    """The bytes of a short recording of a small model under control, in two chunks, with an event."""
    outline = Outline.of(recording_plan(Layout.from_shapes({"a.weight": (3, 2), "b.weight": (2, 2), "b.bias": (2,)})))
    stream = Stream(0, "AdamW", outline, controlled=True, about={"strategy": "xsp", "num_bins": 6})
    draw, num = np.random.default_rng(0), outline.num_leaves
    with tempfile.TemporaryDirectory() as folder:
        action = GuardAction("rolled_back", 12, 0, 1.7e9, "the loss is not finite", float("nan"), 2.0, 0.5, 1, 13)
        meta = {"argv": ["train.py"], "mode": "control", "started": 1.7e9, "guard": [action.to_dict()]}
        writer = RunWriter(Path(folder) / "run.db", meta)
        for first in (0, 40):
            norm = draw.exponential(size=(40, num)).astype(np.float32)
            norm[20, 1] = np.nan if first else 1e6
            steps, ones = np.arange(first, first + 40), np.ones(40)
            zeros = np.zeros((40, num), dtype=int)
            zeroed = zeros.copy()
            zeroed[20, 1] = first > 0
            rows = Rows(stream, steps, 1.7e9 + steps, ones, 0.1 * ones, ones, np.zeros(40, np.uint8), norm,
                        np.ones((40, num)), zeros, zeroed)  # fmt: skip
            writer.write([rows])
        writer.close()
        return (Path(folder) / "run.db").read_bytes()


def read_whole(path: Path, *, with_page: bool = False) -> None:
    """Everything that `gradsplit report` does with a file."""
    with RunFile(path) as file:
        account = account_of(file)
        for stream in file.streams:
            series = file.series(stream)
            assert series.num_rows >= 0 and len(series.norm()) == len(series.start_W)
        file.events()
    report_text(account)
    if with_page:
        run_page(account)


def damaged_bytes(rng: random.Random) -> str:
    """Bytes changed anywhere in the file."""
    data = bytearray(sound_file())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(200, len(data)))
        kind = rng.random()
        if kind < 0.5:
            data[at] = rng.randrange(256)
        elif kind < 0.7:
            data[at : at + 8] = rng.randbytes(8)
        elif kind < 0.8:
            del data[max(at, 1) :]
        elif kind < 0.9:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        else:
            data[at : at + 64] = bytes(64)
    return _read(rng, bytes(data))


def damaged_rows(rng: random.Random) -> str:
    """Values changed in a file that SQLite itself finds nothing wrong with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.db"
        path.write_bytes(sound_file())
        connection = sqlite3.connect(path)
        for _ in range(rng.randint(1, 3)):
            table = rng.choice(("meta", "stream", "stream", "chunk", "chunk", "chunk", "event", "thinning"))
            column = rng.choice(_COLUMNS[table])
            try:
                _change(rng, connection, table, column)
            except (sqlite3.Error, OverflowError, UnicodeEncodeError):  # SQLite refuses the value: nothing is changed
                continue
        connection.commit()
        connection.close()
        data = path.read_bytes()
    return _read(rng, data)


def _change(rng: random.Random, connection: sqlite3.Connection, table: str, column: str) -> None:
    if rng.random() < 0.1:
        connection.execute(f"DELETE FROM {table} WHERE rowid % 2 = 0" if table != "meta" else "DELETE FROM meta")
        return
    key = "key" if table == "meta" else "rowid"
    at, value = rng.choice(connection.execute(f"SELECT {key}, {column} FROM {table}").fetchall() or [("", None)])
    new: Any = rng.choice((None, "", "x", b"", b"\0" * 8, -1, 0, 1, 2**40, number(rng), name(rng)))
    if isinstance(value, str) and column in ("value", "outline", "about") and rng.random() < 0.8:
        with contextlib.suppress(ValueError):  # damaged already
            new = json.dumps(damaged(rng, json.loads(value)), default=str)
    elif isinstance(value, bytes) and rng.random() < 0.8:
        new = _blob(rng, value)
    where = "" if rng.random() < 0.3 else f" WHERE {key} = ?"
    connection.execute(f"UPDATE {table} SET {column} = ?{where}", (new, at) if where else (new,))


def _blob(rng: random.Random, value: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.3:
        return value[: rng.randrange(len(value) + 1)]
    if kind < 0.5:
        return rng.randbytes(len(value))
    if kind < 0.7:
        return zlib.compress(rng.randbytes(rng.randrange(200)))
    if kind < 0.8:
        return zlib.compress(bytes(rng.choice((10**5, 10**6))))
    changed = bytearray(value or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _read(rng: random.Random, data: bytes) -> str:
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "run.db"
        path.write_bytes(data)
        kind, _ = outcome(lambda: read_whole(path, with_page=rng.random() < 0.02), what=f"{len(data)} bytes")
        return kind
    finally:
        shutil.rmtree(folder)
