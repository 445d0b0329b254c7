"""Where bins lie, against labels painted element by element; and that a plan stays as it was made."""

from __future__ import annotations

import gc
import pickle
import weakref

import numpy as np
import pytest

import gradsplit as gs
from gradsplit.plan import Layout, Plan, part_of, pattern_of
from tests.laws.cases import PLANS, ZOO
from tests.laws.oracles import label_elements


def check_pattern(plan, t, pattern):
    """The pattern broadcasts to the painted labels of a tensor, and is no larger than it must be."""
    rows, cols = plan.layout.rows[t], plan.layout.cols[t]
    labels = label_elements(plan)[t].reshape(rows, cols)
    if not labels.size:
        assert (pattern.kind, pattern.bins.shape) == ("none", (0, 0))
        return
    np.testing.assert_array_equal(np.broadcast_to(pattern.bins, (rows, cols)), labels)
    shapes = {"tensor": (1, 1), "rows": (rows, 1), "cols": (1, cols), "cells": (rows, cols)}
    assert pattern.bins.shape == shapes[pattern.kind]
    same_in_rows, same_in_cols = (labels == labels[:, :1]).all(), (labels == labels[:1]).all()
    smallest = {(True, True): 1, (True, False): rows, (False, True): cols, (False, False): rows * cols}
    assert pattern.bins.size == smallest[bool(same_in_rows), bool(same_in_cols)]


@pytest.mark.parametrize("strategy", PLANS)
def test_patterns_are_the_painted_labels(strategy):
    plan = PLANS[strategy](ZOO)
    for t in range(len(ZOO)):
        check_pattern(plan, t, pattern_of(plan, t))


def test_a_pattern_of_another_tensor_is_caught():
    plan = gs.xsp(Layout.from_shapes({"a": (2, 2), "b": (2, 2)}))
    with pytest.raises(AssertionError):
        check_pattern(plan, 0, pattern_of(plan, 1))


@pytest.mark.parametrize("strategy", PLANS)
def test_the_tensor_of_each_bin(strategy):
    plan = PLANS[strategy](ZOO)
    tensors = [set() for _ in range(plan.num_bins)]
    for t, labels in enumerate(label_elements(plan)):
        for b in np.unique(labels):
            tensors[b].add(t)
    assert plan.tensor_B.tolist() == [min(members) if len(members) == 1 else -1 for members in tensors]


def test_what_lies_within_a_block_of_each_tensor():
    layout = Layout.from_shapes({"w": (4, 4), "b": (4,), "u": (2, 2)})
    plan = gs.lbf(
        layout,
        {name: np.arange(np.prod(s)).reshape(s) ** 2.0 for name, s in zip(layout.names, layout.shapes, strict=True)},
    )
    labels = [x.reshape(r, c) for x, r, c in zip(label_elements(plan), layout.rows, layout.cols, strict=True)]
    blocks = np.array([[1, 3, 0, 3], [0, 1, 2, 4], [0, 0, 0, 2]])  # of the last tensor there is nothing
    here = Plan.within(plan, [(2, 3), (2,), (0, 2)], blocks)
    counts = np.zeros(plan.num_bins)
    for t, (top, bottom, left, right) in enumerate(blocks):
        held = labels[t][top:bottom, left:right]
        np.add.at(counts, held.reshape(-1), 1)
        pattern = pattern_of(here, t)
        assert (pattern.kind == "none") is (held.size == 0)
        if held.size:
            np.testing.assert_array_equal(np.broadcast_to(pattern.bins, held.shape), held)
    assert here.numel_B.tolist() == counts.tolist()
    assert here.numel_in_B(np.array([1.0, 0.0, 0.0])).sum() == 6
    assert here.num_bins == plan.num_bins
    assert here.tree is plan.tree
    np.testing.assert_array_equal(here.tensor_B, plan.tensor_B)
    np.testing.assert_array_equal(here.width_T, [4, np.inf, 2])  # of whole rows: a kernel counts rows by them
    assert here.num_rows_B.sum() == 2 * 3 / 4


def test_a_part_of_a_shard_counts_whole_rows():
    plan = gs.per_tensor(Layout.from_shapes({"w": (4, 4), "u": (2, 8)}))
    shard = Plan.within(plan, [(4, 2), (2, 2)], np.array([[0, 4, 0, 2], [0, 2, 0, 2]]))
    part, bins = part_of(shard, [1])
    assert bins.tolist() == [1]
    assert part.width_T.tolist() == [8.0]
    assert part.num_rows_B.tolist() == [0.5]


def test_a_plan_stays_as_it_was_made():
    plan = gs.xsp(ZOO)
    before = pickle.dumps(plan)
    for name in ("boxes", "width_T", "tensor_B", "anything"):
        with pytest.raises(AttributeError, match=rf"Plan.{name} = …: expected a plan to stay as it was made"):
            setattr(plan, name, None)
    with pytest.raises(AttributeError, match=r"del Plan\.boxes: expected a plan to stay"):
        del plan.boxes
    assert pickle.dumps(plan) == before


def test_what_budgets_keep_of_a_plan_goes_with_the_plan():
    plan = gs.tree_sp(ZOO, inner="xsp")
    for rule in ("bottom_up", "nearest"):
        gs.project(plan, np.ones(plan.num_bins), np.ones(plan.num_nodes), rule=rule)
    assert set(vars(plan)) <= {*vars(gs.tree_sp(ZOO)), "numel_B", "tensor_B"}, "something was hung on the plan"
    gone = weakref.ref(plan)
    del plan
    gc.collect()
    assert gone() is None, "a cache keeps the plan alive"
