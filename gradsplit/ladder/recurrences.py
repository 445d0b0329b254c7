"""Elementary functions of a series, by the recurrences of their differential equations.

Every kernel maps coefficient arrays (degree + 1, n) to (order + 1, n), element by element. It works by *pushing*: as
soon as coefficient m of the result is final, its products with the known series are added to all higher orders in one
call. So each order costs one pass over contiguous memory, and the stored degree of the argument bounds the work.

Source of the recurrences: Griewank and Walther, Evaluating Derivatives, 2nd edition, chapter 13. Here they are written
with t y' in place of y', so that indices do not shift.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .series import padded, product_kernel, square_kernel, weighted


def _push(out: Tensor, m: int, tail: Tensor, factor: Tensor, value: float = 1) -> None:
    """Add what coefficient m contributes to all higher orders: out[m + j] += value * tail[j] * factor for j >= 1."""
    count = min(tail.shape[0] - 1, out.shape[0] - 1 - m)
    if count > 0:
        out[m + 1 : m + 1 + count].addcmul_(tail[1 : count + 1], factor, value=value)


def _push_square(out: Tensor, m: int, y: Tensor, value: float) -> None:
    """Add value * (the pairs of y*y whose larger index is m) to out: a square as it grows, with y known up to m."""
    stop = min(out.shape[0], 2 * m)
    if stop > m:
        out[m:stop].addcmul_(y[: stop - m], y[m], value=2 * value)
    if 2 * m < out.shape[0]:
        out[2 * m].addcmul_(y[m], y[m], value=value)


def _unknown(x: Tensor, order: int) -> Tensor:
    """Room for the coefficients of a function of x."""
    return torch.zeros(order + 1, *x.shape[1:], dtype=x.dtype, device=x.device)


def _integrated(slope: Tensor, start: Tensor) -> Tensor:
    """y from t y' and its value at t = 0; the slope's memory is used."""
    slope[1:] /= torch.arange(1, slope.shape[0], dtype=slope.dtype, device=slope.device)[:, None]
    slope[0] = start
    return slope


def exp(x: Tensor, order: int) -> Tensor:
    """y = e^x from t y' = y t x'."""
    y = _unknown(x, order)
    dx = weighted(x)
    y[0] = x[0].exp()
    for m in range(order):
        _push(y, m, dx, y[m])
        y[m + 1] /= m + 1
    return y


def div(a: Tensor, b: Tensor, order: int) -> Tensor:
    """q = a / b from q b = a."""
    q = padded(a, order) / b[0]
    b = b / b[0]
    for m in range(order):
        _push(q, m, b, q[m], value=-1)
    return q


def log(x: Tensor, order: int) -> Tensor:
    """y = log x from t y' = t x' / x."""
    return _integrated(div(weighted(x), x, order), x[0].log())


def power(x: Tensor, exponent: float | Tensor, order: int) -> Tensor:
    """y = x^a from x t y' = a y t x'; the square root is a = 1/2, its reciprocal a = -1/2; a may differ per element."""
    y = _unknown(x, order)
    x0, x = x[0], x / x[0]
    dx = weighted(x)
    y[0] = x0.pow(exponent)
    for m in range(order):
        _push(y, m, dx, y[m] * exponent)
        _push(y, m, x, y[m], value=-m)
        y[m + 1] /= m + 1
    return y


def tanh(x: Tensor, order: int) -> Tensor:
    """y = tanh x from t y' = (1 - y^2) t x'."""
    y, dx = _unknown(x, order), weighted(x)
    y[0] = x[0].tanh()
    w = torch.zeros_like(y)
    for m in range(order):
        _push_square(w, m, y, value=-1)
        if m == 0:  # 1 - tanh^2 cancels in a saturated unit; this form does not
            w[0] = 4 * torch.sigmoid(2 * x[0]) * torch.sigmoid(-2 * x[0])
        _push(y, m, dx, w[m])
        y[m + 1] /= m + 1
    return y


def sigmoid(x: Tensor, order: int) -> Tensor:
    """y = sigmoid x from t y' = (y - y^2) t x'."""
    y, dx = _unknown(x, order), weighted(x)
    y[0] = x[0].sigmoid()
    w = torch.zeros_like(y)
    for m in range(order):
        _push_square(w, m, y, value=-1)
        if m == 0:
            w[0] = x[0].sigmoid() * (-x[0]).sigmoid()
        else:
            w[m] += y[m]
        _push(y, m, dx, w[m])
        y[m + 1] /= m + 1
    return y


def sin_cos(x: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """sin x and cos x together: t s' = c t x', t c' = -s t x'."""
    s = _unknown(x, order)
    c, dx = torch.zeros_like(s), weighted(x)
    s[0], c[0] = x[0].sin(), x[0].cos()
    for m in range(order):
        _push(s, m, dx, c[m])
        _push(c, m, dx, s[m], value=-1)
        s[m + 1] /= m + 1
        c[m + 1] /= m + 1
    return s, c


def integral_of(slope: Tensor, x: Tensor, start: Tensor, order: int) -> Tensor:
    """y with y' = slope(t) x'(t) and y(0) = start."""
    return _integrated(padded(product_kernel(slope, weighted(x), order), order), start)


def erf(x: Tensor, order: int) -> Tensor:
    """y = erf x from t y' = 2/sqrt(pi) e^(-x^2) t x'."""
    slope = exp(-square_kernel(x, order), order) * (2 / math.sqrt(math.pi))
    return integral_of(slope, x, x[0].erf(), order)


def erfc(x: Tensor, order: int) -> Tensor:
    """y = 1 - erf x; its value does not cancel."""
    y = -erf(x, order)
    y[0] = x[0].erfc()
    return y


def _from_square(x: Tensor, sign: float, constant: float, order: int) -> Tensor:
    """sign x^2 + constant."""
    below = sign * square_kernel(x, order)
    below[0] += constant
    return below


def atan(x: Tensor, order: int) -> Tensor:
    """y = atan x from t y' = t x' / (1 + x^2)."""
    return _integrated(div(weighted(x), _from_square(x, 1, 1, order), order), x[0].atan())


def atanh(x: Tensor, order: int) -> Tensor:
    """y = atanh x from t y' = t x' / (1 - x^2)."""
    return _integrated(div(weighted(x), _from_square(x, -1, 1, order), order), x[0].atanh())


def asin(x: Tensor, order: int) -> Tensor:
    """y = asin x from t y' = (1 - x^2)^(-1/2) t x'."""
    return integral_of(power(_from_square(x, -1, 1, order), -0.5, order), x, x[0].asin(), order)


def acos(x: Tensor, order: int) -> Tensor:
    """y = acos x from t y' = -(1 - x^2)^(-1/2) t x'."""
    return integral_of(-power(_from_square(x, -1, 1, order), -0.5, order), x, x[0].acos(), order)


def asinh(x: Tensor, order: int) -> Tensor:
    """y = asinh x from t y' = (1 + x^2)^(-1/2) t x'."""
    return integral_of(power(_from_square(x, 1, 1, order), -0.5, order), x, x[0].asinh(), order)


def acosh(x: Tensor, order: int) -> Tensor:
    """y = acosh x from t y' = (x^2 - 1)^(-1/2) t x'."""
    return integral_of(power(_from_square(x, 1, -1, order), -0.5, order), x, x[0].acosh(), order)


def gelu(x: Tensor, order: int) -> Tensor:
    """x Phi(x), where Phi is the normal distribution function."""
    phi = erf(x / math.sqrt(2), order) / 2
    phi[0] = torch.special.ndtr(x[0])
    return padded(product_kernel(phi, x, order), order)


def gelu_tanh(x: Tensor, order: int) -> Tensor:
    """x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), the tanh approximation of GELU."""
    cube = product_kernel(square_kernel(x, order), x, order)
    inner = cube * 0.044715
    inner[: x.shape[0]] += x[: inner.shape[0]]
    gate = sigmoid(inner * (2 * math.sqrt(2 / math.pi)), order)
    return padded(product_kernel(gate, x, order), order)


def silu(x: Tensor, order: int) -> Tensor:
    """x sigmoid(x)."""
    return padded(product_kernel(sigmoid(x, order), x, order), order)
