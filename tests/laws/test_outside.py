"""Budgets, a strategy and a backend from outside the package obey every law, and are found by their names."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys

import numpy as np
import pytest
import torch

import gradsplit as gs
from gradsplit.budget import BUDGETS
from gradsplit.budget.lines import lines_of
from gradsplit.kernels import BACKENDS
from gradsplit.plan import STRATEGIES, make_plan
from tests.laws import (
    laws_of_backends,
    laws_of_budgets,
    laws_of_plans,
    laws_of_rules,
    laws_of_steps,
    laws_of_updates,
)
from tests.laws.cases import CPU, DTYPES, PLANS, STRIDES, ZOO, splitter_of, tensors
from tests.laws.test_backends import scales_and_zeros
from tests.laws.test_rules import RULE, norms_and_limits


def laws_in(module):
    """Every law of a module, so that a new one takes part or fails for want of arguments."""
    return [law for name, law in vars(module).items() if inspect.isfunction(law) and name.startswith("check_")]


def each_law_of(module):
    return pytest.mark.parametrize("law", laws_in(module), ids=lambda law: law.__name__)


@pytest.fixture(scope="module", autouse=True)
def rows():
    """The rows of tests/laws/outside.py, which registers them when it is imported."""
    tables = (BUDGETS, STRATEGIES, BACKENDS)
    before = [dict(table) for table in tables]
    sys.modules.pop("tests.laws.outside", None)
    yield importlib.import_module("tests.laws.outside")
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


BUDGET = pytest.mark.parametrize("budget", ["rms", "last"])
TIGHT = {"rms": {"size": 0.4}, "last": {"ratio": 1.05}}


def tight(budget):
    """A budget of the table that binds."""
    return BUDGETS[budget](**TIGHT[budget])


def plan():
    return make_plan("quarters", ZOO, call="test")


def splitter(pairs, plan, budget, **options):
    return splitter_of(pairs, plan, budget, backend="labels", **options)


@each_law_of(laws_of_plans)
def test_laws_of_plans(law):
    law(STRATEGIES["quarters"].make, ZOO)


@each_law_of(laws_of_rules)
@pytest.mark.parametrize("rule", RULE)
def test_laws_of_rules(law, rule):
    for seed in range(4):
        law(RULE[rule], plan(), *norms_and_limits(plan(), seed))


@each_law_of(laws_of_budgets)
@BUDGET
def test_laws_of_budgets(law, budget):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        history = list(np.exp(rng.normal(0, 1 if law is laws_of_budgets.check_units else 9, (8, 3))))
        more = ()
        if law is laws_of_budgets.check_units:
            more = (dataclasses.replace(tight(budget), size=1.6) if budget == "rms" else tight(budget),)
        law(tight(budget), history, *more)


@each_law_of(laws_of_backends)
@pytest.mark.parametrize("strategy", ["quarters", "whole", "lbf"])
def test_laws_of_backends(law, strategy):
    cut = plan() if strategy == "quarters" else PLANS[strategy](ZOO)
    make = BACKENDS["labels"].make
    scaled = law in (laws_of_backends.check_scaling, laws_of_backends.check_equals_reference)
    for dtype in DTYPES:
        for strides in STRIDES:
            law(make, cut, tensors(ZOO, dtype, strides, 2), *(scales_and_zeros(cut, 1) if scaled else ()))


def arguments_of_steps(budget):
    """Per law of steps its arguments after the splitter."""
    laws, made = laws_of_steps, tight(budget)
    return {
        laws.check_limits_hold_after_a_step: [(plan(), made, *one) for one in zip(DTYPES, STRIDES, strict=False)],
        laws.check_bad_values_stay_in_their_bin: [(plan(), made, torch.float32, float("nan"), 3)],
        laws.check_saving_changes_nothing: [(plan(), made, torch.float32)],
        laws.check_generous_limits_keep_every_bit: [(plan(), dtype, "contiguous") for dtype in DTYPES],
        laws.check_order_of_tensors: [(ZOO, STRATEGIES["quarters"].make, made)],
        laws.check_absent_gradients: [(plan(), made, 4)],
        laws.check_units: [(plan(), 1e3)],
    }


@each_law_of(laws_of_steps)
@BUDGET
def test_laws_of_steps(law, budget):
    for arguments in arguments_of_steps(budget)[law]:
        law(splitter, *arguments)


def arguments_of_updates():
    """Per law of updates its arguments after the optimizer."""
    laws, cut = laws_of_updates, make_plan("quarters", laws_of_updates.LAYOUT, call="test")
    return {
        laws.check_equals_the_formulas: [(cut, {}), (cut, {"strides": "transposed"}), (cut, {"second_moment": "bin"})],
        laws.check_rows_move_by_a_share_of_their_length: [(cut, torch.float32)],
        laws.check_a_bad_bin_is_passed_over: [(cut, float("nan"), {})],
        laws.check_saving_changes_nothing: [(cut, torch.bfloat16, {"second_moment": "bin"})],
        laws.check_gradients_stay: [(cut,)],
    }


@each_law_of(laws_of_updates)
def test_laws_of_updates(law):
    for arguments in arguments_of_updates()[law]:
        law(lambda pairs, **options: gs.GSO(pairs, backend="labels", **options), *arguments)


@BUDGET
def test_names_alone_make_them(budget):
    model = torch.nn.Linear(6, 4)
    made = gs.GradientSplitter(model, "quarters", budget, backend="labels")
    for size in (1.0, 1e6):
        model.weight.grad, model.bias.grad = torch.full((4, 6), size), torch.full((4,), size)
        record = made.step()
    assert made.plan.num_bins == 6
    limit = {"rms": 0.1 * np.sqrt(6), "last": 1.5 * np.sqrt(6)}[budget]
    np.testing.assert_allclose(record.norm_after_B()[:4].numpy(), limit, rtol=1e-6)


def test_a_line_from_outside_is_evaluated_by_compiled_loops():
    """The budget's text decides on the backend from outside, its line where bins are bounded while they are read."""
    assert lines_of([("bin", tight("rms"))]) is not None
    assert lines_of([("bin", tight("last"))]) is None
    results = []
    for backend in ("labels", "auto"):
        pairs = [("w", torch.nn.Parameter(torch.ones(8, 8)))]
        pairs[0][1].grad = torch.arange(64.0).reshape(8, 8)
        record = gs.GradientSplitter(pairs, "quarters", tight("rms"), backend=backend).step()
        results.append((pairs[0][1].grad, record.decision.scale_B))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert (results[0][1] < 1).all(), "nothing was bounded"


def test_the_rows_are_offered_where_names_are(rows):
    with pytest.raises(ValueError, match=r"expected one of .*, last\. Did you mean 'rms'"):
        gs.GradientSplitter(torch.nn.Linear(2, 2), budget="rmz")
    with pytest.raises(ValueError, match=r"expected one of .*, quarters, got 'quarter'\. Did you mean 'quarters'"):
        make_plan("quarter", ZOO, call="f")
    assert BACKENDS["labels"].make(plan(), CPU).name == "labels"
    assert {kind.__module__ for kind in (BUDGETS["rms"], rows.quarters, rows.LabelKernel)} == {"tests.laws.outside"}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda rows: gs.plan.register(rows.quarters), TypeError, r"expected a Strategy\(name, make, summary\)"),
        (
            lambda rows: gs.plan.register(gs.plan.Strategy("xsp", rows.quarters, "")),
            ValueError,
            r"register\(Strategy\('xsp', …\)\): expected a name that no strategy has, got that of gradsplit.plan",
        ),
        (lambda rows: gs.kernels.register(rows.LabelKernel), TypeError, r"expected a Backend\(name, "),
        (
            lambda rows: gs.kernels.register(gs.kernels.Backend("eager", (rows.__name__, "LabelKernel"), "")),
            ValueError,
            r"register\(Backend\('eager', …\)\): expected a name that no backend has, and not 'auto'",
        ),
        (
            lambda rows: gs.kernels.register(gs.kernels.Backend("auto", (rows.__name__, "LabelKernel"), "")),
            ValueError,
            "and not 'auto'",
        ),
    ],
)
def test_what_cannot_be_registered_is_named(rows, make, error, words):
    before = [dict(table) for table in (STRATEGIES, BACKENDS)]
    with pytest.raises(error, match=words):
        make(rows)
    assert before == [STRATEGIES, BACKENDS]


def test_what_is_defined_anew_takes_its_own_place(rows):
    """As in a notebook, where a cell runs again."""
    before = [list(table) for table in (BUDGETS, STRATEGIES, BACKENDS)]
    old = BUDGETS["rms"]
    importlib.reload(rows)
    assert BUDGETS["rms"] is not old
    assert before == [list(table) for table in (BUDGETS, STRATEGIES, BACKENDS)]
