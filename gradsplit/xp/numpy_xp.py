"""The array namespace on numpy; float64 throughout.

This module says what each function is: the namespaces of the other frameworks have the same names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import (
    concatenate,
    cumsum,
    exp,
    expm1,
    flip,
    isfinite,
    log,
    logical_or,
    matmul,
    maximum,
    minimum,
    reshape,
    sqrt,
    transpose,
    where,
    zeros_like,
)

__all__ = [
    "accumulator",
    "argsort",
    "asarray",
    "cast",
    "concatenate",
    "cumsum",
    "device_key",
    "every",
    "exp",
    "expm1",
    "flip",
    "full",
    "holds_squares",
    "in_unit",
    "index",
    "inner",
    "is_readable",
    "isfinite",
    "log",
    "length_over",
    "logical_or",
    "matmul",
    "maximum",
    "median",
    "minimum",
    "modulus",
    "put",
    "reshape",
    "segment_sum",
    "sqrt",
    "take",
    "times",
    "transpose",
    "when",
    "where",
    "wide",
    "zeros_like",
]


def device_key(array: np.ndarray) -> str:
    """Where an array lives, and its dtype, as a dictionary key."""
    return "cpu"


def is_readable(array: np.ndarray) -> bool:
    """Whether the values are there to be looked at."""
    return True


def holds_squares(array: np.ndarray) -> bool:
    """Whether the dtype holds the square of every float32."""
    return True


def asarray(values: Any, like: np.ndarray) -> np.ndarray:
    """Return values as floating-point numbers beside ``like``."""
    return np.asarray(values, dtype=np.float64)


def index(values: Any, like: np.ndarray) -> np.ndarray:
    """Return integer indices beside ``like``."""
    return np.asarray(values, dtype=np.int64)


def full(num: int, value: float, like: np.ndarray) -> np.ndarray:
    """Return a vector of one value."""
    return np.full(num, value, dtype=np.float64)


def take(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return ``values[ids]``."""
    return values[ids]


def put(values: np.ndarray, ids: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return a copy of values with ``new`` at ``ids``."""
    out = values.copy()
    out[ids] = new
    return out


def segment_sum(values: np.ndarray, ids: np.ndarray, num: int) -> np.ndarray:
    """Sum values over equal ids; shape (num,)."""
    return np.bincount(ids, weights=values, minlength=num)


def argsort(values: np.ndarray) -> np.ndarray:
    """Indices that sort in ascending order, stable."""
    return np.argsort(values, kind="stable")


def accumulator(arrays: list[np.ndarray]) -> np.ndarray:
    """Return a zero in whose dtype squares of the arrays are added."""
    return np.zeros((), dtype=np.float64)


def cast(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return the array in the dtype of ``like``."""
    return array.astype(like.dtype)


def modulus(array: np.ndarray) -> np.ndarray:
    """Moduli of complex entries; real ones as they are, since only their squares are taken."""
    return np.abs(array) if np.iscomplexobj(array) else array


def length_over(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Root of the sum of squares over axes, which stay with size 1."""
    return np.sqrt((array * array).sum(axis=axes, keepdims=True))


def inner(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the sum of the products of two arrays' entries, 0-d."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray((one * other).sum())


def every(flags: np.ndarray) -> np.ndarray:
    """Whether all flags are set, 0-d."""
    return np.asarray(np.all(flags))


def when(flag: np.ndarray, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """Return ``yes()`` or ``no()``."""
    return yes() if flag else no()


def times(array: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return the product in the array's dtype; halves are multiplied in the factor's."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is replaced by the caller
        return (array * factor).astype(array.dtype)


def in_unit(array: np.ndarray, unit: float) -> np.ndarray:
    """Return lengths in a unit that is a power of two; the unit is not merged into a product that follows."""
    return array * (1.0 / unit)


def median(values: np.ndarray, *, fewest: int = 1) -> np.ndarray:
    """Return the lower median of the entries that are not nan, 0-d; nan where there are fewer than ``fewest``."""
    known = np.sort(values[~np.isnan(values)])
    return np.asarray(known[(len(known) - 1) // 2] if len(known) >= fewest else np.nan)


def wide(array: np.ndarray) -> np.ndarray:
    """Return the array in at least float32."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
