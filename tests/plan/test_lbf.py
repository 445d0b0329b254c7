"""L-BF: planted blocks are found, the gain is that of its formula, and slices are never likelier."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsplit.plan import Layout, lbf, xsp


def likelihood(plan, energy):
    """-sum n log(E / n) by plain loops."""
    total = 0.0
    sums = [[0.0, 0] for _ in range(plan.num_bins)]
    for k in range(len(plan.boxes)):
        matrix = np.asarray(energy[plan.layout.names[plan.tensor_K[k]]], dtype=float)
        matrix = matrix.reshape(plan.layout.rows[plan.tensor_K[k]], -1)
        for i in range(plan.row_start_K[k], plan.row_stop_K[k]):
            for j in range(plan.col_start_K[k], plan.col_stop_K[k]):
                sums[plan.bin_K[k]][0] += matrix[i, j]
                sums[plan.bin_K[k]][1] += 1
    for e, n in sums:
        total -= n * math.log(e / n)
    return total


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(4))
def test_planted_blocks_are_found_exactly(k, seed):
    """k x k constant blocks at unequal, unaligned cuts: the leaves are the blocks, though 256 would be allowed."""
    rng = np.random.default_rng(seed)
    row_cuts, col_cuts = ([0, *np.cumsum(rng.integers(8, 25, k)).tolist()] for _ in range(2))
    rows, cols = row_cuts[-1], col_cuts[-1]
    energy = np.empty((rows, cols))
    levels = np.exp(rng.permutation(k * k) * 1.0).reshape(k, k)
    for i, j in itertools.product(range(k), range(k)):
        energy[row_cuts[i] : row_cuts[i + 1], col_cuts[j] : col_cuts[j + 1]] = levels[i, j]
    plan = lbf(Layout.from_shapes({"w": (rows, cols)}), {"w": energy})
    found = {(each.boxes[0].start, each.boxes[0].stop) for each in plan.bins}
    planted = {
        ((row_cuts[i], col_cuts[j]), (row_cuts[i + 1], col_cuts[j + 1]))
        for i, j in itertools.product(range(k), range(k))
    }
    assert found == planted


def test_more_bins_than_blocks_are_not_used():
    energy = np.repeat(np.repeat([[1.0, 50.0], [2000.0, 7.0]], 6, axis=0), 9, axis=1)
    plan = lbf(Layout.from_shapes({"w": (12, 18)}), {"w": energy}, max_bins=256)
    assert plan.num_bins == 4


ENERGY = st.tuples(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 100_000), st.sampled_from(["smooth", "two", "rows"])
)


def drawn_energy(rows, cols, seed, kind):
    rng = np.random.default_rng(seed)
    energy = rng.exponential(size=(rows, cols)) ** 3 + 1e-6
    if kind == "two":
        energy = rng.choice([1.0, 9.0], size=(rows, cols))
    if kind == "rows":
        energy = energy[:, :1] * np.ones((1, cols))
    return energy


@settings(max_examples=250)
@given(ENERGY, st.integers(1, 9), st.integers(0, 1))
def test_slices_with_as_many_bins_are_never_likelier(drawn, parts, axis):
    energy = {"w": drawn_energy(*drawn), "v": drawn_energy(*drawn)[::-1].copy()}
    layout = Layout.from_shapes({name: array.shape for name, array in energy.items()})
    slices = xsp(layout, parts=parts, axis=axis)
    plan = lbf(layout, energy, max_bins=slices.num_bins, min_gain=0.0)
    assert plan.num_bins <= slices.num_bins
    assert likelihood(plan, energy) >= likelihood(slices, energy) - 1e-6


@settings(max_examples=50)
@given(ENERGY)
def test_slices_with_as_many_bins_as_were_made_are_never_likelier(drawn):
    energy = {"w": drawn_energy(*drawn)}
    layout = Layout.from_shapes({"w": energy["w"].shape})
    plan = lbf(layout, energy, min_gain=1.0)
    for axis, parts in itertools.product((0, 1), range(1, 10)):
        slices = xsp(layout, parts=parts, axis=axis)
        if slices.num_bins == plan.num_bins:
            assert likelihood(plan, energy) >= likelihood(slices, energy) - 1e-6


@settings(max_examples=60)
@given(ENERGY)
def test_the_first_cut_is_the_best_of_all_cuts(drawn):
    """Every single cut is scored by brute force."""
    matrix = drawn_energy(*drawn)
    rows, cols = matrix.shape
    if rows * cols == 1:
        return
    layout = Layout.from_shapes({"w": (rows, cols)})
    plan = lbf(layout, {"w": matrix}, max_bins=2, min_gain=0.0)

    def term(block):
        return -block.size * math.log(block.sum() / block.size)

    scores = [term(matrix[:i]) + term(matrix[i:]) for i in range(1, rows)]
    scores += [term(matrix[:, :j]) + term(matrix[:, j:]) for j in range(1, cols)]
    assert likelihood(plan, {"w": matrix}) == pytest.approx(max([*scores, term(matrix)]), rel=1e-9, abs=1e-9)


def test_leaves_are_shared_among_tensors_by_gain():
    """A flat tensor stays whole while a structured one is cut."""
    energy = {"flat": np.ones((8, 8)), "steps": np.repeat(np.exp(np.arange(8.0)), 8).reshape(8, 8)}
    plan = lbf(Layout.from_shapes({"flat": (8, 8), "steps": (8, 8)}), energy, max_bins=9, min_gain=1.0)
    assert [each.boxes[0].tensor for each in plan.bins].count("flat") == 1
    assert plan.num_bins == 9


def test_energies_over_three_hundred_decades_are_cut_where_they_change():
    energy = np.ones((10, 4))
    energy[6:] = 1e-300
    energy[8:] = 0.0
    plan = lbf(Layout.from_shapes({"w": (10, 4)}), {"w": energy}, max_bins=2)
    assert plan.bins[0].boxes[0].stop == (6, 4)


def test_a_calibration_without_any_gradient_cuts_nothing():
    plan = lbf(Layout.from_shapes({"w": (6, 4)}), {"w": np.zeros((6, 4))})
    assert plan.num_bins == 1


def test_ties_go_to_the_first_tensor_and_to_rows():
    checker = np.array([[1.0, 1.0], [9.0, 9.0]])
    both = np.array([[1.0, 9.0], [9.0, 81.0]])
    layout = Layout.from_shapes({"a": (2, 2), "b": (2, 2)})
    assert [b.name for b in lbf(layout, {"a": checker, "b": checker}, max_bins=3, min_gain=0).bins] == [
        "a[0:1]",
        "a[1:2]",
        "b",
    ]
    one = Layout.from_shapes({"a": (2, 2)})
    assert [b.name for b in lbf(one, {"a": both}, max_bins=2).bins] == ["a[0:1]", "a[1:2]"] or (
        lbf(one, {"a": both}, max_bins=2).num_bins == 1
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy": {}}, r"expected energies of exactly the layout's tensors, got none for 'w'. Calibrate"),
        (
            {"energy": {"w": np.ones((2, 3)), "x": np.ones(1)}},
            r"some for 'x', which it does not have. Calibrate the model",
        ),
        ({"energy": {"w": np.ones((3, 2))}}, r"expected shape \(2, 3\), got \(3, 2\) at 'w'"),
        (
            {"energy": {"w": np.full((2, 3), -1.0)}},
            "expected finite energies >= 0, got others at 'w'. Pass means of squared",
        ),
        ({"energy": {"w": np.full((2, 3), np.nan)}}, "expected finite energies >= 0, got others at 'w'"),
        ({"max_bins": 0}, r"lbf\(max_bins=0\): expected at least one bin per tensor, 1 here. Raise max_bins"),
        ({"min_gain": -1.0}, r"lbf\(min_gain=-1.0\): expected a gain >= 0"),
        ({"min_gain": float("nan")}, r"lbf\(min_gain=nan\): expected a gain >= 0"),
    ],
)
def test_bad_input_is_named(options, words):
    options = {"energy": {"w": np.ones((2, 3))}} | options
    with pytest.raises(ValueError, match=words):
        lbf(Layout.from_shapes({"w": (2, 3)}), options.pop("energy"), **options)
