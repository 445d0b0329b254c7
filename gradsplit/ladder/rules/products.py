"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..series import Series, Value, add, bilinear, map_orders, scale
from ..series import matmul as series_matmul
from .registry import rule

aten = torch.ops.aten


@rule(aten.mm, aten.bmm)
def matmul(a: Value, b: Value) -> Value:
    """Multiply two matrices; a constant factor is multiplied with all orders of the other one at once."""
    if isinstance(a, Series) and isinstance(b, Series):
        return series_matmul(a, b)
    if isinstance(a, Series):
        return a.like(torch.matmul(a.coef, b))
    return b.like(torch.matmul(a, b.coef))


@rule(aten.mv, aten.dot)
def _with_vector(a: Value, b: Value) -> Value:
    op: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    if isinstance(a, Series) and isinstance(b, Series):
        return bilinear(op, a, b)
    return _one_side(op, a, b)


@rule(aten.addmm, aten.baddbmm)
def _addmm(bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    product = matmul(a, b) if isinstance(a, Series) or isinstance(b, Series) else torch.matmul(a, b)
    return add(scale(product, alpha), scale(bias, beta))


@rule(aten.addbmm)
def _addbmm(bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """Add the sum over a batch of products."""
    product = matmul(a, b) if isinstance(a, Series) or isinstance(b, Series) else torch.matmul(a, b)
    total = map_orders(torch.sum, (product, 0), {}) if isinstance(product, Series) else product.sum(0)
    return add(scale(total, alpha), scale(bias, beta))


@rule(aten.addmv)
def _addmv(bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    product = _with_vector(a, b) if isinstance(a, Series) or isinstance(b, Series) else torch.mv(a, b)
    return add(scale(product, alpha), scale(bias, beta))


@rule(aten.convolution)
def _convolution(x: Value, weight: Value, bias: Value, *geometry: Any) -> Value:
    def op(inputs: Tensor, kernel: Tensor) -> Tensor:
        return aten.convolution(inputs, kernel, None, *geometry)

    if isinstance(x, Series) and isinstance(weight, Series):
        out: Value = bilinear(op, x, weight)
    elif isinstance(x, Series) or isinstance(weight, Series):
        out = _one_side(op, x, weight)
    else:
        out = op(x, weight)
    if bias is None:
        return out
    spatial = (1,) * (out.ndim - 2)
    if isinstance(bias, Series):
        return add(out, bias.like(bias.coef.reshape(*bias.coef.shape, *spatial)))
    return add(out, bias.reshape(-1, *spatial))


def _one_side(op: Callable[[Tensor, Tensor], Tensor], a: Value, b: Value) -> Series:
    """Apply a bilinear operation with one constant side; it is linear in the other side."""
    moving = a if isinstance(a, Series) else b
    in_dims = (0, None) if isinstance(a, Series) else (None, 0)
    args = (a.coef.flatten(0, 1), b) if isinstance(a, Series) else (a, b.coef.flatten(0, 1))
    out = torch.vmap(op, in_dims=in_dims)(*args)
    return moving.like(out.unflatten(0, moving.coef.shape[:2]))
