"""Comparisons and what they choose: the branch that holds for small t > 0.

The values at t = 0 decide a comparison. If they are equal, the first order at which they differ decides. So the series
describes one side of a kink, the side to which the step goes. Where a unit changes its branch, the series continues on
the old one, since a power series cannot see the change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kinks import note_gap
from ..series import Series, Value, aligned, at_start, padded, promote, scale, shared
from .registry import Rule, rule

aten = torch.ops.aten


def sign_for_small_steps(a: Value, b: Value) -> Tensor:
    """Return the sign of a - b for small t > 0, (B, *shape); 0 where they agree at every order."""
    series = next(x for x in (a, b) if isinstance(x, Series))
    shape = torch.broadcast_shapes(*(x.shape for x in (a, b) if isinstance(x, (Series, Tensor))))
    first, second = _level(a, len(shape)), _level(b, len(shape))
    # There is no subtraction, since masked attention scores are -inf, and -inf is compared with -inf.
    _note(a, b, first, second, shape)
    above, below = torch.as_tensor(first > second), torch.as_tensor(first < second)
    sign = above.double() - below.double()
    sign = sign.expand(sign.shape[0], *shape)
    undecided = torch.as_tensor(first == second).expand(*sign.shape)
    if not bool(undecided.any()):
        return sign
    rest = [x.coef[1:] for x in (a, b) if isinstance(x, Series)]
    coefs = [aligned(c, len(shape)) for c in rest]
    degree = max(c.shape[0] for c in coefs)
    if degree == 0:
        return sign
    if isinstance(a, Series) and isinstance(b, Series):
        tail = padded(coefs[0], degree - 1) - padded(coefs[1], degree - 1)
    else:
        tail = coefs[0] if isinstance(a, Series) else -coefs[0]
    sign = sign.expand(series.num_bins, *shape)
    undecided = undecided.expand(series.num_bins, *shape)
    for coefficient in tail:
        if not bool(undecided.any()):
            break
        sign = torch.where(undecided, coefficient.sign(), sign)
        undecided = undecided & (coefficient == 0)
    return sign


def _level(x: Value, ndim: int) -> Value:
    """Return the values at t = 0, with a first axis for the bins that may differ."""
    if isinstance(x, Series):
        return aligned(x.start[None], ndim)[0]
    return x.reshape(1, *[1] * (ndim - x.ndim), *x.shape) if isinstance(x, Tensor) else x


def _note(a: Value, b: Value, first: Value, second: Value, shape: torch.Size) -> None:
    slopes = [
        sign * aligned(x.coef[1:2], len(shape))[0]
        for x, sign in ((a, 1), (b, -1))
        if isinstance(x, Series) and x.degree > 0 and x.coef.is_floating_point()
    ]
    if slopes:
        slope_B = sum(slopes[1:], slopes[0])
        gap = torch.as_tensor(first, dtype=slope_B.dtype) - torch.as_tensor(second, dtype=slope_B.dtype)
        note_gap(gap, slope_B.expand(slope_B.shape[0], *shape))


def _comparison(decide: Any) -> Rule:
    def apply(a: Value, b: Value) -> Value:
        order = next(x.order for x in (a, b) if isinstance(x, Series))
        return shared(decide(sign_for_small_steps(a, b)), order)

    return apply


for _op, _decide in {
    aten.gt: lambda s: s > 0,
    aten.ge: lambda s: s >= 0,
    aten.lt: lambda s: s < 0,
    aten.le: lambda s: s <= 0,
    aten.eq: lambda s: s == 0,
    aten.ne: lambda s: s != 0,
}.items():
    rule(_op)(_comparison(_decide))


def _locally_constant(op: Any) -> Rule:
    """Make the rule of an operation whose result does not move with t, or that acts on the decisions of the bins."""

    def apply(*args: Any, **kwargs: Any) -> Value:
        return at_start(op, *args, **kwargs)

    return apply


for _op in (
    aten.logical_not,
    aten.logical_and,
    aten.logical_or,
    aten.bitwise_not,
    aten.bitwise_and,
    aten.bitwise_or,
    aten.any,
    aten.all,
    aten.isnan,
    aten.isinf,
    aten.floor,
    aten.ceil,
    aten.round,
    aten.trunc,
    aten.argmax,
    aten.argmin,
):
    rule(_op)(_locally_constant(_op))


@rule(aten.sign, aten.sgn)
def _sign(x: Series) -> Value:
    return shared(sign_for_small_steps(x, 0.0), x.order)


@rule(aten.where.self)
def where(condition: Value, a: Value, b: Value) -> Value:
    """Take the coefficients of the branch that holds; those of the other one, even inf or NaN, have no effect."""
    moving = next(x for x in (condition, a, b) if isinstance(x, Series))
    if not isinstance(a, Series) and not isinstance(b, Series):
        out = torch.where(aligned(condition.coef, max(a.ndim, b.ndim, condition.ndim)), a, b)
        return moving.like(out)
    like = a if isinstance(a, Series) else b
    a, b = (x if isinstance(x, Series) else promote(torch.as_tensor(x), like) for x in (a, b))
    degree = max(a.degree, b.degree)
    mask = condition.coef if isinstance(condition, Series) else condition[None, None]
    ndim = max(a.ndim, b.ndim, mask.ndim - 2)
    left, right = (aligned(padded(x.coef, degree), ndim) for x in (a, b))
    return like.like(torch.where(aligned(mask, ndim), left, right))


@rule(aten.masked_fill)
def _masked_fill(x: Value, mask: Value, value: Value) -> Value:
    return where(mask, torch.as_tensor(value, dtype=torch.float64), x)


def positive(x: Series) -> Value:
    """Return whether x > 0 for small t > 0."""
    return _comparison(lambda s: s > 0)(x, 0.0)


@rule(aten.relu)
def _relu(x: Series) -> Value:
    return where(positive(x), x, torch.zeros((), dtype=torch.float64))


@rule(aten.abs)
def _abs(x: Series) -> Value:
    sign = _sign(x)
    return scale(x, sign) if isinstance(sign, Tensor) else x.like(x.coef * sign.coef)


@rule(aten.leaky_relu)
def _leaky_relu(x: Series, negative_slope: float = 0.01) -> Value:
    return where(positive(x), x, scale(x, negative_slope))


@rule(aten.maximum, aten.fmax)
def maximum(a: Value, b: Value) -> Value:
    """Take the value that is larger for small t > 0."""
    return where(_comparison(lambda s: s >= 0)(a, b), a, b)


@rule(aten.minimum, aten.fmin)
def minimum(a: Value, b: Value) -> Value:
    """Take the value that is smaller for small t > 0."""
    return where(_comparison(lambda s: s <= 0)(a, b), a, b)


@rule(aten.clamp)
def _clamp(x: Value, min: Value = None, max: Value = None) -> Value:  # noqa: A002 - ATen's names
    low, high = (
        v if v is None or isinstance(v, Series) else torch.as_tensor(v, dtype=torch.float64) for v in (min, max)
    )
    x = x if low is None else maximum(x, low)
    return x if high is None else minimum(x, high)


@rule(aten.clamp_min)
def _clamp_min(x: Series, low: Value) -> Value:
    return _clamp(x, low)


@rule(aten.hardtanh)
def _hardtanh(x: Series, min_val: float = -1, max_val: float = 1) -> Value:
    return _clamp(x, min_val, max_val)
