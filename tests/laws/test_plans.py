"""The laws of plans over every strategy and its options."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsplit.plan import Layout, lbf, tree_sp, xsp
from tests.laws import laws_of_plans as laws
from tests.laws.cases import PLANS, ZOO, energies


@pytest.mark.parametrize("strategy", PLANS)
def test_every_element_lies_in_exactly_one_bin(strategy):
    laws.check_exact_cover(PLANS[strategy], ZOO)


@pytest.mark.parametrize("strategy", PLANS)
def test_the_tree_is_a_tree_with_the_bins_as_leaves(strategy):
    laws.check_tree(PLANS[strategy], ZOO)


@pytest.mark.parametrize("strategy", PLANS)
def test_a_plan_is_one_partition_with_a_name(strategy):
    laws.check_names_one_partition(PLANS[strategy], ZOO)


# Energies are drawn by name here, since the law is about the strategy and not about the generator's order.
ENERGY_BY_NAME = energies(ZOO)
BY_NAME = {
    "lbf": lambda layout: lbf(layout, ENERGY_BY_NAME),
    "lbf, few bins": lambda layout: lbf(layout, ENERGY_BY_NAME, max_bins=len(layout) + 9, min_gain=0.0),
    "tree_sp over lbf": lambda layout: tree_sp(layout, inner=lambda inner: lbf(inner, ENERGY_BY_NAME, max_bins=40)),
}


@pytest.mark.parametrize("strategy", PLANS)
def test_the_order_of_tensors_does_not_matter(strategy):
    laws.check_order_of_tensors(BY_NAME.get(strategy, PLANS[strategy]), ZOO)


SHAPES = st.lists(st.lists(st.integers(0, 6), max_size=4).map(tuple), min_size=1, max_size=5)


@settings(max_examples=60)
@given(SHAPES, st.integers(1, 5), st.integers(0, 1), st.integers(0, 1000))
def test_any_shapes_are_covered_exactly(shapes, parts, axis, seed):
    shapes = [*shapes, (2, 3)]  # a layout of nothing but empty tensors has no plan
    layout = Layout.from_shapes({f"m{i % 2}.t{i}": shape for i, shape in enumerate(shapes)})
    strategies = {
        "slices": lambda layout: xsp(layout, parts=parts, axis=axis),
        "rectangles": lambda layout: lbf(layout, energies(layout, seed), max_bins=len(layout) + parts, min_gain=0.0),
        "tree": lambda layout: tree_sp(layout, inner=lambda inner: xsp(inner, parts=parts, axis=axis)),
        **PLANS,
    }
    for make in strategies.values():
        laws.check_exact_cover(make, layout)
        laws.check_tree(make, layout)


def test_slices_differ_by_at_most_one():
    plan = xsp(Layout.from_shapes({"w": (11, 3)}), parts=4)
    sizes = plan.row_stop_K - plan.row_start_K
    np.testing.assert_array_equal(np.sort(sizes), [2, 3, 3, 3])
