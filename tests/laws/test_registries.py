"""Every row of every registry takes part in the laws."""

from __future__ import annotations

from gradsplit.budget import BUDGETS, RULES
from gradsplit.kernels import BACKENDS
from gradsplit.plan import STRATEGIES, make_plan
from tests.laws import cases


def test_every_budget_has_a_case():
    assert set(cases.BUDGETS) == set(BUDGETS), "give the new budget a tight instance in tests/laws/cases.py"
    assert all(type(cases.BUDGETS[name]) is BUDGETS[name] for name in BUDGETS)


def test_every_strategy_takes_part():
    assert set(STRATEGIES) <= set(cases.PLANS)
    for name in STRATEGIES:
        assert make_plan(name, cases.ZOO, cases.energies(cases.ZOO), call="test").num_bins >= 1


def test_every_backend_that_serves_this_machine_takes_part():
    unserved = {name: row.missing(cases.CPU) for name, row in BACKENDS.items() if name not in cases.served_backends()}
    assert all(unserved.values()), "a backend is left out without a reason"
    assert {"eager", "reference"} <= set(cases.served_backends())


def test_rows_are_stored_under_their_own_names():
    assert all(row.name == name for table in (STRATEGIES, BUDGETS, BACKENDS) for name, row in table.items())
    assert list(RULES) == ["bottom_up", "nearest"]
