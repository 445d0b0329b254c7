"""The array namespace on TensorFlow: eager, inside ``tf.function``, and compiled by XLA.

Constants of a plan are made outside of any graph that is being traced (``tf.init_scope``), so that they can be kept
and captured by the next graph too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor
from tensorflow.math import cumsum, exp, logical_or, maximum, minimum, sqrt
from tensorflow.math import is_finite as isfinite

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


def device_key(array: Tensor) -> str:
    """Where an array lives, as a dictionary key; TensorFlow itself moves constants between devices."""
    return str(array.dtype.name)


def _constant(values: Any, dtype: Any) -> Tensor:
    if tf.is_tensor(values):
        return tf.cast(values, dtype)
    with tf.init_scope():
        return tf.constant(np.asarray(values), dtype=dtype)


def asarray(values: Any, like: Tensor) -> Tensor:
    """Return values as floating-point numbers beside ``like``."""
    return _constant(values, like.dtype)


def index(values: Any, like: Tensor) -> Tensor:
    """Return integer indices beside ``like``."""
    return _constant(values, tf.int64)


def full(num: int, value: float, like: Tensor) -> Tensor:
    """Return a vector of one value."""
    return tf.fill((num,), tf.constant(value, like.dtype))


def where(condition: Tensor, a: Any, b: Any) -> Tensor:
    """Choose elementwise; ``a`` and ``b`` may be Python numbers."""
    return tf.where(condition, a, b)


def concatenate(arrays: list[Tensor]) -> Tensor:
    """Join vectors."""
    return tf.concat(arrays, 0)


def flip(values: Tensor) -> Tensor:
    """Reverse a vector."""
    return tf.reverse(values, (0,))


def take(values: Tensor, ids: Tensor) -> Tensor:
    """Return ``values[ids]``."""
    return tf.gather(values, ids)


def put(values: Tensor, ids: Tensor, new: Tensor) -> Tensor:
    """Return a copy of values with ``new`` at ``ids``."""
    return tf.tensor_scatter_nd_update(values, ids[:, None], new)


def segment_sum(values: Tensor, ids: Tensor, num: int) -> Tensor:
    """Sum values over equal ids; shape (num,)."""
    return tf.math.unsorted_segment_sum(values, ids, num)


def argsort(values: Tensor) -> Tensor:
    """Indices that sort in ascending order, stable."""
    return tf.argsort(values, stable=True)
