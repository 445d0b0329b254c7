"""Functions of one number, to order 99, against mpmath at 60 digits."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch

from gradsplit.ladder import recurrences, taylor_ladder
from tests.ladder.oracles import mpmath_taylor, relative_errors

AT = 0.3
ORDER = 99

# The function, the same for mpmath, and a circle about AT on which mpmath integrates: inside the radius of convergence
# (so that it reaches no singularity), and large enough that order 99 keeps its digits for an entire function.
CASES = {
    "exp": (torch.exp, mpmath.exp, 30),
    "log(1 + x)": (torch.log1p, lambda x: mpmath.log(1 + x), 0.9),
    "1 / (1 - x)": (lambda x: 1 / (1 - x), lambda x: 1 / (1 - x), 0.5),
    "tanh": (torch.tanh, mpmath.tanh, 1.1),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + mpmath.exp(-x)), 2.2),
    "erf": (torch.erf, mpmath.erf, 5),
    "sin": (torch.sin, mpmath.sin, 30),
    "sqrt": (torch.sqrt, mpmath.sqrt, 0.2),
    "x^2.5": (lambda x: x**2.5, lambda x: x ** mpmath.mpf(2.5), 0.2),
    "atan": (torch.atan, mpmath.atan, 0.75),
    "gelu": (torch.nn.functional.gelu, lambda x: x / 2 * (1 + mpmath.erf(x / mpmath.sqrt(2))), 7),
    "exp(tanh(x^2))": (lambda x: torch.exp(torch.tanh(x * x)), lambda x: mpmath.exp(mpmath.tanh(x * x)), 0.75),
    "sin(exp x) / (2 + x)": (
        lambda x: torch.sin(torch.exp(x)) / (2 + x),
        lambda x: mpmath.sin(mpmath.exp(x)) / (2 + x),
        1.6,
    ),
    "log(1 + erf(x)^2)": (
        lambda x: torch.log1p(torch.erf(x) ** 2),
        lambda x: mpmath.log(1 + mpmath.erf(x) ** 2),
        0.55,
    ),
}


def _ladder(function):
    point = {"x": torch.tensor(AT, dtype=torch.float64)}
    return taylor_ladder(lambda p: function(p["x"]), point, {"x": torch.tensor(1.0)}, order=ORDER)


def _condition(reference):
    """|x c_k'(x) / c_k(x)|: what rounding of the argument alone does to c_k; c_k' = (k + 1) c_{k+1}."""
    ratios = [
        abs(AT * (k + 1) * reference[k + 1] / reference[k]) if reference[k] else mpmath.inf for k in range(ORDER + 1)
    ]
    return np.array([float(r) for r in ratios])


@pytest.mark.parametrize("name", CASES)
def test_order_99_agrees_with_mpmath_where_the_coefficient_is_well_conditioned(name):
    function, exact, circle = CASES[name]
    reference = mpmath_taylor(exact, AT, ORDER + 1, circle)
    well_conditioned = _condition(reference) < 1e4
    assert well_conditioned.sum() > 0.8 * ORDER
    error = relative_errors(_ladder(function).coefficient[:, 0], reference[:-1])
    assert error[well_conditioned].max() < 1e-8, (name, int(error.argmax()), error.max())


@pytest.mark.parametrize(
    ("name", "radius"),
    [
        ("1 / (1 - x)", 1 - AT),
        ("log(1 + x)", 1 + AT),
        ("tanh", abs(complex(AT, -np.pi / 2))),
        ("sqrt", AT),
        ("atan", abs(complex(AT, -1))),
    ],
)
def test_the_radius_is_the_distance_to_the_nearest_singularity(name, radius):
    ladder = _ladder(CASES[name][0])
    assert ladder.radius_B[0] == pytest.approx(radius, rel=0.03)
    assert ladder.radii[0].ratio == pytest.approx(radius, rel=0.01)


def test_order_99_neither_overflows_nor_underflows_far_from_one():
    """The same function of 1e-40 x, where plain coefficients would be 1e-3960, and of 1e40 x."""
    for size in (1e-40, 1e40):
        point = {"x": torch.tensor(AT / size, dtype=torch.float64)}
        ladder = taylor_ladder(lambda p, s=size: 1 / (1 - s * p["x"]), point, {"x": torch.tensor(1.0)}, order=ORDER)
        exact = -(np.arange(ORDER + 1) + 1) * np.log(1 - AT) + np.arange(ORDER + 1) * np.log(size)
        np.testing.assert_allclose(ladder.coefficient.log[:, 0], exact, rtol=1e-12, atol=1e-9)


def _tanh_without_its_square(x, order):
    return recurrences.exp(x, order) / recurrences.exp(x, order)[0] * x[0].tanh()


def _div_off_by_one(a, b, order):
    q = recurrences.padded(a, order) / b[0]
    for m in range(order - 1):
        recurrences._push(q, m, b / b[0], q[m], value=-1)
    return q


@pytest.mark.parametrize(
    ("kernel", "fault", "name"),
    [("tanh", _tanh_without_its_square, "exp(tanh(x^2))"), ("div", _div_off_by_one, "log(1 + x)")],
)
def test_a_wrong_recurrence_is_caught(monkeypatch, kernel, fault, name):
    if kernel == "tanh":
        from gradsplit.ladder.rules import RULES, elementwise

        monkeypatch.setitem(RULES, torch.ops.aten.tanh, elementwise._unary(fault))
    else:
        monkeypatch.setattr(recurrences, kernel, fault)
    with pytest.raises(AssertionError):
        test_order_99_agrees_with_mpmath_where_the_coefficient_is_well_conditioned(name)


@pytest.mark.parametrize("order", [10, 24, 30])
def test_derivatives_far_below_the_range_of_float64(order):
    """e^(1e-30 t): c_k = 1e-30^k / k!, and at order 24 that is 10^-744."""
    point = {"x": torch.zeros((), dtype=torch.float64)}
    ladder = taylor_ladder(lambda p: (p["x"] * 1e-30).exp(), point, {"x": torch.ones(())}, order=order)
    expected = [-30 * k * math.log(10) - math.lgamma(k + 1) for k in range(order + 1)]
    np.testing.assert_allclose(ladder.coefficient.log[:, 0], expected, rtol=1e-13, atol=1e-13)


def test_a_scale_that_never_settles_changes_no_coefficient(monkeypatch):
    """1 / (1 - t) with a pilot that always asks for another scale: the scale that was used is the one taken out."""
    monkeypatch.setattr("gradsplit.ladder.ladder.crude_log_radius", lambda c: np.full(c.log.shape[1], math.log(4.0)))
    point = {"x": torch.zeros((), dtype=torch.float64)}
    ladder = taylor_ladder(lambda p: 1 / (1 - p["x"]), point, {"x": torch.ones(())}, order=25)
    np.testing.assert_allclose(ladder.coefficient.log[:, 0], 0, atol=1e-11)


def test_predictions_for_steps_and_orders_that_do_not_exist():
    ladder = taylor_ladder(lambda p: p["x"] ** 2, {"x": torch.tensor(3.0)}, {"x": torch.tensor(-1.0)}, order=4)
    assert ladder.predict(1.0).tolist() == pytest.approx([4.0])
    assert ladder.predict(1.0, order=0).tolist() == pytest.approx([9.0])
    with pytest.raises(ValueError, match=r"predict\(step=-1.0\): expected steps >= 0"):
        ladder.predict(-1.0)
    for order in (-1, 5):
        with pytest.raises(ValueError, match=rf"predict\(order={order}\): expected an order from 0 to the ladder's 4"):
            ladder.predict(1.0, order=order)
