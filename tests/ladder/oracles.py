"""Independent ways to the same Taylor coefficients: nested autograd, and mpmath at 60 digits."""

from __future__ import annotations

import contextlib
import math

import mpmath
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def in_float64():
    """Constants that a loss makes are float64 meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def nested_autograd(loss_of_params, params, direction, order):
    """Taylor coefficients c_0 … c_order by differentiating the derivative, again and again."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        value = loss_of_params({name: p + t * direction[name] for name, p in params.items()})
        coefficients = [value.item()]
        for k in range(1, order + 1):
            if not value.requires_grad:
                coefficients.append(0.0)
                continue
            (value,) = torch.autograd.grad(value, t, create_graph=True)
            coefficients.append(value.item() / math.factorial(k))
    return np.array(coefficients)


def mpmath_taylor(function, at, order, circle, digits=60, points=256):
    """Taylor coefficients of a scalar function by Cauchy's integral over a circle inside its radius of convergence.

    With `circle` at most 0.75 of the radius the sum over 256 points is off by 0.75^256 = 1e-32 at order 0.
    """
    with mpmath.workdps(digits):
        roots = [mpmath.expjpi(mpmath.mpf(2 * j) / points) for j in range(points)]
        values = [function(mpmath.mpf(at) + circle * root) for root in roots]
        return [
            mpmath.fsum(value * roots[-j * k % points] for j, value in enumerate(values)).real
            / (points * mpmath.mpf(circle) ** k)
            for k in range(order + 1)
        ]


def relative_errors(coefficient, reference):
    """|c_k / reference_k - 1| for one series in signed-log form against mpmath numbers."""
    with mpmath.workdps(60):
        return np.array(
            [
                float(abs(sign * mpmath.exp(mpmath.mpf(float(log))) / r - 1)) if r else float(sign != 0)
                for sign, log, r in zip(coefficient.sign.tolist(), coefficient.log.tolist(), reference, strict=True)
            ]
        )


def random_direction(params):
    return {name: torch.randn_like(p) for name, p in params.items()}
