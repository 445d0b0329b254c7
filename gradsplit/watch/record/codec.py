"""Arrays as bytes: 16-bit floats with the range of float32, bytes sorted by significance, deflated.

Norms span forty powers of ten and are read to three digits: the upper half of a float32 (bfloat16, rounded to nearest,
relative error at most 2^-9) keeps all of the range and inf and nan. Stored leaf by leaf, high bytes before low bytes,
since a leaf's exponent hardly changes from step to step and deflates to almost nothing.
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = [
    "pack_counts",
    "pack_exact",
    "pack_wide",
    "to_float",
    "unpack_bits",
    "unpack_counts",
    "unpack_exact",
    "unpack_wide",
    "Thinning",
    "merge",
    "window_starts",
]

_LARGEST = np.uint32(0x7F7F0000)  # the largest finite bfloat16, 3.39e38
_LEVEL = 1


def pack_wide(values_SL: np.ndarray) -> bytes:
    """Return (S, L) non-negative float32 as bytes; a finite value stays finite.

    >>> unpack_wide(pack_wide(np.array([[1.0, 3.4e38, np.inf, np.nan]], dtype=np.float32)), 4)
    array([[1.0000000e+00, 3.3895314e+38,           inf,           nan]],
          dtype=float32)
    """
    bits = np.ascontiguousarray(values_SL.T, dtype="<f4").view("<u4")
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    rounded = np.where(finite & ((rounded & 0x7F800000) == 0x7F800000), _LARGEST, rounded)
    rounded = np.where(finite, rounded, np.where(bits & 0x007FFFFF, np.uint32(0x7FC00000), bits))
    half = (rounded >> 16).astype("<u2")
    return zlib.compress((half >> 8).astype("u1").tobytes() + (half & 0xFF).astype("u1").tobytes(), _LEVEL)


def unpack_bits(blob: bytes, num_leaves: int, num_rows: int | None = None) -> np.ndarray:
    """Return the (S, L) bfloat16 numbers that `pack_wide` packed, as uint16, half as large as `to_float` makes them.

    Raises:
        ValueError: another number of rows than ``num_rows``, if it is said.
    """
    raw = np.frombuffer(_inflated(blob, None if num_rows is None else 2 * num_rows * num_leaves), dtype="u1")
    half = raw[: len(raw) // 2].astype(np.uint16) << 8 | raw[len(raw) // 2 :]
    return np.ascontiguousarray(half.reshape(num_leaves, -1).T)


def to_float(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 numbers, given as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unpack_wide(blob: bytes, num_leaves: int) -> np.ndarray:
    """Return the (S, L) float32 array that `pack_wide` packed."""
    return to_float(unpack_bits(blob, num_leaves))


def pack_counts(counts_SL: np.ndarray) -> bytes | None:
    """Return (S, L) counts as bytes; None where all are 0, the usual case."""
    if not counts_SL.any():
        return None
    return zlib.compress(np.ascontiguousarray(counts_SL.T, dtype="<u4").tobytes(), _LEVEL)


def unpack_counts(blob: bytes | None, num_rows: int, num_leaves: int) -> np.ndarray:
    """Return the (S, L) int64 counts that `pack_counts` packed.

    Raises:
        ValueError: another number of counts.
    """
    if blob is None:
        return np.zeros((num_rows, num_leaves), dtype=np.int64)
    flat = np.frombuffer(_inflated(blob, 4 * num_rows * num_leaves), dtype="<u4")
    return np.ascontiguousarray(flat.reshape(num_leaves, -1).T).astype(np.int64)


def pack_exact(values: np.ndarray, dtype: Any) -> bytes:
    """Return a vector as bytes of a little-endian dtype, to be read by anything."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()


def unpack_exact(blob: bytes, dtype: Any) -> np.ndarray:
    """Return the vector that `pack_exact` packed."""
    return np.frombuffer(blob, dtype=np.dtype(dtype).newbyteorder("<"))


def _inflated(blob: bytes, size: int | None) -> bytes:
    """Inflate a blob. Where the size is known, a damaged or hostile blob cannot make more than one byte beyond it."""
    if size is None:
        return zlib.decompress(blob)
    inflater = zlib.decompressobj()
    made = inflater.decompress(blob, size + 1)
    if len(made) != size or not inflater.eof:
        raise ValueError(f"expected {size} bytes after inflating, got {'more' if len(made) > size else len(made)}")
    return made


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
    for column in ("step", "time", "loss", "lr", "own_scale", "skipped", "total", "given"):
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
