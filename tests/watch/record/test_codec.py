"""Stored numbers come back within half a unit of bfloat16, whatever they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsplit.watch.record.codec import pack_counts, pack_exact, pack_wide, unpack_counts, unpack_exact, unpack_wide

norms = st.one_of(
    st.floats(min_value=0, allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from([0.0, 1e-45, 1e-38, 1.0, 3.4028234e38, float("inf"), float("nan")]),
)


@given(st.lists(st.lists(norms, min_size=3, max_size=3), min_size=1, max_size=20))
def test_wide_numbers_come_back_to_within_their_precision(values):
    array = np.array(values, dtype=np.float32)
    back = unpack_wide(pack_wide(array), 3)
    finite = np.isfinite(array)
    assert (np.isfinite(back) == finite).all(), "what was finite stays finite, and the other way round"
    assert (np.isnan(back) == np.isnan(array)).all()
    normal = finite & (array >= 1.2e-38) & (array <= 3.38e38)
    assert (np.abs(back[normal] - array[normal]) <= array[normal] * 2.0**-8).all()
    rest = finite & ~normal
    assert (np.abs(back[rest].astype(float) - array[rest]) <= 2e36).all()


@given(st.lists(st.lists(st.integers(0, 2**31), min_size=2, max_size=2), min_size=1, max_size=20))
def test_counts_are_exact(values):
    array = np.array(values)
    assert (unpack_counts(pack_counts(array), len(array), 2) == array).all()


def test_counts_of_nothing_take_no_room():
    assert pack_counts(np.zeros((5, 4), dtype=int)) is None
    assert unpack_counts(None, 5, 4).shape == (5, 4)


@pytest.mark.parametrize("dtype", ["i8", "f8", "f4", "u1"])
def test_exact_vectors_are_exact(dtype):
    values = np.array([0, 1, 200]).astype(dtype)
    assert (unpack_exact(pack_exact(values, dtype), dtype) == values).all()


def test_a_quiet_leaf_takes_little_room():
    quiet = np.full((500, 20), 0.125, dtype=np.float32)
    assert len(pack_wide(quiet)) < 500
