"""Signed-log numbers: a sign and the logarithm of the magnitude.

Derivatives of order 99 contain 99! = 9.3e155, and the recipe raises them to the power 2^135 3^153 = 10^113.6. Such
numbers overflow, but their logarithms do not. float64 keeps the *exponent* of such a number to 16 digits. After
repeated powers the logarithm is right to a relative 1e-16, while no digit of the number itself is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SignedLog:
    """An array of numbers sign * exp(log).

    Args:
        sign: -1, 0 or 1; nan where the number is not known.
        log: natural logarithm of the magnitude; -inf for zero.
    """

    sign: Floats
    log: Floats

    @staticmethod
    def of(values: Floats | float) -> SignedLog:
        """Make them from ordinary numbers."""
        array = np.asarray(values, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return SignedLog(np.sign(array), np.log(np.abs(array)))

    @property
    def log10(self) -> Floats:
        """Decimal logarithm of the magnitude."""
        return self.log / math.log(10)

    def __getitem__(self, index: Any) -> SignedLog:
        return SignedLog(np.asarray(self.sign[index]), np.asarray(self.log[index]))

    def __mul__(self, other: SignedLog) -> SignedLog:
        sign = self.sign * other.sign
        return SignedLog(sign, np.where(sign == 0, -np.inf, self.log + other.log))

    def __pow__(self, exponent: int) -> SignedLog:
        """Return a whole power: the sign to that power, and the logarithm times it.

        >>> (SignedLog.of(-10.0) ** 3).log10.round(12).item()
        3.0
        """
        return SignedLog(self.sign**exponent, self.log * exponent)

    def times_exp(self, log_factor: Floats | float) -> SignedLog:
        """Return these numbers times e^log_factor."""
        return SignedLog(self.sign, self.log + log_factor)

    def sum(self, axis: int) -> SignedLog:
        """Return the sum along an axis, scaled by its largest term so that nothing overflows."""
        top = self.log.max(axis=axis, keepdims=True)
        finite_top = np.where(np.isfinite(top), top, 0.0)
        total = SignedLog.of((self.sign * np.exp(self.log - finite_top)).sum(axis=axis))
        return total.times_exp(finite_top.squeeze(axis))

    def to_float(self, dtype: type[np.floating] = np.float64) -> NDArray[np.floating]:
        """Return the ordinary numbers, with 0 or inf where the format cannot hold them."""
        with np.errstate(over="ignore", under="ignore"):
            return (self.sign * np.exp(self.log)).astype(dtype)

    def text(self, index: tuple[int, ...] = ()) -> str:
        """Return one number in scientific notation; its exponent is exact at any size.

        >>> SignedLog.of(-1500.0).text()
        '-1.50e+3'
        """
        sign, log10 = float(self.sign[index]), float(self.log10[index])
        if sign == 0:
            return "0"
        if not math.isfinite(log10):
            return "nan" if math.isnan(log10) else f"{'-' * (sign < 0)}inf"
        mark = "-" if sign < 0 else "+"
        if abs(log10) >= 1e15:  # no digit of the mantissa is left
            return f"{mark}10^({log10:.6e})"
        exponent = math.floor(log10)
        mantissa = 10 ** (log10 - exponent)
        if f"{mantissa:.2f}" == "10.00":
            mantissa, exponent = 1.0, exponent + 1
        return f"{mark}{mantissa:.2f}e{exponent:+d}"


def factorial_log(order: int) -> Floats:
    """Return log k! for k = 0 … order: the factors from Taylor coefficients to derivatives."""
    return np.array([math.lgamma(k + 1) for k in range(order + 1)])
