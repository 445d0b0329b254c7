"""The array namespace on TensorFlow: eager, inside ``tf.function``, and compiled by XLA.

Constants of a plan are made outside of any graph that is being traced (``tf.init_scope``), so that they can be kept
and captured by the next graph too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor, reshape, transpose, zeros_like
from tensorflow.linalg import matmul
from tensorflow.math import cumsum, exp, expm1, log, logical_or, maximum, minimum, sqrt
from tensorflow.math import is_finite as isfinite
from tensorflow.math import reduce_all as every


def device_key(array: Tensor) -> str:
    """Where an array lives, as a dictionary key; TensorFlow itself moves constants between devices."""
    return str(array.dtype.name)


def is_readable(array: Tensor) -> bool:
    """Whether the values are there to be looked at: not while a graph is being traced."""
    return hasattr(array, "numpy")


def holds_squares(array: Tensor) -> bool:
    return array.dtype == tf.float64


def _constant(values: Any, dtype: Any) -> Tensor:
    if tf.is_tensor(values):
        return tf.cast(values, dtype)
    with tf.init_scope():
        return tf.constant(np.asarray(values), dtype=dtype)


def asarray(values: Any, like: Tensor) -> Tensor:
    return _constant(values, like.dtype)


def index(values: Any, like: Tensor) -> Tensor:
    return _constant(values, tf.int64)


def full(num: int, value: float, like: Tensor) -> Tensor:
    return tf.fill((num,), tf.constant(value, like.dtype))


def where(condition: Tensor, a: Any, b: Any) -> Tensor:
    if len(condition.shape) > 1 and condition.shape != b.shape:
        # A factor's condition beside a whole tensor: outside of XLA a choice is a pass over memory of its own.
        return tf.cond(tf.reduce_any(condition), lambda: tf.where(condition, a, b), lambda: tf.identity(b))
    return tf.where(condition, a, b)


def concatenate(arrays: list[Tensor]) -> Tensor:
    return tf.concat(arrays, 0)


def flip(values: Tensor) -> Tensor:
    return tf.reverse(values, (0,))


def take(values: Tensor, ids: Tensor) -> Tensor:
    return tf.gather(values, ids)


def put(values: Tensor, ids: Tensor, new: Tensor) -> Tensor:
    return tf.tensor_scatter_nd_update(values, ids[:, None], new)


def segment_sum(values: Tensor, ids: Tensor, num: int) -> Tensor:
    return tf.math.unsorted_segment_sum(values, ids, num)


def argsort(values: Tensor) -> Tensor:
    return tf.argsort(values, stable=True)


def accumulator(arrays: list[Tensor]) -> Tensor:
    """Return a zero in whose dtype squares of the arrays are added: float64 where one of them is, else float32."""
    return tf.zeros((), tf.float64 if any(array.dtype == tf.float64 for array in arrays) else tf.float32)


def cast(array: Tensor, like: Tensor) -> Tensor:
    return tf.cast(array, like.dtype)


def modulus(array: Tensor) -> Tensor:
    return tf.abs(array) if array.dtype.is_complex else array


def length_over(array: Tensor, axes: tuple[int, ...]) -> Tensor:
    return tf.sqrt(tf.reduce_sum(array * array, axis=axes, keepdims=True)) if axes else tf.abs(array)


def in_unit(array: Tensor, unit: float) -> Tensor:
    # XLA turns (a c)(b c) into (a b)(c c), which overflows; through a maximum it does not look.
    return tf.maximum(tf.abs(array) * (1.0 / unit), 0.0)


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the products of two arrays' entries, 0-d."""
    return tf.reduce_sum(one * other)


def when(flag: Tensor, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """Return ``yes()`` or ``no()``, chosen on the device."""
    return tf.cond(flag, yes, no)


def times(array: Tensor, factor: Tensor) -> Tensor:
    """Return the product in the array's dtype; halves are multiplied in float32."""
    wide = tf.float32 if array.dtype in (tf.float16, tf.bfloat16) else array.dtype
    return tf.cast(tf.cast(array, wide) * tf.cast(factor, wide), array.dtype)


def median(values: Tensor, *, fewest: int = 1) -> Tensor:
    unknown = tf.math.is_nan(values)
    ordered = tf.sort(tf.where(unknown, tf.constant(float("inf"), values.dtype), values))
    num = tf.reduce_sum(tf.cast(tf.logical_not(unknown), tf.int32))
    middle = tf.gather(ordered, tf.maximum((num - 1) // 2, 0))
    return tf.where(num >= fewest, middle, tf.constant(float("nan"), values.dtype))


def wide(array: Tensor) -> Tensor:
    return tf.cast(array, tf.float32) if array.dtype in (tf.float16, tf.bfloat16) else array
