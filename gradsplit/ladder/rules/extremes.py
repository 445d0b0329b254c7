"""Largest and smallest elements, sorting, max-pooling: the element that leads for small t > 0.

Among values that are equal at t = 0, a reduction takes the one that leads at the first order at which they differ.
Sorting, topk and pooling take the one that the ordinary forward pass takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kinks import note_gap
from ..series import Series, map_orders
from .registry import rule

aten = torch.ops.aten


def _note_runners_up(coef: Tensor, index: Tensor, axis: int) -> None:
    """Note where another element of the axis would overtake the leader; ``coef`` is (degree + 1, B, *shape)."""
    if coef.shape[0] > 1:
        lead = coef[:2].take_along_dim(index[None], axis)
        gap, slope = (lead - coef[:2]).unbind()
        note_gap(torch.where(gap > 0, gap, torch.nan), slope)


def _leader(x: Series, dim: int, largest: bool = True) -> Tensor:
    """Return the index along ``dim`` of the extreme value for small t > 0, (B, *shape with dim of length 1)."""
    coef = x.coef if largest else -x.coef
    axis = dim % x.ndim + 1  # after the bin axis
    tied = coef[0] == coef[0].amax(axis, keepdim=True)
    for coefficient in coef[1:]:
        if not bool((tied.sum(axis) > 1).any()):
            break
        candidates = coefficient.masked_fill(~tied, -torch.inf)
        tied = tied & (candidates == candidates.amax(axis, keepdim=True))
    return tied.to(torch.int8).argmax(axis, keepdim=True)


def _extreme(x: Series, dim: int, keepdim: bool, largest: bool) -> tuple[Series, Tensor]:
    index = _leader(x, dim, largest)
    axis = dim % x.ndim + 2
    _note_runners_up(x.coef, index, axis)
    coef = x.coef.take_along_dim(index[None], axis)
    return x.like(coef if keepdim else coef.squeeze(axis)), index[0] if keepdim else index[0].squeeze(axis - 2)


@rule(aten.max.dim)
def _max_dim(x: Series, dim: int, keepdim: bool = False) -> tuple[Series, Tensor]:
    return _extreme(x, dim, keepdim, largest=True)


@rule(aten.min.dim)
def _min_dim(x: Series, dim: int, keepdim: bool = False) -> tuple[Series, Tensor]:
    return _extreme(x, dim, keepdim, largest=False)


def _reduce_extreme(x: Series, dim: Sequence[int] | int, keepdim: bool, largest: bool) -> Series:
    dims = [dim] if isinstance(dim, int) else list(dim) or list(range(x.ndim))
    for axis in sorted((d % x.ndim for d in dims), reverse=True):
        x = _extreme(x, axis, keepdim, largest)[0]
    return x


@rule(aten.amax)
def _amax(x: Series, dim: Sequence[int] = (), keepdim: bool = False) -> Series:
    return _reduce_extreme(x, dim, keepdim, largest=True)


@rule(aten.amin)
def _amin(x: Series, dim: Sequence[int] = (), keepdim: bool = False) -> Series:
    return _reduce_extreme(x, dim, keepdim, largest=False)


@rule(aten.max.default)
def _max_all(x: Series) -> Series:
    return _reduce_extreme(x, (), False, largest=True)


@rule(aten.min.default)
def _min_all(x: Series) -> Series:
    return _reduce_extreme(x, (), False, largest=False)


@rule(aten.sort.default)
def _sort(x: Series, dim: int = -1, descending: bool = False) -> tuple[Series, Tensor]:
    """Keep the order at t = 0; equal values keep the order of the ordinary forward pass."""
    index = aten.sort(x.value, dim, descending)[1]
    return map_orders(torch.gather, (x, dim, index), {}), index


@rule(aten.topk)
def _topk(
    x: Series,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002 - ATen's name
) -> tuple[Series, Tensor]:
    index = aten.topk(x.value, k, dim, largest, sorted)[1]
    return map_orders(torch.gather, (x, dim, index), {}), index


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Return (channels, window, place), the elements of which each place takes one; padding counts as zero."""
    channels = x.reshape(-1, 1, *x.shape[-2:])
    return torch.nn.functional.unfold(channels, kernel, dilation, padding, stride)


@rule(aten.max_pool2d_with_indices)
def _max_pool2d(
    x: Series,
    kernel: list[int],
    stride: Sequence[int] = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Series, Tensor]:
    """Take the element that is largest at t = 0, the first of equal ones, as the ordinary forward pass does."""
    _, index = aten.max_pool2d_with_indices(x.value, kernel, stride, padding, dilation, ceil_mode)
    if not ceil_mode and x.degree > 0:
        windows = map_orders(_windows, (x.like(x.coef[:2]), kernel, stride or kernel, padding, dilation), {})
        _note_runners_up(windows.coef, windows.coef[0].argmax(-2, keepdim=True), -2)
    flat = map_orders(torch.flatten, (x, -2), {})
    picked = map_orders(torch.gather, (flat, -1, index.flatten(-2)), {})
    return picked.like(picked.coef.unflatten(-1, index.shape[-2:])), index
