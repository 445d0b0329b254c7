"""The array namespace on torch; works on any device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import (
    Tensor,
    exp,
    expm1,
    isfinite,
    log,
    logical_or,
    matmul,
    maximum,
    minimum,
    reshape,
    sqrt,
    where,
    zeros_like,
)
from torch import permute as transpose


def device_key(array: Tensor) -> str:
    return f"{array.device}/{array.dtype}"


def is_readable(array: Tensor) -> bool:
    return True


def holds_squares(array: Tensor) -> bool:
    return array.dtype == torch.float64


def asarray(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def index(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64, device=like.device)


def full(num: int, value: float, like: Tensor) -> Tensor:
    return torch.full((num,), value, dtype=like.dtype, device=like.device)


def concatenate(arrays: list[Tensor]) -> Tensor:
    return torch.cat(arrays)


def cumsum(values: Tensor) -> Tensor:
    return torch.cumsum(values, 0)


def flip(values: Tensor) -> Tensor:
    return torch.flip(values, (0,))


def take(values: Tensor, ids: Tensor) -> Tensor:
    return values.index_select(0, ids)


def put(values: Tensor, ids: Tensor, new: Tensor) -> Tensor:
    return values.index_copy(0, ids, new)


def segment_sum(values: Tensor, ids: Tensor, num: int) -> Tensor:
    return torch.zeros(num, dtype=values.dtype, device=values.device).index_add(0, ids, values)


def argsort(values: Tensor) -> Tensor:
    return torch.sort(values, stable=True).indices


def accumulator(arrays: list[Tensor]) -> Tensor:
    """Return a zero in whose dtype squares of the arrays are added: float64 where the device has it."""
    device = arrays[0].device
    return torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def cast(array: Tensor, like: Tensor) -> Tensor:
    return array.to(like.dtype)


def modulus(array: Tensor) -> Tensor:
    return array.abs() if array.is_complex() else array


def length_over(array: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(array, dim=axes, keepdim=True) if axes else array.abs()


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the products of two arrays' entries, 0-d."""
    return (one * other).sum()


def every(flags: Tensor) -> Tensor:
    return flags.all()


def when(flag: Tensor, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """Return ``yes()`` or ``no()``; looking at the flag waits for the device."""
    return yes() if flag else no()


def times(array: Tensor, factor: Tensor) -> Tensor:
    return (array * factor).to(array.dtype)


def in_unit(array: Tensor, unit: float) -> Tensor:
    return array * (1.0 / unit)


def median(values: Tensor, *, fewest: int = 1) -> Tensor:
    middle = torch.nanmedian(values)
    return middle if fewest <= 1 else torch.where((~values.isnan()).sum() >= fewest, middle, torch.nan)


def wide(array: Tensor) -> Tensor:
    return array.float() if array.dtype in (torch.float16, torch.bfloat16) else array
