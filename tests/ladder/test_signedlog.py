"""Signed-log numbers behave like the numbers they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsplit.ladder.signedlog import SignedLog, factorial_log

numbers = st.floats(-1e100, 1e100).filter(lambda x: x == 0 or abs(x) > 1e-100)


@given(numbers, numbers)
def test_products_and_sums(a, b):
    left, right = SignedLog.of(a), SignedLog.of(b)
    assert (left * right).to_float() == pytest.approx(a * b, rel=1e-12)
    pair = SignedLog.of(np.array([a, b]))
    assert pair.sum(axis=0).to_float() == pytest.approx(a + b, rel=1e-12, abs=1e-13 * max(abs(a), abs(b)))


@given(numbers.filter(bool), st.sampled_from([2, 3]))
def test_powers_keep_the_sign_that_numbers_have(a, exponent):
    power = SignedLog.of(a) ** exponent
    assert power.sign == np.sign(a) ** exponent
    assert power.log10 == pytest.approx(exponent * math.log10(abs(a)), rel=1e-12, abs=1e-12)


def test_zero_stays_zero():
    zero, one = SignedLog.of(0.0), SignedLog.of(1.0)
    assert (zero**3).to_float() == 0
    assert (zero * one).to_float() == 0
    assert SignedLog.of(np.zeros(3)).sum(axis=0).to_float() == 0
    assert zero.text() == "0"


def test_a_sum_of_numbers_far_beyond_float64():
    huge = SignedLog(np.array([1.0, 1.0]), np.array([1e6, 1e6]))
    assert huge.sum(axis=0).log == pytest.approx(1e6 + math.log(2), rel=1e-15)
    assert np.isinf(huge.to_float()).all()


@pytest.mark.parametrize(
    ("sign", "log10", "text"),
    [
        (1, 3.0, "+1.00e+3"),
        (-1, -200.5, "-3.16e-201"),
        (1, math.inf, "inf"),
        (-1, 1e113, "-10^(1.000000e+113)"),
        (1, 2.9999, "+1.00e+3"),
    ],
)
def test_text_is_right_in_the_exponent_at_any_size(sign, log10, text):
    number = SignedLog(np.array(float(sign)), np.array(log10 * math.log(10)))
    assert number.text() == text


def test_factorials():
    np.testing.assert_allclose(np.exp(factorial_log(6)), [1, 1, 2, 6, 24, 120, 720])
