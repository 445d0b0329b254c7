"""Largest and smallest elements, sorting, max-pooling: the element that leads for small t > 0.

Among values that are equal at t = 0, a reduction takes the one that leads at the first order at which they differ.
Sorting, topk and pooling take the one that the ordinary forward pass takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kinks import note_gap
from ..series import Series, Value, at_start, map_orders, shared
from .registry import rule

aten = torch.ops.aten


def _note_runners_up(coef: Tensor, index: Tensor, axis: int, largest: bool = True) -> None:
    """Note where another element of the axis would overtake the leader; ``coef`` is (degree + 1, B, *shape)."""
    if coef.shape[0] > 1:
        lead = coef[:2].take_along_dim(index[None], axis)
        _note_lead(lead - coef[:2] if largest else coef[:2] - lead)


def _note_lead(lead: Tensor) -> None:
    """Note where a lead, (2, B, *shape), falls to zero; elements that do not lie behind decide nothing."""
    gap, slope = lead.unbind()
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


def _extreme(x: Series, dim: int, keepdim: bool, largest: bool) -> tuple[Series, Value]:
    index = _leader(x, dim, largest)
    axis = dim % x.ndim + 2
    _note_runners_up(x.coef, index, axis, largest)
    coef = x.coef.take_along_dim(index[None], axis)
    return x.like(coef if keepdim else coef.squeeze(axis)), shared(
        index if keepdim else index.squeeze(axis - 1), x.order
    )


@rule(aten.max.dim)
def _max_dim(x: Series, dim: int, keepdim: bool = False) -> tuple[Series, Value]:
    return _extreme(x, dim, keepdim, largest=True)


@rule(aten.min.dim)
def _min_dim(x: Series, dim: int, keepdim: bool = False) -> tuple[Series, Value]:
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


@rule(aten.sort.default, aten.sort.stable)
def _sort(x: Series, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> tuple[Series, Value]:
    """Keep the order at t = 0; equal values keep the order of the ordinary forward pass."""
    index = at_start(lambda value: aten.sort.stable(value, stable=stable, dim=dim, descending=descending)[1], x)
    ordered = map_orders(torch.gather, (x, dim, index), {})
    if x.ndim and x.degree > 0:
        lead = ordered.coef[:2].diff(dim=dim % x.ndim + 2)
        _note_lead(-lead if descending else lead)
    return ordered, index


@rule(aten.topk)
def _topk(
    x: Series,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002 - ATen's name
) -> tuple[Series, Value]:
    index = at_start(lambda value: aten.topk(value, k, dim, largest, sorted)[1], x)
    picked = map_orders(torch.gather, (x, dim, index), {})
    if x.ndim and k > 0 and x.degree > 0:
        sign, axis = 1 if largest else -1, dim % x.ndim + 2
        inside, every = sign * picked.coef[:2], sign * x.coef[:2]
        place = index.coef[0] if isinstance(index, Series) else index[None]
        outside = every[0].scatter(axis - 1, place.expand_as(inside[0]), -torch.inf)
        first, last = outside.argmax(axis - 1, keepdim=True), inside[0].argmin(axis - 1, keepdim=True)
        _note_lead(inside.take_along_dim(last[None], axis) - every)
        if x.shape[dim] > k:
            _note_lead(inside - every.take_along_dim(first[None], axis))
    return picked, index


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, pad: float) -> Tensor:
    """Return (channels, window, place), the elements of which each place takes one; the padding is ``pad``."""
    channels = x.reshape(-1, 1, *x.shape[-2:])
    below, beside = padding if isinstance(padding, Sequence) and len(padding) == 2 else _twice(padding)
    framed = torch.nn.functional.pad(channels, (beside, beside, below, below), value=pad)
    return torch.nn.functional.unfold(framed, kernel, dilation, 0, stride)


def _twice(padding: Any) -> tuple[int, int]:
    one = padding[0] if isinstance(padding, Sequence) else padding
    return one, one


@rule(aten.max_pool2d_with_indices)
def _max_pool2d(
    x: Series,
    kernel: list[int],
    stride: Sequence[int] = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Series, Value]:
    """Take the element that is largest at t = 0, the first of equal ones, as the ordinary forward pass does."""
    geometry = (kernel, stride, padding, dilation)
    index = at_start(lambda value: aten.max_pool2d_with_indices(value, *geometry, ceil_mode)[1], x)
    if not ceil_mode and x.degree > 0:
        # The padding is -inf and does not move, so it never leads; a finite lead over it is no decision.
        cut = partial(_windows, kernel=kernel, stride=stride or kernel, padding=padding, dilation=dilation)
        windows = [torch.vmap(partial(cut, pad=pad))(c) for c, pad in zip(x.coef[:2], (-torch.inf, 0.0), strict=True)]
        _note_runners_up(torch.stack(windows), windows[0].argmax(-2, keepdim=True), -2)
    flat = map_orders(torch.flatten, (x, -2), {})
    place = index.like(index.coef.flatten(-2)) if isinstance(index, Series) else index.flatten(-2)
    picked = map_orders(torch.gather, (flat, -1, place), {})
    return picked.like(picked.coef.unflatten(-1, index.shape[-2:])), index
