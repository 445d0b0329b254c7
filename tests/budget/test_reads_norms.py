"""Sums of norms over the nodes above the bins are taken only where a budget looks at them."""

from __future__ import annotations

import numpy as np
import pytest

import gradsplit as gs
from gradsplit.budget import Ledger
from gradsplit.budget.sums import Nodes


def ledger(above: gs.budget.Budget) -> Ledger:
    plan = gs.xsp(gs.Layout.from_shapes({"a": (3, 2), "b": (4, 2)}))
    return Ledger(plan, [("bin", gs.Fixed(2.0)), ("root", above)], np.zeros(plan.num_bins))


@pytest.mark.parametrize(("above", "sums"), [(gs.Fixed(1.0), 0), (gs.Ema(1.5, warmup=1), 2), (gs.ZScore(), 2)])
def test_a_constant_limit_of_the_root_takes_no_sums(monkeypatch, above, sums):
    made, taken = ledger(above), []
    amounts_N = Nodes.amounts_N
    monkeypatch.setattr(Nodes, "amounts_N", lambda self, amount_B: taken.append(1) or amounts_N(self, amount_B))
    made.decide(np.full(7, 9.0))
    assert len(taken) == sums  # of the norms as they came, and as they were let through


def test_a_constant_limit_beside_a_history_at_the_same_node_is_kept():
    plan = gs.whole(gs.Layout.from_shapes({"a": (1, 1)}))
    both = Ledger(plan, [("root", gs.Fixed(3.0)), ("root", gs.Ema(1.5, warmup=1))], np.zeros(1))
    assert both.decide(np.array([16.0])).scale_B[0] == pytest.approx(0.75)  # 3 of 4
    assert both.decide(np.array([100.0])).scale_B[0] == pytest.approx(0.3)  # 3, below 1.5 times 3
