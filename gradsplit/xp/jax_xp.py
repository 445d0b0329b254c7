"""The array namespace on JAX; every function may run inside a compiled graph.

What is known before the run (indices, sizes, constant limits) stays numpy: a numpy array becomes a constant of each
graph that uses it, where an array made inside one graph must not be kept for the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.numpy import (
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
    sqrt,
    transpose,
    where,
    zeros_like,
)


def device_key(array: Array) -> str:
    """Where an array lives, as a dictionary key; constants live nowhere yet."""
    return str(array.dtype)


def is_readable(array: Array) -> bool:
    """Whether the values are there to be looked at, and not only their shape inside a graph."""
    return not isinstance(array, jax.core.Tracer)


def holds_squares(array: Array) -> bool:
    return array.dtype == jnp.float64


def asarray(values: Any, like: Array) -> Any:
    return values.astype(like.dtype) if isinstance(values, Array) else np.asarray(values, dtype=like.dtype)


def index(values: Any, like: Array) -> Any:
    return values.astype(jnp.int32) if isinstance(values, Array) else np.asarray(values, dtype=np.int32)


def full(num: int, value: float, like: Array) -> Array:
    return jnp.full(num, value, dtype=like.dtype)


def take(values: Any, ids: Any) -> Array:
    return jnp.asarray(values).at[ids].get(mode="promise_in_bounds")


def put(values: Array, ids: Any, new: Any) -> Array:
    return values.at[ids].set(new, mode="promise_in_bounds", unique_indices=True)


def segment_sum(values: Array, ids: Any, num: int) -> Array:
    if num == 1:
        return jnp.sum(values, keepdims=True)
    return jnp.zeros(num, dtype=values.dtype).at[ids].add(values, mode="promise_in_bounds")


def argsort(values: Array) -> Array:
    return jnp.argsort(values, stable=True)


def accumulator(arrays: list[Array]) -> Array:
    """Return a zero in whose dtype squares of the arrays are added: float64 where one of them is, else float32."""
    wide = any(jnp.finfo(array.dtype).bits > 32 for array in arrays)
    return jnp.zeros((), dtype=jnp.float64 if wide else jnp.float32)


def cast(array: Array, like: Any) -> Array:
    return array.astype(like.dtype)


def modulus(array: Array) -> Array:
    return jnp.abs(array) if jnp.iscomplexobj(array) else array


def length_over(array: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.sum(array * array, axis=axes, keepdims=True))


def reshape(array: Array, shape: tuple[int, ...]) -> Array:
    """Return the entries in row-major order in another shape."""
    return jnp.reshape(array, shape)


def inner(one: Array, other: Array) -> Array:
    """Return the sum of the products of two arrays' entries, 0-d."""
    return jnp.sum(one * other)


def every(flags: Array) -> Array:
    return jnp.all(flags)


def when(flag: Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """Return ``yes()`` or ``no()``; only that branch runs, inside the graph."""
    return lax.cond(flag, yes, no)


def times(array: Array, factor: Array) -> Array:
    return (array * factor).astype(array.dtype)


def in_unit(array: Array, unit: float) -> Array:
    return lax.optimization_barrier(array * (1.0 / unit))


def median(values: Array, *, fewest: int = 1) -> Array:
    num = jnp.sum(~jnp.isnan(values))
    middle = jnp.sort(values).at[jnp.maximum((num - 1) // 2, 0)].get(mode="promise_in_bounds")  # nan come last
    return jnp.where(num >= fewest, middle, jnp.nan)


def wide(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
