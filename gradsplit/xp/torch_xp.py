"""The array namespace on torch; works on any device without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, exp, isfinite, logical_or, maximum, minimum, sqrt

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
    """Where an array lives, as a dictionary key."""
    return f"{array.device}/{array.dtype}"


def asarray(values: Any, like: Tensor) -> Tensor:
    """Return values as floating-point numbers beside ``like``."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def index(values: Any, like: Tensor) -> Tensor:
    """Return integer indices beside ``like``."""
    return torch.as_tensor(values, dtype=torch.int64, device=like.device)


def full(num: int, value: float, like: Tensor) -> Tensor:
    """Return a vector of one value."""
    return torch.full((num,), value, dtype=like.dtype, device=like.device)


def where(condition: Tensor, a: Any, b: Any) -> Tensor:
    """Choose elementwise; ``a`` and ``b`` may be Python numbers."""
    return torch.where(condition, a, b)


def concatenate(arrays: list[Tensor]) -> Tensor:
    """Join vectors."""
    return torch.cat(arrays)


def cumsum(values: Tensor) -> Tensor:
    """Running sum of a vector."""
    return torch.cumsum(values, 0)


def flip(values: Tensor) -> Tensor:
    """Reverse a vector."""
    return torch.flip(values, (0,))


def take(values: Tensor, ids: Tensor) -> Tensor:
    """Return ``values[ids]``."""
    return values.index_select(0, ids)


def put(values: Tensor, ids: Tensor, new: Tensor) -> Tensor:
    """Return a copy of values with ``new`` at ``ids``."""
    return values.index_copy(0, ids, new)


def segment_sum(values: Tensor, ids: Tensor, num: int) -> Tensor:
    """Sum values over equal ids; shape (num,)."""
    return torch.zeros(num, dtype=values.dtype, device=values.device).index_add(0, ids, values)


def argsort(values: Tensor) -> Tensor:
    """Indices that sort in ascending order, stable."""
    return torch.sort(values, stable=True).indices
