"""Radius and safe step of series that are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsplit.ladder.radius import increase, radius_of, reach_of, safe_step
from gradsplit.ladder.signedlog import SignedLog


def _log_pole(radius, order):
    """log(1 - t / R)."""
    k = np.arange(1, order + 1)
    return SignedLog(
        np.concatenate([[0.0], -np.ones(order)]), np.concatenate([[-np.inf], -k * math.log(radius) - np.log(k)])
    )


def _pair(radius, angle, order, power):
    """Real part of (1 - t / (R e^(i angle)))^-1 with an extra k^power: a complex pair of singularities."""
    k = np.arange(1, order + 1)
    wave = np.cos(k * angle + 0.3)
    return SignedLog(
        np.concatenate([[1.0], np.sign(wave)]),
        np.concatenate([[0.0], np.log(np.abs(wave)) - k * math.log(radius) + power * np.log(k)]),
    )


@given(st.floats(1e-6, 1e6), st.sampled_from([8, 12, 30, 99]))
def test_a_logarithmic_singularity(radius, order):
    assert radius_of(_log_pole(radius, order)).value == pytest.approx(radius, rel=0.02)


@given(st.floats(1e-3, 1e3), st.floats(0.2, 2.9), st.floats(-2, 0.5))
def test_a_complex_pair(radius, angle, power):
    found = radius_of(_pair(radius, angle, 99, power))
    assert found.value == pytest.approx(radius, rel=0.05)
    assert found.ratio == pytest.approx(radius, rel=0.05)


def test_the_estimates_scale_with_the_step():
    series = _pair(1.0, 1.1, 60, -1)
    scaled = series.times_exp(-np.arange(61) * 500.0)
    assert radius_of(scaled).value == pytest.approx(math.exp(500) * radius_of(series).value, rel=1e-9)


def test_a_polynomial_has_no_radius():
    assert radius_of(SignedLog.of(np.array([1.0, 2.0, 3.0] + [0.0] * 28))).value == math.inf


def test_the_spread_is_large_where_no_single_singularity_decides():
    clean = radius_of(_log_pole(1.0, 40)).spread
    entire = radius_of(SignedLog(np.ones(41), -np.array([math.lgamma(k + 1) for k in range(41)]))).spread
    assert clean < 0.01
    assert entire > 0.2


def test_few_orders_give_a_rough_radius_and_say_so():
    found = radius_of(SignedLog.of(1 / 0.5 ** np.arange(4.0)))
    assert found.value == pytest.approx(0.5)
    assert found.spread == math.inf


def _quadratic(slope, curvature):
    return SignedLog.of(np.array([1.0, slope, curvature]))


def test_the_safe_step_of_a_parabola_is_where_it_comes_back_up():
    assert safe_step(_quadratic(-2.0, 4.0), math.inf) == (pytest.approx(0.5, rel=1e-9), "increase")
    assert safe_step(_quadratic(-2.0, -4.0), math.inf) == (math.inf, "radius")
    assert safe_step(_quadratic(2.0, 4.0), math.inf) == (0.0, "no descent")
    assert safe_step(_quadratic(0.0, 0.0), math.inf) == (math.inf, "radius")


def test_the_first_return_counts_not_the_last():
    """-t (1 - t) (2 - t) … : up between 1 and 2, down again after."""
    polynomial = (
        np.polynomial.Polynomial([0, -1]) * np.polynomial.Polynomial([1, -1]) * np.polynomial.Polynomial([2, -1])
    )
    assert safe_step(SignedLog.of(polynomial.coef), math.inf)[0] == pytest.approx(1.0, rel=1e-6)


def test_a_series_that_ends_first_limits_the_step_to_its_reach():
    falling = _log_pole(2.0, 99)
    step, reason = safe_step(falling, 2.0)
    assert reason == "radius"
    assert step == pytest.approx(2.0 * reach_of(99))


def test_the_reach_keeps_the_tail_below_one_percent():
    for order in (3, 10, 30, 99):
        rho = reach_of(order)
        assert rho ** (order + 1) / (1 - rho) == pytest.approx(0.01, rel=1e-6)


def test_the_increase_is_the_sum_of_the_terms_without_the_first():
    series = SignedLog.of(np.array([7.0, -1.0, 0.0, 2.0]))
    np.testing.assert_allclose(increase(series, np.array([0.0, 0.5, 2.0])), [0, -0.5 + 0.25, -2 + 16])


def test_orders_that_are_mere_rounding_do_not_count():
    """log(1 + e^t) - t / 2 is even; its singularities are at +- i pi. Its odd orders are 1e-18 instead of zero."""
    even = [0.0, 1 / 8, -1 / 192, 1 / 2880, -17 / 645120, 31 / 14515200, -691 / 3832012800, 5461 / 348713164800]
    series = np.ravel(np.column_stack([even, 1e-18 * np.array([1, -1, 1, 1, -1, 1, -1, 1])]))
    series[:2] = math.log(2), 0.5
    assert radius_of(SignedLog.of(series)).value == pytest.approx(math.pi, rel=0.01)
    assert radius_of(SignedLog.of(series[:6])).value == pytest.approx(4.0)  # (1/2) / (1/8), what three orders tell


@pytest.mark.parametrize("order", [8, 9, 10, 12])
def test_a_series_in_the_fourth_power_is_no_polynomial(order):
    """1 / (1 - (t / 2)^4)."""
    k = np.arange(order + 1)
    assert radius_of(SignedLog.of(np.where(k % 4 == 0, 0.5**k, 0.0))).value == pytest.approx(2.0)


def test_a_polynomial_of_a_deep_linear_net_is_one():
    """Degree 6 at order 10: three linear layers and a square."""
    assert (
        radius_of(SignedLog.of(np.array([1.0, -2.0, 3.0, -1.0, 2.0, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]))).value == math.inf
    )
