"""An outline covers every bin once, stays small, and names its leaves as the plan would."""

from __future__ import annotations

import numpy as np
import pytest

from gradsplit.plan import STRATEGIES, Layout, tree_sp, whole, xsp
from gradsplit.watch.record import Outline, recording_plan

LAYOUT = Layout.from_shapes({"a.w": (60, 3), "a.b": (60,), "b.c.w": (7, 2, 2), "top": (5, 5)})
PLANS = {name: row.make for name, row in STRATEGIES.items() if not row.needs_energy}


@pytest.mark.parametrize("max_nodes", [8, 30, 1000])
@pytest.mark.parametrize("name", PLANS)
def test_every_bin_lies_in_one_leaf(name, max_nodes):
    plan = PLANS[name](LAYOUT)
    outline = Outline.of(plan, max_nodes=max_nodes)
    assert sorted(set(outline.leaf_of_bin_B.tolist())) == list(range(outline.num_leaves))
    assert outline.bins_L.sum() == plan.num_bins
    assert outline.numel_L.sum() == LAYOUT.num_elements
    assert len(set(outline.leaf_names)) == outline.num_leaves
    assert outline.num_nodes <= max(max_nodes, 8) + 2
    assert outline.leaves_of_N[0].tolist() == list(range(outline.num_leaves))


def test_few_bins_are_leaves_under_their_own_names():
    plan = tree_sp(LAYOUT, inner="xsp")
    outline = Outline.of(plan)
    assert outline.leaf_names == tuple(plan.bins[b].name for b in np.argsort(outline.leaf_of_bin_B))


def test_runs_of_rows_are_named_by_their_rows():
    outline = Outline.of(xsp(LAYOUT), max_nodes=14)
    assert "a.w[0:30]" in outline.leaf_names
    assert "a.w[30:60]" in outline.leaf_names


def test_blocks_of_a_measured_plan_and_runs_of_a_fine_one_are_the_same():
    coarse = Outline.of(recording_plan(LAYOUT, max_nodes=20), max_nodes=20)
    fine = Outline.of(xsp(LAYOUT), max_nodes=20)
    assert coarse.leaf_names == fine.leaf_names


def test_a_bin_over_several_tensors_stands_alone():
    outline = Outline.of(whole(LAYOUT))
    assert outline.num_leaves == 1
    assert outline.tensors_L == ("all",)


def test_an_outline_survives_the_file():
    outline = Outline.of(tree_sp(LAYOUT, inner="xsp"))
    again = Outline.from_dict(outline.to_dict())
    assert again.names_N == outline.names_N
    assert again.leaf_names == outline.leaf_names
    assert (again.parents_N == outline.parents_N).all()
