"""Cauchy products against numpy's polynomial product, and the three ways against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsplit.ladder import series as cauchy
from gradsplit.ladder.series import Series, map_orders


def _series(degree, *shape, order=20, bins=1, decay=1.0):
    coef = torch.randn(degree + 1, bins, *shape, dtype=torch.float64)
    coef *= decay ** torch.arange(degree + 1, dtype=torch.float64).reshape(-1, *[1] * (coef.ndim - 1))
    coef[0] = coef[0, :1]  # a value at t = 0 is the same for all bins
    return Series(coef, order)


def _polynomial_product(a, b, order):
    """Elementwise, by numpy, for coefficient arrays of equal shape behind the order axis."""
    flat_a, flat_b = (x.reshape(x.shape[0], -1).numpy() for x in (a, b))
    columns = [np.convolve(x, y)[: order + 1] for x, y in zip(flat_a.T, flat_b.T, strict=True)]
    return np.stack(columns, axis=1)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 15), st.integers(1, 3))
def test_an_elementwise_product_is_the_product_of_polynomials(degree_a, degree_b, order, bins):
    a = _series(min(degree_a, order), 2, 3, order=order, bins=bins)
    b = _series(min(degree_b, order), 2, 3, order=order, bins=bins)
    found = cauchy.product(a, b)
    expected = _polynomial_product(a.coef, b.coef, order)
    assert found.degree == min(order, a.degree + b.degree)
    np.testing.assert_allclose(found.coef.reshape(found.degree + 1, -1), expected, atol=1e-12)


@given(st.integers(0, 12), st.integers(0, 15))
def test_a_square_is_the_product_with_itself(degree, order):
    a = _series(min(degree, order), 5, order=order)
    torch.testing.assert_close(cauchy.square(a).coef, cauchy.product(a, a).coef, rtol=1e-13, atol=1e-13)


def test_products_broadcast_like_tensors():
    a, b = _series(9, 2, 1, 3, bins=2), _series(8, 4, 1, bins=2)
    full = [_series_expanded(x, (2, 4, 3)) for x in (a, b)]
    torch.testing.assert_close(cauchy.product(a, b).coef, cauchy.product(*full).coef)


def _series_expanded(x, shape):
    coef = x.coef.reshape(*x.coef.shape[:2], *[1] * (len(shape) - x.ndim), *x.shape)
    return Series(coef.expand(*x.coef.shape[:2], *shape), x.order)


def test_blocks_of_elements_change_nothing(monkeypatch):
    a, b = _series(9, 700), _series(8, 700)
    whole = cauchy.product(a, b).coef
    monkeypatch.setattr(cauchy, "BLOCK_NUMBERS", 1)
    assert torch.equal(cauchy.product(a, b).coef, whole)


@pytest.mark.parametrize(("degree_a", "degree_b"), [(1, 20), (20, 1), (2, 2), (7, 20), (20, 20)])
@pytest.mark.parametrize("bins", [1, 3])
def test_a_matrix_product_is_the_sum_over_pairs_of_orders(degree_a, degree_b, bins):
    a, b = _series(degree_a, 2, 3, 4, bins=bins), _series(degree_b, 2, 4, 5, bins=bins)
    expected = torch.zeros(21, bins, 2, 3, 5, dtype=torch.float64)
    for j in range(degree_a + 1):
        for i in range(min(degree_b, 20 - j) + 1):
            expected[i + j] += a.coef[j] @ b.coef[i]
    found = cauchy.matmul(a, b).coef
    torch.testing.assert_close(found, expected[: found.shape[0]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cauchy.bilinear(torch.matmul, a, b).coef, found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.3, 0.9, 1.0, 3.0])
def test_roots_of_unity_agree_with_sums_relative_to_each_order(decay):
    """Geometric growth or decay of the coefficients is balanced first, so every order keeps its digits."""
    a, b = _series(99, 3, 4, order=99, decay=decay, bins=2), _series(99, 4, 5, order=99, decay=decay, bins=2)
    by_order, at_roots = cauchy._matmul_by_order(a, b).coef, cauchy._matmul_at_roots(a, b)
    assert at_roots is not None, "the orders are not level"
    at_roots = at_roots.coef
    size = by_order.abs().amax(dim=(1, 2, 3))
    error = (by_order - at_roots).abs().amax(dim=(1, 2, 3))
    assert (error / size).max() < 1e-11


def test_unbalanced_roots_of_unity_would_be_caught(monkeypatch):
    monkeypatch.setattr(cauchy, "_log_balance", lambda coef: torch.zeros(coef.shape[1], dtype=coef.dtype))
    with pytest.raises(AssertionError):
        test_roots_of_unity_agree_with_sums_relative_to_each_order(0.3)


def test_a_convolution_of_two_series_is_the_sum_over_pairs_of_orders():
    x, w = _series(6, 2, 3, 5, 5, order=6, bins=2), _series(2, 4, 3, 3, 3, order=6, bins=2)
    expected = torch.zeros(7, 2, 2, 4, 3, 3, dtype=torch.float64)
    for j in range(7):
        for i in range(min(2, 6 - j) + 1):
            for b in range(2):
                expected[i + j, b] += torch.nn.functional.conv2d(x.coef[j, b], w.coef[i, b])
    found = cauchy.bilinear(torch.nn.functional.conv2d, x, w).coef
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_constant_among_moving_tensors_is_a_series_of_degree_0():
    x = _series(2, 3, bins=2)
    joined = map_orders(torch.cat, ([x, torch.ones(2)],), {})
    assert joined.shape == (5,)
    torch.testing.assert_close(joined.coef[0, :, 3:], torch.ones(2, 2, dtype=torch.float64))
    assert not joined.coef[1:, :, 3:].any()


@pytest.mark.parametrize("log_size", [lambda k: -torch.lgamma(k + 1), lambda k: -torch.lgamma(k / 2 + 1)])
def test_a_product_of_entire_functions_keeps_its_high_orders(log_size):
    """Coefficients that fall as 1 / k! have no level, so roots of unity would leave order 99 to rounding."""
    size = log_size(torch.arange(100, dtype=torch.float64)).exp().reshape(-1, 1, 1, 1)
    a, b = (Series(torch.randn(100, 1, 48, 48, dtype=torch.float64) * size, 99) for _ in range(2))
    expected = torch.stack([sum(a.coef[j] @ b.coef[k - j] for j in range(k + 1)) for k in (30, 60, 99)])
    found = cauchy.matmul(a, b).coef[[30, 60, 99]]
    error, scale = ((x.abs().flatten(1).amax(1)) for x in (found - expected, expected))
    assert (error / scale).max() < 1e-11


def test_series_of_decisions_add_and_multiply_like_numbers():
    """Bool and whole numbers that differ between bins, beside series that move."""
    mask = Series(torch.tensor([[[True, False], [False, True]]]), 20)
    x = _series(4, 2, bins=2)
    for found in (cauchy.add(mask, x), cauchy.add(x, mask)):
        torch.testing.assert_close(found.coef[0], x.coef[0] + mask.coef[0])
    torch.testing.assert_close(cauchy.add(mask, 0.5).coef, mask.coef + 0.5)
    torch.testing.assert_close(cauchy.product(mask, x).coef, mask.coef * x.coef)
    assert cauchy.product(x.like(x.coef[:1]), mask).coef.dtype == torch.float64
