"""Sums, scalings and elementary functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import recurrences
from ..series import Series, Value, add, at_start, blockwise, padded, product, promote, scale, square
from .branches import positive, where
from .registry import Rule, linear, rule, unsupported

aten = torch.ops.aten

linear(aten.neg, aten.mul.Scalar, aten.div.Scalar, aten.clone, aten.detach, aten.alias, aten.lift_fresh_copy)


def _unary(kernel: Callable[[Tensor, int], Tensor]) -> Rule:
    def apply(x: Series) -> Series:
        return blockwise(lambda coef: kernel(coef, x.order), x)

    return apply


exp, log = _unary(recurrences.exp), _unary(recurrences.log)


MOST_PRODUCTS = 64  # the largest exponent of which a power is a product


def power(x: Series, exponent: float) -> Series:
    """Raise x to a constant power, which x at t = 0 must allow."""
    return blockwise(lambda coef: recurrences.power(coef, exponent, x.order), x)


for _op, _kernel in {
    aten.exp: recurrences.exp,
    aten.log: recurrences.log,
    aten.tanh: recurrences.tanh,
    aten.sigmoid: recurrences.sigmoid,
    aten.erf: recurrences.erf,
    aten.erfc: recurrences.erfc,
    aten.asin: recurrences.asin,
    aten.acos: recurrences.acos,
    aten.atan: recurrences.atan,
    aten.asinh: recurrences.asinh,
    aten.acosh: recurrences.acosh,
    aten.atanh: recurrences.atanh,
    aten.silu: recurrences.silu,
    aten.sqrt: lambda x, order: recurrences.power(x, 0.5, order),
    aten.rsqrt: lambda x, order: recurrences.power(x, -0.5, order),
    aten.reciprocal: lambda x, order: recurrences.power(x, -1.0, order),
    aten.sin: lambda x, order: recurrences.sin_cos(x, order)[0],
    aten.cos: lambda x, order: recurrences.sin_cos(x, order)[1],
}.items():
    rule(_op)(_unary(_kernel))


@rule(aten.add)
def _add(a: Value, b: Value, *, alpha: float = 1) -> Value:
    return add(a, b, alpha)


@rule(aten.sub)
def _sub(a: Value, b: Value, *, alpha: float = 1) -> Value:
    return add(a, b, -alpha)


@rule(aten.rsub)
def _rsub(a: Value, b: Value, alpha: float = 1) -> Value:
    return add(b, a, -alpha)


@rule(aten.mul.Tensor)
def multiply(a: Value, b: Value) -> Value:
    """Multiply two values; either may be constant."""
    if isinstance(a, Series) and isinstance(b, Series):
        if not a.coef.is_floating_point() and not b.coef.is_floating_point():
            return at_start(torch.mul, a, b)
        return square(a) if a is b else product(a, b)
    return scale(a, b) if isinstance(a, Series) else scale(b, a)


@rule(aten.div.Tensor)
def divide(a: Value, b: Value) -> Value:
    """Divide two values; either may be constant."""
    if not isinstance(b, Series):
        return scale(a, 1 / b)
    if not isinstance(a, Series):
        return scale(power(b, -1.0), a)
    return blockwise(lambda x, y: recurrences.div(x, y, a.order), a, b)


@rule(aten.pow.Tensor_Scalar)
def raise_to(x: Series, exponent: float) -> Series:
    """Raise x to a constant power, by repeated products for small whole exponents, which are right at x = 0 too."""
    if exponent == 0:
        return x.like(torch.ones_like(x.coef[:1]))
    if exponent not in range(1, MOST_PRODUCTS + 1):
        return power(x, float(exponent))
    left, found = int(exponent), None
    while left:
        if left % 2:
            found = x if found is None else product(x, found)
        x, left = (square(x) if left > 1 else x), left // 2
    assert found is not None
    return found


@rule(aten.square)
def _square(x: Series) -> Series:
    return square(x)


@rule(aten.pow.Tensor_Tensor)
def _power_of_tensor(x: Value, exponent: Value) -> Value:
    if not isinstance(exponent, Series):
        values = exponent.unique().tolist()
        if not values or not all(value in range(MOST_PRODUCTS + 1) for value in values):
            # A logarithm would refuse x < 0, which a whole exponent allows.
            return blockwise(lambda y, e: recurrences.power(y, e[0], x.order), x, promote(exponent, x))
        found: Value = add(raise_to(x, values[0]), torch.zeros_like(exponent, dtype=x.coef.dtype))
        for value in values[1:]:
            found = where(exponent == value, raise_to(x, value), found)
        return found
    return exp(multiply(exponent, log(x) if isinstance(x, Series) else x.log()))


@rule(aten.pow.Scalar)
def _power_of_constant(base: float, exponent: Series) -> Series:
    return exp(scale(exponent, math.log(base)))


@rule(aten.exp2)
def _exp2(x: Series) -> Series:
    return _power_of_constant(2.0, x)


@rule(aten.log1p)
def _log1p(x: Series) -> Series:
    y = log(add(x, 1.0))
    y.coef[0] = x.coef[0].log1p()
    return y


@rule(aten.log2)
def _log2(x: Series) -> Series:
    return scale(log(x), 1 / math.log(2))


@rule(aten.log10)
def _log10(x: Series) -> Series:
    return scale(log(x), 1 / math.log(10))


@rule(aten.expm1)
def _expm1(x: Series) -> Series:
    y = exp(x)
    y.coef[0] = x.coef[0].expm1()
    return y


@rule(aten.gelu)
def _gelu(x: Series, *, approximate: str = "none") -> Series:
    return _unary(recurrences.gelu if approximate == "none" else recurrences.gelu_tanh)(x)


@rule(aten.tan)
def _tan(x: Series) -> Series:
    def kernel(coef: Tensor, order: int) -> Tensor:
        sine, cosine = recurrences.sin_cos(coef, order)
        return recurrences.div(sine, cosine, order)

    return _unary(kernel)(x)


def _exponential_pair(x: Series, sign: float) -> Series:
    """(e^x + sign e^-x) / 2."""
    return scale(add(exp(x), exp(scale(x, -1.0)), sign), 0.5)


@rule(aten.sinh)
def _sinh(x: Series) -> Series:
    return _exponential_pair(x, -1.0)


@rule(aten.cosh)
def _cosh(x: Series) -> Series:
    return _exponential_pair(x, 1.0)


@rule(aten.elu)
def _elu(x: Series, alpha: float = 1, outer: float = 1, inner: float = 1) -> Value:
    below = scale(_expm1(scale(x, inner)), alpha)
    return scale(where(positive(x), x, below), outer)


@rule(aten.prod.default)
def _prod_all(x: Series) -> Value:
    return _prod(x.like(x.coef.flatten(2)), 0)


@rule(aten.prod.dim_int)
def _prod(x: Series, dim: int, keepdim: bool = False) -> Value:
    """Multiply halves with each other until one entry is left, which takes log2(n) products instead of n."""
    axis = dim % x.ndim + 2
    while (length := x.coef.shape[axis]) > 1:
        half, rest = length // 2, x.coef.narrow(axis, length // 2 * 2, length % 2)
        paired = product(x.like(x.coef.narrow(axis, 0, half)), x.like(x.coef.narrow(axis, half, half)))
        x = x.like(torch.cat([paired.coef, padded(rest, paired.degree)], axis)) if length % 2 else paired
    return x if keepdim else x.like(x.coef.squeeze(axis))


@rule(aten.addcmul)
def _addcmul(x: Value, a: Value, b: Value, *, value: float = 1) -> Value:
    return add(x, multiply(a, b), value)


@rule(aten.lerp)
def _lerp(start: Value, end: Value, weight: Value) -> Value:
    return add(start, multiply(weight, add(end, start, -1)))


@rule(aten._to_copy, aten._conj_physical)
def _to_copy(x: Series, *, dtype: torch.dtype | None = None, **_: Any) -> Value:
    """Keep series in float64: a cast to a shorter float is left out. A cast to integers takes the value at t = 0."""
    if dtype is None:
        return x
    if dtype.is_complex:
        raise unsupported(aten._to_copy, f"a cast of a value that depends on the step to {dtype}")
    if dtype.is_floating_point:
        return x if x.coef.is_floating_point() else x.like(x.coef.to(torch.float64))
    return at_start(torch.Tensor.to, x, dtype=dtype)


def _factory(op: Any) -> Rule:
    def apply(x: Series, *args: Any, **kwargs: Any) -> Tensor:
        return op(x.value, *args, **kwargs)

    return apply


for _op in (
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.rand_like,
    aten.randn_like,
    aten.bernoulli,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
):
    rule(_op)(_factory(_op))
