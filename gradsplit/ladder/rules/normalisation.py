"""Softmax, variances and normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..series import Series, Value, add, map_orders, product, scale, square
from .elementwise import exp, log, multiply, power, raise_to
from .registry import rule, rule_of, unsupported

aten = torch.ops.aten
Dims = Sequence[int] | int | None


def _mean(x: Series, dims: Dims, keepdim: bool = True) -> Series:
    return map_orders(torch.mean, (x, dims), {"keepdim": keepdim})


def _sum(x: Series, dims: Dims) -> Series:
    return map_orders(torch.sum, (x, dims), {"keepdim": True})


def _from_max(x: Series, dim: int) -> Series:
    """Return x minus its largest value at t = 0, a constant: it keeps exp in range and changes no derivative."""
    return add(x, -x.value.amax(dim, keepdim=True)) if x.ndim else x


@rule(aten._softmax, aten.softmax)
def softmax(x: Series, dim: int, half_to_float: bool | None = None) -> Series:
    """e^x / sum e^x."""
    numerator = exp(_from_max(x, dim))
    return product(numerator, power(_sum(numerator, dim), -1.0))


@rule(aten._log_softmax, aten.log_softmax)
def log_softmax(x: Series, dim: int, half_to_float: bool | None = None) -> Series:
    """x - log sum e^x."""
    x = _from_max(x, dim)
    total = _sum(exp(x), dim)
    return add(x, log(total), -1)


@rule(aten.logsumexp)
def _logsumexp(x: Series, dim: Sequence[int], keepdim: bool = False) -> Series:
    top = x.value.amax(tuple(dim), keepdim=True)
    total = _sum(exp(add(x, -top)), tuple(dim))
    out = add(log(total), top)
    return out if keepdim else map_orders(torch.squeeze, (out, tuple(dim)), {})


def _centred(x: Series, dims: Dims) -> tuple[Series, Series, Series]:
    """Return the mean, x minus the mean, and the square of that."""
    mean = _mean(x, dims)
    centred = add(x, mean, -1)
    return mean, centred, square(centred)


@rule(aten.var.correction)
def variance(x: Series, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False) -> Series:
    """Return the mean squared deviation, with n - correction in the denominator."""
    dims = tuple(range(x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    count = 1
    for axis in dims:
        count *= x.shape[axis]
    squares = _sum(_centred(x, dims)[2], dims)
    out = scale(squares, 1 / (count - (1 if correction is None else correction)))
    return out if keepdim else map_orders(torch.squeeze, (out, dims), {})


@rule(aten.var_mean.correction)
def _variance_mean(
    x: Series, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False
) -> tuple[Series, Series]:
    dims = tuple(range(x.ndim)) if dim is None else dim
    return variance(x, dim, correction=correction, keepdim=keepdim), _mean(x, dims, keepdim)


@rule(aten.linalg_vector_norm)
def _vector_norm(
    x: Series,
    ord: float = 2,  # noqa: A002 - ATen's name
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    """Return (sum |x|^p)^(1/p); the largest and the smallest |x| for p = inf and -inf."""
    if ord == 0:
        raise unsupported(aten.linalg_vector_norm, "a norm of order 0")
    dims = tuple(range(x.ndim)) if dim is None else dim
    if math.isinf(ord):
        return rule_of(aten.amax if ord > 0 else aten.amin)(rule_of(aten.abs)(x), dims, keepdim)
    powers = square(x) if ord == 2 else raise_to(rule_of(aten.abs)(x), ord)
    total = map_orders(torch.sum, (powers, dims), {"keepdim": keepdim})
    return total if ord == 1 else power(total, 1 / ord)


def _affine(x: Value, weight: Value | None, bias: Value | None) -> Value:
    out = x if weight is None else multiply(x, weight)
    return out if bias is None else add(out, bias)


def _shaped(value: Value | None, shape: tuple[int, ...]) -> Value | None:
    if isinstance(value, Series):
        return value.like(value.coef.reshape(*value.coef.shape[:2], *shape))
    return value if value is None else value.reshape(shape)


def _standardised(x: Value, dims: Dims, eps: float) -> tuple[Value, Value, Value]:
    """Return (x - mean) / sqrt(variance + eps), the mean, and the reciprocal of the root."""
    if not isinstance(x, Series):
        mean, rstd = x.mean(dims, keepdim=True), (x.var(dims, correction=0, keepdim=True) + eps).rsqrt()
        return (x - mean) * rstd, mean, rstd
    mean, centred, squares = _centred(x, dims)
    rstd = power(add(_mean(squares, dims), eps), -0.5)
    return product(centred, rstd), mean, rstd


@rule(aten.native_layer_norm)
def _layer_norm(
    x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    out, mean, rstd = _standardised(x, tuple(range(-len(shape), 0)), eps)
    return _affine(out, weight, bias), mean, rstd


@rule(aten.native_group_norm)
def _group_norm(
    x: Value,
    weight: Value | None,
    bias: Value | None,
    num_samples: int,
    num_channels: int,
    area: int,
    num_groups: int,
    eps: float,
) -> tuple[Value, Value, Value]:
    out, mean, rstd = _standardised(_reshaped(x, (num_samples, num_groups, -1)), -1, eps)
    per_channel = (num_channels, *([1] * (x.ndim - 2)))
    out = _affine(_reshaped(out, tuple(x.shape)), _shaped(weight, per_channel), _shaped(bias, per_channel))
    stats = (num_samples, num_groups)
    return out, _reshaped(mean, stats), _reshaped(rstd, stats)


@rule(aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional)
def _batch_norm(
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Value, ...]:
    """Let batch statistics move with the step in training; running statistics are constant, and are not updated."""
    per_channel = (x.shape[1], *([1] * (x.ndim - 2)))
    if training:
        dims = (0, *range(2, x.ndim))
        out, mean, rstd = _standardised(x, dims, eps)
    else:
        assert running_mean is not None and running_var is not None
        rstd = (running_var + eps).rsqrt()
        out = multiply(add(x, -running_mean.reshape(per_channel)), rstd.reshape(per_channel))
        mean = running_mean
    out = _affine(out, _shaped(weight, per_channel), _shaped(bias, per_channel))
    return out, mean, rstd, running_mean, running_var


def _reshaped(x: Value, shape: tuple[int, ...]) -> Value:
    return x.like(x.coef.reshape(*x.coef.shape[:2], *shape)) if isinstance(x, Series) else x.reshape(shape)
