"""Thinning: a run file stays below its size by coarsening old rows; extremes are kept, and what was done is recorded.

Windows of 4 neighbouring rows become one: the norms of the window's first row, the *largest* norm of each leaf in the
window (inf and nan above all), the smallest share that was kept, and the sums of scaled and zeroed bins. Numbers of
which there is one a row (step, time, loss, learning rate, total norm) are never thinned.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .codec import pack_counts, pack_exact, pack_wide, unpack_counts, unpack_exact, unpack_wide

__all__ = ["Thinning", "merge", "window_starts"]

_FACTOR = 4
_SPARED_ROWS = 1000  # the last rows stay as they are: what went wrong is most often there
_CHUNKS_A_FLUSH = 64  # so that one flush never takes long
_WIDE = ("norm", "peak", "kept", "scaled", "zeroed")


class Thinning:
    """Coarsen the oldest rows of the finest resolution whenever the file has outgrown ``max_bytes``.

    Args:
        max_bytes: size of the database, free pages not counted; at least 100 kB.

    Raises:
        ValueError: a size too small to hold a recording.
    """

    def __init__(self, *, max_bytes: int) -> None:
        if max_bytes < 100_000:
            raise ValueError(f"Thinning(max_bytes={max_bytes}): expected at least 100000, or the file has no room.")
        self.max_bytes = max_bytes

    def apply(self, connection: sqlite3.Connection) -> None:
        """Thin a little, if needed, within the caller's transaction."""
        if _bytes_in_use(connection) <= self.max_bytes:
            return
        oldest = connection.execute(
            "SELECT c.stream, c.stride, min(c.first_row), sum(length(c.norm)) AS weight FROM chunk c JOIN "
            "(SELECT stream, max(first_row + num_rows) AS stop FROM chunk GROUP BY stream) s ON s.stream = c.stream "
            "WHERE c.first_row + c.num_rows <= s.stop - ? GROUP BY c.stream, c.stride "
            "HAVING sum(c.num_rows) >= 8 * c.stride ORDER BY weight DESC LIMIT 1",
            (_SPARED_ROWS,),
        ).fetchone()
        if oldest is None:
            return
        stream, stride, first, _ = oldest
        stop = connection.execute("SELECT max(first_row + num_rows) FROM chunk WHERE stream = ?", (stream,)).fetchone()[
            0
        ]
        cursor = connection.execute(
            "SELECT * FROM chunk WHERE stream = ? AND first_row >= ? AND first_row + num_rows <= ? "
            "ORDER BY first_row LIMIT ?",
            (stream, first, stop - _SPARED_ROWS, _CHUNKS_A_FLUSH),
        )
        names = [column[0] for column in cursor.description]
        chunks: list[dict[str, Any]] = []
        for row in cursor.fetchall():
            chunk = dict(zip(names, row, strict=True))
            if chunk["stride"] != stride:
                break
            chunks.append(chunk)
        num_leaves = connection.execute("SELECT num_leaves FROM stream WHERE id = ?", (stream,)).fetchone()[0]
        merged = merge(chunks, num_leaves)
        connection.executemany("DELETE FROM chunk WHERE id = ?", [(chunk["id"],) for chunk in chunks])
        columns = ", ".join(merged)
        connection.execute(
            f"INSERT INTO chunk ({columns}) VALUES ({', '.join('?' * len(merged))})", tuple(merged.values())
        )
        connection.execute(
            "INSERT INTO thinning VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                time.time(),
                stream,
                merged["first_row"],
                merged["num_rows"],
                stride,
                merged["stride"],
                sum(_weight(chunk) for chunk in chunks),
                _weight(merged),
            ),
        )


def merge(chunks: list[dict[str, Any]], num_leaves: int) -> dict[str, Any]:
    """Return one chunk in place of consecutive ones of the same stride, its windows four times as long.

    Args:
        chunks: rows of the table of chunks, by column.
        num_leaves: L.
    """
    first, low = chunks[0], _decoded(chunks, "kept", num_leaves)
    norm_WL = _decoded(chunks, "norm", num_leaves)
    assert norm_WL is not None
    peak_WL = np.concatenate([unpack_wide(c["norm" if c["peak"] is None else "peak"], num_leaves) for c in chunks])
    before = np.cumsum([0, *(chunk["num_rows"] for chunk in chunks)])
    start_W = np.concatenate([window_starts(c) + at for c, at in zip(chunks, before, strict=False)])
    each = np.arange(0, len(start_W), _FACTOR)
    merged: dict[str, Any] = {key: value for key, value in first.items() if key not in ("id", *_WIDE)}
    for column in ("step", "time", "loss", "lr", "own_scale", "skipped", "total"):
        merged[column] = b"".join(chunk[column] for chunk in chunks)
    merged["num_rows"] = int(before[-1])
    merged["stride"] = first["stride"] * _FACTOR
    merged["starts"] = pack_exact(start_W[each], "i8")
    merged["norm"] = pack_wide(norm_WL[each])
    merged["peak"] = pack_wide(np.maximum.reduceat(peak_WL, each, axis=0))  # nan wins over inf
    merged["kept"] = None if low is None else pack_wide(np.minimum.reduceat(low, each, axis=0))
    for column in ("scaled", "zeroed"):
        counts_WL = np.concatenate([unpack_counts(c[column], len(window_starts(c)), num_leaves) for c in chunks])
        merged[column] = pack_counts(np.add.reduceat(counts_WL, each, axis=0))
    return merged


def window_starts(chunk: Mapping[str, Any]) -> np.ndarray:
    """Return the offset of each window's first row in its chunk."""
    return np.arange(chunk["num_rows"]) if chunk["starts"] is None else unpack_exact(chunk["starts"], "i8")


def _decoded(chunks: list[dict[str, Any]], column: str, num_leaves: int) -> np.ndarray | None:
    if chunks[0][column] is None:
        return None
    return np.concatenate([unpack_wide(chunk[column], num_leaves) for chunk in chunks])


def _weight(chunk: dict[str, Any]) -> int:
    return sum(len(chunk[column]) for column in _WIDE if chunk.get(column) is not None)


def _bytes_in_use(connection: sqlite3.Connection) -> int:
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)
