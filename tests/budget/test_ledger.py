"""The ledger: budgets at several levels with their history, one decision a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradsplit as gs
from gradsplit.budget import Ledger, Outcome, budgets_by_level
from gradsplit.plan import Layout

LAYOUT = Layout.from_shapes({"a.w": (2, 2), "a.b": (2,), "c.w": (3, 1)})
TREE = gs.tree_sp(LAYOUT, inner="xsp")
ROWS = gs.xsp(LAYOUT)


def ledger(plan, budget, **options):
    return Ledger(plan, budgets_by_level(budget, plan, call="f"), np.zeros(1), call="f", **options)


def test_limits_of_every_level_meet_in_one_vector():
    limits = {"root": gs.Fixed(2.0), "module": gs.Fixed([1.5, 1.6]), "bin": (gs.Fixed(2.0), gs.Fixed(1.0))}
    decision = ledger(TREE, limits).decide(np.full(TREE.num_bins, 100.0))
    by_name = {(n.level, n.name): limit for n, limit in zip(TREE.nodes, decision.limit_N, strict=True)}
    assert by_name["root", "all"] == 2.0
    assert (by_name["module", "a"], by_name["module", "c"]) == (1.5, 1.6)
    assert by_name["tensor", "a.w"] == np.inf
    assert all(limit == 1.0 for (level, _), limit in by_name.items() if level == "bin")
    np.testing.assert_array_equal(decision.limit_B, np.ones(TREE.num_bins))


def test_outcomes_say_why():
    decision = ledger(ROWS, gs.Fixed(1.0)).decide(np.array([0.25, 4.0, np.nan, np.inf, 1.0, 0.0]))
    assert decision.outcome_B.tolist() == [0, 1, 2, 2, 0, 0]
    np.testing.assert_allclose(decision.scale_B, [1, 0.5, 0, 0, 1, 1])
    np.testing.assert_allclose(decision.norm_B, [0.5, 2, 0, 0, 1, 0])
    assert [Outcome(i).name for i in range(3)] == ["KEPT", "SCALED", "ZEROED"]
    assert all(outcome.sentence for outcome in Outcome)


def test_history_of_a_node_is_that_of_what_its_bins_kept():
    """A root with a running mean over bins with a limit: the mean sees the bins after their own limit."""
    budgets = {"root": gs.Ema(2.0, beta=0.5, warmup=1), "bin": gs.Fixed(1.0)}
    plan = gs.per_tensor(Layout.from_shapes({"a": (1,), "b": (1,)}))
    book = ledger(plan, budgets)
    book.decide(np.array([100.0, 100.0]))
    decision = book.decide(np.array([100.0, 0.0]))
    assert decision.limit_N[0] == pytest.approx(2.0 * np.sqrt(2.0))


def test_weights_paces_and_reaches_of_a_node():
    """Above the bins squares add; pace and reach are means by size."""
    plan = gs.per_tensor(Layout.from_shapes({"a": (1,), "b": (3,)}))
    squares, weights = np.array([100.0, 100.0]), np.array([9.0, 16.0])
    pace, reach = np.array([1.0, 0.5]), np.array([0.1, 0.2])
    decision = ledger(plan, {"root": gs.RelativeStep(0.1)}).decide(squares, weights, pace, reach)
    want = 0.1 * (1.0 + 3 * 0.5) / 4 * 5.0 / ((0.1 + 3 * 0.2) / 4)
    assert decision.limit_N[0] == pytest.approx(want)
    bins = ledger(plan, gs.RelativeStep(0.1)).decide(squares, weights, pace, reach)
    np.testing.assert_allclose(bins.limit_B, [0.1 * 3.0 / 0.1, 0.1 * 0.5 * 4.0 / 0.2])


@pytest.mark.parametrize("rule", ["bottom_up", "nearest"])
def test_a_weight_that_is_not_finite_keeps_its_harm_to_itself(rule):
    """Its own bin falls back to the smallest weight that counts; the tensor above is measured without it."""
    weights = np.array([np.nan, 4.0, 1.0, 1.0, 1.0, 1.0])
    book = ledger(TREE, {"tensor": gs.Relative(0.1), "bin": gs.Relative(1.0)}, rule=rule)
    decision = book.decide(np.full(6, 100.0), weights)
    assert np.isfinite(decision.scale_B).all()
    assert decision.limit_B[0] == 1e-3
    tensor = next(n.index for n in TREE.nodes if n.name == "a.w")
    assert decision.limit_N[tensor] == pytest.approx(0.1 * 2.0)


def test_histories_are_saved_and_loaded_by_level_name_and_place():
    budgets = {"root": "ema", "bin": ("percentile", gs.Fixed(3.0))}
    book = ledger(ROWS, budgets)
    for _ in range(3):
        book.decide(np.full(ROWS.num_bins, 4.0))
    state = book.state_dict()
    assert set(state) == {"root/ema/0", "bin/percentile/1"}
    other = ledger(ROWS, budgets)
    other.load_state_dict(state, call="f")
    np.testing.assert_array_equal(other.decide(np.full(6, 9.0)).scale_B, book.decide(np.full(6, 9.0)).scale_B)
    state["bin/percentile/1"][0][:] = 0  # what was loaded is a copy
    np.testing.assert_array_equal(other.decide(np.full(6, 9.0)).scale_B, book.decide(np.full(6, 9.0)).scale_B)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {},
            r"f: expected the history of budgets \['bin/ema/0', 'root/ema/1'\], got \[\]. Use the budgets of",
        ),
        (lambda s: {**s, "bin/zscore/2": []}, "got .*bin/zscore/2"),
        (
            lambda s: {**s, "bin/ema/0": [a[:2] for a in s["bin/ema/0"]]},
            r"expected vectors of shape \(6,\) at 'bin/ema/0'",
        ),
        (lambda s: {**s, "root/ema/1": s["root/ema/1"][:1]}, r"expected vectors of shape \(1,\) at 'root/ema/1'"),
    ],
)
def test_a_history_that_does_not_fit_is_refused_whole(change, words):
    book = ledger(ROWS, {"bin": "ema", "root": "ema"})
    book.decide(np.full(6, 4.0))
    before = {key: [a.copy() for a in arrays] for key, arrays in book.state_dict().items()}
    other = ledger(ROWS, {"bin": "ema", "root": "ema"})
    for _ in range(4):
        other.decide(np.full(6, 100.0))
    with pytest.raises(ValueError, match=words):
        book.load_state_dict(change(other.state_dict()), call="f")
    for key, arrays in book.state_dict().items():
        for a, b in zip(arrays, before[key], strict=True):
            np.testing.assert_array_equal(a, b)


def test_limits_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"f\(budget=\{'bin': Fixed\(…\)\}\): .* shape \(6,\), got shape \(2,\)"):
        ledger(ROWS, gs.Fixed([1.0, 2.0]))


def test_another_rule_is_refused():
    with pytest.raises(ValueError, match=r"f\(rule='best'\): expected one of bottom_up, nearest"):
        ledger(ROWS, gs.Fixed(1.0), rule="best")


@pytest.mark.parametrize(
    ("budget", "idle"),
    [
        ({"root": gs.Fixed(3.0), "bin": gs.Fixed(1.0)}, "'all'"),
        ({"root": gs.Fixed(2.0), "bin": gs.Fixed(1.0)}, None),
        ({"root": gs.Fixed(1.0), "module": gs.Fixed(0.5)}, "'all'"),
        ({"root": gs.Fixed(1.0), "module": gs.Fixed(0.8), "bin": gs.Fixed(0.9)}, None),
        ({"module": gs.Fixed(2.0), "bin": gs.Fixed(1.0)}, "'a'"),
        ({"root": gs.Fixed(3.0), "bin": gs.Relative(1.0)}, None),
    ],
)
def test_a_limit_that_can_never_bind_is_warned_of(budget, idle, recwarn):
    """Six bins of at most 1 make at most 2.449 together."""
    ledger(TREE, budget)
    words = [str(w.message) for w in recwarn]
    if idle is None:
        assert not words
    else:
        assert len(words) == 1
        assert f"of {idle} can never bind" in words[0]
        assert "Lower it, or leave it out" in words[0]


def test_torch_and_numpy_books_agree():
    budgets = {"root": "ema", "tensor": "zscore", "bin": ("percentile", "relative")}
    first = ledger(TREE, budgets)
    second = Ledger(TREE, budgets_by_level(budgets, TREE, call="f"), torch.zeros(1, dtype=torch.float64))
    rng = np.random.default_rng(0)
    for _ in range(40):
        squares, weights = rng.exponential(size=6) ** 3, rng.exponential(size=6)
        a = first.decide(squares, weights)
        b = second.decide(torch.from_numpy(squares), torch.from_numpy(weights))
        np.testing.assert_allclose(b.scale_B.numpy(), a.scale_B, rtol=1e-12)
        np.testing.assert_allclose(b.limit_N.numpy(), a.limit_N, rtol=1e-12)
        assert b.outcome_B.tolist() == a.outcome_B.tolist()
