"""The array namespace on numpy; float64 throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import concatenate, cumsum, exp, flip, isfinite, logical_or, maximum, minimum, sqrt, where

__all__ = [
    "argsort",
    "asarray",
    "concatenate",
    "cumsum",
    "device_key",
    "exp",
    "flip",
    "full",
    "index",
    "isfinite",
    "logical_or",
    "maximum",
    "minimum",
    "put",
    "segment_sum",
    "sqrt",
    "take",
    "where",
]


def device_key(array: np.ndarray) -> str:
    """Where an array lives, as a dictionary key."""
    return "cpu"


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
