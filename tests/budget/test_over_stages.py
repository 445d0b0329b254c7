"""A ledger over stages: the root of two ledgers together is that of one over both."""

from __future__ import annotations

import numpy as np
import pytest

from gradsplit.budget import Ema, Fixed, Ledger, StagedLedger, make_ledger
from gradsplit.plan import Layout, xsp

BUDGETS = [("bin", Fixed(1.0)), ("root", Ema(1.1, warmup=1)), ("root", Fixed(1.5))]


def plan_of(*names):
    return xsp(Layout.from_shapes(dict.fromkeys(names, (3, 2))))


def decide(ledgers, squares):
    """One step of both stages: what each would send is added by hand, then both are asked again with the sum."""
    sent = []
    for ledger, part in zip(ledgers, squares, strict=True):
        before = ledger._roots, ledger.below.state_dict()
        ledger._add = lambda values: sent.append(values) or values
        ledger.decide(part)
        ledger._roots = before[0]
        ledger.below.load_state_dict(before[1], call="test")
    for ledger in ledgers:
        ledger._add = lambda values: sum(sent)
    return [ledger.decide(part) for ledger, part in zip(ledgers, squares, strict=True)]


def staged(name):
    plan = plan_of(name)
    return make_ledger(plan, BUDGETS, np.zeros(1), add=lambda values: values)


def test_two_stages_are_one_root():
    one = Ledger(plan_of("a", "b"), BUDGETS, np.zeros(1))
    stages = [staged("a"), staged("b")]
    generator = np.random.default_rng(0)
    for step in range(5):
        squares = generator.random(6) * 10.0 ** (step % 3)
        if step == 2:
            squares[4] = np.inf
        true = one.decide(squares)
        made = decide(stages, (squares[:3], squares[3:]))
        np.testing.assert_allclose(np.concatenate([d.scale_B for d in made]), true.scale_B, rtol=1e-12)
        assert [float(d.limit_N[0]) for d in made] == pytest.approx([float(true.limit_N[0])] * 2, rel=1e-12)


def test_without_stages_or_a_root_it_is_the_plain_ledger():
    assert isinstance(make_ledger(plan_of("a"), BUDGETS, np.zeros(1)), Ledger)
    assert isinstance(make_ledger(plan_of("a"), BUDGETS[:1], np.zeros(1), add=lambda values: values), Ledger)
    assert isinstance(staged("a"), StagedLedger)


def test_saved_history_goes_on():
    first, second = staged("a"), staged("a")
    first.decide(np.array([4.0, 1.0, 9.0]))
    second.load_state_dict(first.state_dict(), call="load")
    made, true = second.decide(np.ones(3) * 50), first.decide(np.ones(3) * 50)
    np.testing.assert_array_equal(made.scale_B, true.scale_B)


def test_the_history_of_another_run_is_refused():
    with pytest.raises(ValueError, match="over all stages"):
        staged("a").load_state_dict({}, call="load")
