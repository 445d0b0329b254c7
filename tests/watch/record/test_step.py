"""The record of a step: norms before and after, the worst bins by name, one line of text."""

from __future__ import annotations

import math

import pytest
import torch

import gradsplit as gs
from gradsplit.plan import Layout

PAIRS = {"a": torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]]), "b": torch.tensor([float("inf"), 0.0])}


def record_of(budget=None):
    pairs = [(name, torch.nn.Parameter(torch.ones_like(g))) for name, g in PAIRS.items()]
    for _, p in pairs:
        p.grad = PAIRS["a"].clone() if p.dim() > 1 else PAIRS["b"].clone()
    return gs.GradientSplitter(pairs, "xsp", budget or gs.Fixed(1.0)).step()


def test_norms_before_and_after():
    record = record_of()
    assert record.norm_B.tolist() == pytest.approx([5.0, 0.5, 50.0, math.inf])
    assert record.norm_after_B().tolist() == pytest.approx([1.0, 0.5, 1.0, 0.0])
    assert record.total_norm() == math.inf
    assert record.decision.outcome_B.tolist() == [1, 0, 1, 2]
    assert record.plan.layout == Layout.from_shapes({"a": (3, 2), "b": (2,)})


def test_the_worst_are_named_zeroed_ones_first_then_by_how_hard_they_were_scaled():
    worst = record_of().worst(4)
    assert [report.name for report in worst] == ["b", "a[2:3]", "a[0:1]", "a[1:2]"]
    assert [report.outcome.name for report in worst] == ["ZEROED", "SCALED", "SCALED", "KEPT"]
    assert [report.norm_after for report in worst] == pytest.approx([0.0, 1.0, 1.0, 0.5])
    assert all(report.limit == 1.0 for report in worst)
    assert len(record_of().worst(99)) == 4


def test_bins_whose_limit_is_zero_come_after_those_that_were_not_finite():
    worst = record_of(gs.Fixed([1.0, 0.0, 1.0, 1.0])).worst(2)
    assert [report.name for report in worst] == ["b", "a[1:2]"]
    assert [report.outcome.name for report in worst] == ["ZEROED", "SCALED"]


def test_a_bin_bounded_only_by_an_ancestor_has_no_limit_of_its_own():
    (report,) = record_of({"tensor": gs.Fixed(1.0)}).worst(2)[1:]
    assert report.limit == math.inf
    assert report.outcome.name == "SCALED"


def test_printed_it_is_one_line():
    text = str(record_of())
    assert text == "step 0: 2 of 4 bins scaled, 1 zeroed; worst: b inf -> 0, a[2:3] 50 -> 1, a[0:1] 5 -> 1"
