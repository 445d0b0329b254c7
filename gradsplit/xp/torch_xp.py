"""The array namespace on torch; works on any device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, exp, expm1, isfinite, log, logical_or, matmul, maximum, minimum, reshape, sqrt, zeros_like
from torch import permute as transpose

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


def device_key(array: Tensor) -> str:
    """Where an array lives, as a dictionary key."""
    return f"{array.device}/{array.dtype}"


def is_readable(array: Tensor) -> bool:
    """Whether the values are there to be looked at."""
    return True


def holds_squares(array: Tensor) -> bool:
    """Whether the dtype holds the square of every float32."""
    return array.dtype == torch.float64


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


def accumulator(arrays: list[Tensor]) -> Tensor:
    """Return a zero in whose dtype squares of the arrays are added: float64 where the device has it."""
    device = arrays[0].device
    return torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def cast(array: Tensor, like: Tensor) -> Tensor:
    """Return the array in the dtype of ``like``."""
    return array.to(like.dtype)


def modulus(array: Tensor) -> Tensor:
    """Moduli of complex entries; real ones as they are, since only their squares are taken."""
    return array.abs() if array.is_complex() else array


def length_over(array: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Root of the sum of squares over axes, which stay with size 1."""
    return torch.linalg.vector_norm(array, dim=axes, keepdim=True) if axes else array.abs()


def every(flags: Tensor) -> Tensor:
    """Whether all flags are set, 0-d."""
    return flags.all()


def when(flag: Tensor, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """Return ``yes()`` or ``no()``; looking at the flag waits for the device."""
    return yes() if flag else no()


def times(array: Tensor, factor: Tensor) -> Tensor:
    """Return the product in the array's dtype; halves are multiplied in the factor's."""
    return (array * factor).to(array.dtype)


def in_unit(array: Tensor, unit: float) -> Tensor:
    """Return lengths in a unit that is a power of two; the unit is not merged into a product that follows."""
    return array * (1.0 / unit)


def median(values: Tensor, *, fewest: int = 1) -> Tensor:
    """Return the lower median of the entries that are not nan, 0-d; nan where there are fewer than ``fewest``."""
    middle = torch.nanmedian(values)
    return middle if fewest <= 1 else torch.where((~values.isnan()).sum() >= fewest, middle, torch.nan)


def wide(array: Tensor) -> Tensor:
    """Return the array in at least float32."""
    return array.float() if array.dtype in (torch.float16, torch.bfloat16) else array
