"""Lengths where there is no float64: sums, limits and gradients up to the largest float32, in compiled functions."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import numpy as jnp

import gradsplit as gs
from gradsplit.budget.sums import Lengths, Squares, sums_for
from gradsplit.functional import Patterns
from gradsplit.xp import jax_xp

IDS = np.array([0, 0, 1, 2, 2, 2, 3, 1])
SIZES = st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 7.0, 1e4, 1e18, 2e19, 1e30, 1e38])
VECTORS = st.lists(SIZES, min_size=8, max_size=8)

by_node = jax.jit(lambda amount: Lengths.by_node(amount, IDS, 4))
plus = jax.jit(lambda amount: Lengths.plus(amount, amount[::-1]))
running = jax.jit(Lengths.running)


@given(VECTORS)
def test_float32_lengths_add_as_float64_squares_do(sizes):
    wide, narrow = np.array(sizes), jnp.asarray(sizes, jnp.float32)
    close = {"rtol": 1e-6, "atol": 1e-18}
    np.testing.assert_allclose(by_node(narrow), Squares.norm(Squares.by_node(wide**2, IDS, 4)), **close)
    np.testing.assert_allclose(plus(narrow), Squares.norm(wide**2 + wide[::-1] ** 2), **close)
    np.testing.assert_allclose(running(narrow), Squares.norm(Squares.running(wide**2)), **close)


@given(st.floats(0.01, 1e3), st.floats(0.0, 0.99), st.floats(0.01, 1e3))
def test_the_factor_fills_the_limit(limit, share, free):
    """Fixed and t times free together are as long as the limit, in either way of adding."""
    limit, fixed, free = np.array([limit]), np.array([limit * share]), np.array([free])
    t = Lengths.factor_to(limit, fixed, free)
    np.testing.assert_allclose(np.hypot(fixed, t * free), limit, rtol=1e-12)
    np.testing.assert_allclose(t, Squares.factor_to(limit, fixed**2, free**2), rtol=1e-9)


def test_the_dtype_decides_how_lengths_add():
    assert sums_for(jnp.zeros(1, jnp.float32)) is Lengths
    assert sums_for(np.zeros(1)) is Squares


def explosion():
    plan = gs.whole(gs.Layout.from_shapes({"a": (4, 3), "b": (5,)}))
    return Patterns(plan), [jnp.ones((4, 3)).at[0, 0].set(3e38), jnp.ones(5)]


def test_a_compiled_measure_sees_the_largest_float32():
    patterns, arrays = explosion()
    np.testing.assert_allclose(jax.jit(patterns.amounts_B)(arrays), [3e38], rtol=1e-6)


def test_a_measure_without_the_large_unit_loses_the_explosion(monkeypatch):
    """The planted fault: what overflowed is squared once more in the same unit."""
    monkeypatch.setattr(jax_xp, "in_unit", lambda array, unit: array)
    patterns, arrays = explosion()
    assert not np.isfinite(jax.jit(patterns.amounts_B)(arrays)).any()


@pytest.mark.parametrize("rule", ["bottom_up", "nearest"])
def test_limits_hold_when_one_bin_is_at_the_edge_of_float32(rule):
    plan = gs.tree_sp(gs.Layout.from_shapes({"a.w": (3, 2), "b.w": (2, 2)}), inner="xsp")
    norm_B = jnp.asarray([3e38, 1.0, 2.0, 3.0, 1e25], jnp.float32)
    limit_N = np.where(plan.levels_N == 3, 1.0, np.where(plan.levels_N == 0, 0.5, np.inf))
    scale_B = jax.jit(lambda norm: gs.project(plan, norm, jnp.asarray(limit_N, jnp.float32), rule=rule))(norm_B)
    kept = np.asarray(norm_B, np.float64) * np.asarray(scale_B, np.float64)
    assert np.isfinite(kept).all()
    assert np.sqrt((kept**2).sum()) <= 0.5 * (1 + 1e-5)
    assert (kept[1:4] > 0).all() or rule == "nearest"
