"""Arrays as bytes: 16-bit floats with the range of float32, bytes sorted by significance, deflated.

Norms span forty powers of ten and are read to three digits: the upper half of a float32 (bfloat16, rounded to nearest,
relative error at most 2^-9) keeps all of the range and inf and nan. Stored leaf by leaf, high bytes before low bytes,
since a leaf's exponent hardly changes from step to step and deflates to almost nothing.
"""

from __future__ import annotations

import zlib
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
    """Inflate; where the size is known no more than that is made, whatever a damaged or hostile blob would become."""
    if size is None:
        return zlib.decompress(blob)
    inflater = zlib.decompressobj()
    made = inflater.decompress(blob, size + 1)
    if len(made) != size or not inflater.eof:
        raise ValueError(f"expected {size} bytes after inflating, got {'more' if len(made) > size else len(made)}")
    return made
