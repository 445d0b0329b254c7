"""Each budget, step by step, against its formula in plain Python numbers; and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsplit as gs
from gradsplit.budget import BUDGETS, Ledger, Line, Reading, budgets_by_level, limits_of, register
from gradsplit.plan import Layout
from gradsplit.xp import numpy_xp


def run(budget, norms):
    """Limits before each step, when every norm is let through up to its limit; a norm of 0 is no observation."""
    state, limits = budget.init(numpy_xp, np.zeros(1)), []
    for norm in norms:
        reading = Reading(np.array([norm]), None, np.ones(1), np.ones(1), np.ones(1))
        limit = budget.limits(numpy_xp, reading, state)
        limits.append(float(limit[0]))
        state = budget.learn(numpy_xp, reading, np.minimum(norm, limit), state)
    return limits


def warm(history, mean):
    """The next mean of a warm-up of three or more observations, in the order in which they came."""
    if len(history) == 2:
        return min(history)
    if len(history) <= 3:
        return sorted(history)[len(history) // 2]
    return mean + (min(history[-1], 2 * mean) - mean) / len(history)


def ema(norms, *, ratio, beta, warmup, patience, growth):
    mean, seen, bounded, limits, history = 0.0, 0, 0, [], []
    for norm in norms:
        limit = ratio * mean if seen >= warmup else 5 * mean if seen >= 3 else math.inf
        limits.append(limit)
        kept = min(norm, limit)
        if norm == 0:
            continue
        history.append(kept)
        if seen < warmup:
            assert 1 - beta < 1 / (seen + 1), "else the exponential weight would hold in the warm-up"
            fresh, bounded = warm(history, mean), 0
        else:
            bounded = bounded + 1 if norm > limit else 0
            fresh = mean + (1 - beta) * (kept - mean)
        if bounded > patience:
            fresh = max(fresh, growth * mean)
        mean, seen = fresh, seen + 1
    return limits


def zscore(norms, *, z, beta, warmup):
    history, mean, var, limits = [], 0.0, 0.0, []
    for norm in norms:
        limit = 5 * mean if 3 <= len(history) < warmup else math.inf
        if len(history) >= warmup:
            sigma = max(math.sqrt(var), 1e-6 * mean)
            score = (norm - mean) / sigma
            if score > z:
                limit = mean + z**2 / score * sigma
        limits.append(limit)
        if norm == 0:
            continue
        kept = min(norm, limit)
        history.append(kept)
        if len(history) <= warmup:
            old, mean = mean, warm(history, mean)
            if len(history) == 3:
                var = (mean - min(history)) ** 2 * 2 / 3
            elif len(history) > 3:
                taken = min(kept, 2 * old)
                var += ((taken - old) * (taken - mean) - var) / len(history)
        else:
            mean = beta * mean + (1 - beta) * kept
            var = beta * var + (1 - beta) * (kept - mean) ** 2
    return limits


def percentile(norms, *, q, eta):
    c, history, limits = None, [], []
    for norm in norms:
        limits.append(math.inf if c is None else c)
        if norm == 0:
            continue
        history.append(norm)
        if len(history) == 3:
            c = sorted(history)[1]
        elif c is not None:
            c *= math.exp(-eta * ((1 if norm <= c else 0) - q))
    return limits


NORMS = st.lists(st.one_of(st.just(0.0), st.floats(0.1, 10.0), st.floats(50.0, 1e6)), min_size=1, max_size=60)


@settings(max_examples=60)
@given(NORMS)
def test_adaptive_budgets_follow_their_formulas(norms):
    constants = {"ratio": 1.5, "beta": 0.8, "warmup": 3, "patience": 2, "growth": 1.3}
    np.testing.assert_allclose(run(gs.Ema(**constants), norms), ema(norms, **constants), rtol=1e-9)
    constants = {"z": 1.5, "beta": 0.8, "warmup": 4}
    np.testing.assert_allclose(run(gs.ZScore(**constants), norms), zscore(norms, **constants), rtol=1e-6)
    constants = {"q": 0.7, "eta": 0.1}
    np.testing.assert_allclose(run(gs.Percentile(**constants), norms), percentile(norms, **constants), rtol=1e-9)


def test_default_constants_over_a_run_with_a_spike():
    rng = np.random.default_rng(0)
    norms = [*np.exp(rng.normal(0, 0.2, 80)), 1e4, *np.exp(rng.normal(0, 0.2, 40))]
    defaults = {"ratio": 1.5, "beta": 0.98, "warmup": 20, "patience": 20, "growth": 1.1}
    np.testing.assert_allclose(run(gs.Ema(), norms), ema(norms, **defaults), rtol=1e-9)
    np.testing.assert_allclose(run(gs.ZScore(), norms), zscore(norms, z=2.5, beta=0.97, warmup=25), rtol=1e-6)
    np.testing.assert_allclose(run(gs.Percentile(), norms), percentile(norms, q=0.9, eta=0.02), rtol=1e-9)
    for budget in (gs.Ema(), gs.ZScore(), gs.Percentile()):
        limits = run(budget, norms)
        assert limits[80] < 3, "the spike was let through"
        assert max(limits[81:]) < 1.3 * limits[80] or type(budget) is gs.ZScore, "the spike entered the history"


HISTORIES = [gs.Ema(), gs.Ema(1.5, warmup=3), gs.ZScore(), gs.ZScore(warmup=5), gs.Percentile(), gs.Percentile(0.5)]


@pytest.mark.parametrize("budget", HISTORIES, ids=repr)
@pytest.mark.parametrize("place", range(30))
def test_a_spike_in_the_warm_up_does_not_move_the_limits(budget, place):
    """A factor of 1,000 at any one of the first 30 observations: at step 40 the limits are within a factor of two."""
    ratios = []
    for seed in range(8):
        norms = np.exp(np.random.default_rng(seed).normal(0, 0.25, 40))
        for last in (5.0, 1e4):
            spoilt = norms.copy()
            spoilt[place] *= 1000
            clean, dirty = (run(budget, [*history, last])[-1] for history in (norms, spoilt))
            assert math.isfinite(clean)
            ratios.append(dirty / clean)
    assert min(ratios) > 0.5
    assert max(ratios) < 2


def test_spikes_in_five_of_a_hundred_steps_leave_the_limit_of_ema_where_it_was():
    far = 0
    for seed in range(40):
        drawn = np.random.default_rng(seed)
        norms = np.exp(drawn.normal(0, 0.25, 60))
        spoilt = np.where(drawn.random(60) < 0.05, 1000 * norms, norms)
        ratio = run(gs.Ema(), [*spoilt, 1.0])[-1] / run(gs.Ema(), [*norms, 1.0])[-1]
        far += not 0.5 < ratio < 2
    assert far <= 1, "two of the first three observations may be spikes, in 0.7 of 100 runs"


def test_a_history_of_percentile_that_was_one_array_is_still_loaded():
    plan = gs.xsp(Layout.from_shapes({"w": (3, 2)}))
    book = Ledger(plan, [("bin", gs.Percentile())], np.zeros(3))
    book.load_state_dict({"bin/percentile/0": [np.array([2.0, 0.0, 5.0])]}, call="f")
    decision = book.decide(np.array([100.0, 100.0, 100.0]))
    np.testing.assert_array_equal(decision.limit_B, [2.0, math.inf, 5.0])


def test_a_collapsed_limit_recovers():
    """A hundredfold rise of the norm is reached within patience + log(100 / ratio) / log(growth) steps or so."""
    norms = [1.0] * 20 + [100.0] * 100
    limits = run(gs.Ema(1.5), norms)
    reached = next(i for i, limit in enumerate(limits) if i >= 20 and limit >= 100.0)
    assert 20 + 20 <= reached <= 20 + 20 + math.ceil(math.log(100 / 1.5) / math.log(1.1)) + 2
    without = run(gs.Ema(1.5, growth=1.0), norms)
    assert max(without[21:]) < 100.0


def test_percentile_settles_at_the_quantile():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 1, 8000))
    limits = np.array(run(gs.Percentile(0.8, eta=0.02), norms))
    assert np.mean(norms[2000:] <= limits[2000:]) == pytest.approx(0.8, abs=0.02)


def test_weights_and_sizes_enter_as_their_formulas_say():
    weight, numel, pace = np.array([5.0, 0.0, 2.0]), np.array([4.0, 4.0, 1e6]), np.array([1.0, 0.5, 0.25])
    relative = limits_of(gs.Relative(0.1, eps=0.01), norm=np.ones(3), weight_norm=weight)
    np.testing.assert_allclose(relative, [0.5, 0.001, 0.2])
    budget, num_rows = gs.RelativeStep(0.1, floor=0.01, length=3.0), np.array([1.0, 0.0, 4.0])
    got = budget.limits(numpy_xp, Reading(np.ones(3), weight, numel, num_rows, pace), ())
    np.testing.assert_allclose(got, [0.1 * 5.0, 0.1 * 0.5 * 0.02, 0.1 * 0.25 * 10.0])
    numel, num_rows = np.array([4.0, 4.0, 100.0]), np.array([4.0, 0.25, 4.0])
    got = budget.limits(numpy_xp, Reading(np.ones(3), weight, numel, num_rows, pace), ())
    np.testing.assert_allclose(got, [0.1 * 6.0, 0.1 * 0.5 * 1.5, 0.1 * 0.25 * 6.0])


def test_a_fixed_limit_may_differ_from_node_to_node():
    limits = limits_of(gs.Fixed([1.0, float("inf"), 0.0]), norm=np.ones(3))
    np.testing.assert_array_equal(limits, [1.0, np.inf, 0.0])
    assert gs.Fixed(np.array([1, 2])) == gs.Fixed((1.0, 2.0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gs.Fixed(-1.0), r"Fixed\(limit=-1.0\): expected limits >= 0, where inf means unbounded"),
        (lambda: gs.Fixed(float("nan")), r"Fixed\(limit=nan\): expected limits >= 0"),
        (lambda: gs.Fixed([1.0, -2.0]), r"expected limits >= 0"),
        (lambda: gs.Fixed([[1.0]]), r"expected limits >= 0"),
        (lambda: gs.Fixed("one"), r"Fixed\(limit='one'\): expected a number, or one per node"),
        (lambda: gs.Relative(0.0), r"Relative\(factor=0.0\): expected a factor > 0, for example 0.01"),
        (lambda: gs.Relative(float("nan")), r"Relative\(factor=nan\)"),
        (lambda: gs.Relative(0.1, eps=0.0), r"Relative\(eps=0.0\): expected eps > 0"),
        (lambda: gs.RelativeStep(-0.1), r"RelativeStep\(tau=-0.1\): expected a share > 0, for example 0.03"),
        (lambda: gs.RelativeStep(0.1, floor=0.0), r"RelativeStep\(floor=0.0\): expected a root mean square > 0"),
        (lambda: gs.Ema(1.0), r"Ema\(ratio=1.0\): expected a ratio > 1, for example 1.5"),
        (lambda: gs.Ema(beta=1.0), r"Ema\(beta=1.0\): expected a memory in \(0, 1\)"),
        (lambda: gs.Ema(warmup=0), r"Ema\(warmup=0\): expected at least one observation"),
        (lambda: gs.Ema(patience=0), r"Ema\(patience=0\): expected at least one observation"),
        (lambda: gs.Ema(growth=0.9), r"Ema\(growth=0.9\): expected a factor >= 1"),
        (lambda: gs.ZScore(0.0), r"ZScore\(z=0.0\): expected standard deviations > 0"),
        (lambda: gs.ZScore(beta=0.0), r"ZScore\(beta=0.0\): expected a memory in \(0, 1\)"),
        (lambda: gs.ZScore(warmup=1), r"ZScore\(warmup=1\): expected at least two observations"),
        (lambda: gs.Ema(warmup=1.5), r"Ema\(warmup=1.5\): expected a whole number. Write warmup=2"),
        (
            lambda: gs.Fixed(None),
            r"Fixed\(limit=None\): expected a number, or one per node. Write for example Fixed\(1.0\)",
        ),
        (lambda: gs.Fixed(True), r"Fixed\(limit=True\): expected a number"),
        (lambda: gs.Percentile(1.0), r"Percentile\(q=1.0\): expected a quantile in \(0, 1\)"),
        (lambda: gs.Percentile(eta=0.0), r"Percentile\(eta=0.0\): expected a step in \(0, 1\]"),
    ],
)
def test_constants_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


PLAN = gs.xsp(Layout.from_shapes({"w": (3, 2)}))


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ("emma", ValueError, r"f\(budget='emma'\): expected one of relative_step, fixed, .*. Did you mean 'ema'\?"),
        (
            {"layer": gs.Fixed()},
            ValueError,
            r"f\(budget=\{'layer': …\}\): expected a level of root, module, tensor, bin",
        ),
        ({"module": gs.Fixed()}, ValueError, r"nodes at level 'module', got Plan\(.*\) without. .* tree_sp\(layout"),
        ({}, ValueError, r"f\(budget=\{\}\): expected at least one budget"),
        ((), ValueError, "expected at least one budget"),
        (1.0, TypeError, r"got 1.0. A constant limit is Fixed\(1.0\)"),
        (gs.Ema, TypeError, r"Write Ema\(\)"),
        (None, TypeError, "expected a budget, a name or a mapping from levels to them, got None"),
    ],
)
def test_what_is_no_budget_is_named(budget, error, words):
    with pytest.raises(error, match=words):
        budgets_by_level(budget, PLAN, call="f")


def test_names_tuples_and_mappings_become_pairs():
    pairs = budgets_by_level({"root": "fixed", "bin": (gs.Ema(2.0), "zscore")}, PLAN, call="f")
    assert pairs == [("root", gs.Fixed()), ("bin", gs.Ema(2.0)), ("bin", gs.ZScore())]


def test_the_base_alone_is_no_budget():
    with pytest.raises(TypeError, match="Budget: expected a budget that defines limits"):
        limits_of(gs.Budget(), norm=np.ones(1))


def doubled(self, xp, reading, state):
    return 2 * gs.Fixed.limits(self, xp, reading, state)


class Twice(gs.Fixed):
    limits = doubled


class WithItsOwnLine(gs.Fixed):
    limits = doubled

    def line(self):
        return Line(floor=2 * self.limit)


class OtherLeast(gs.RelativeStep):
    """A method that limits call."""

    def least(self, xp, numel, num_rows):
        return numel


class WithHistory(gs.Fixed):
    """The same limits, and a history that must see every step."""

    def init(self, xp, like):
        return (like * 0.0,)


class Mixin:
    limits = doubled


class OfAMixin(Mixin, gs.Fixed):
    pass


class Renamed(gs.Fixed):
    name = "renamed"
    limit = 3.0

    def check(self, num):
        return ""


@pytest.mark.parametrize(
    ("budget", "line", "constant"),
    [
        (Twice(1.0), None, None),
        (type("Further", (Twice,), {})(1.0), None, None),
        (WithItsOwnLine(1.0), Line(floor=2.0), None),
        (OtherLeast(), None, None),
        (WithHistory(1.0), None, None),
        (OfAMixin(1.0), None, None),
        (Renamed(1.0), Line(floor=1.0), 1.0),
        (gs.Fixed((1.0, 2.0)), None, (1.0, 2.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_description_is_inherited_with_the_limits_that_it_describes_and_not_without_them(budget, line, constant):
    assert budget.line() == line
    assert budget.constant() == constant


def test_a_root_that_a_changed_rule_can_bind_is_not_called_idle():
    plan = gs.xsp(Layout.from_shapes({"w": (4, 1)}))
    with pytest.warns(UserWarning, match="can never bind, since its children keep at most 2 together"):
        Ledger(plan, [("bin", gs.Fixed(1.0)), ("root", gs.Fixed(3.0))], np.zeros(1))
    Ledger(plan, [("bin", Twice(1.0)), ("root", gs.Fixed(3.0))], np.zeros(1))


@pytest.mark.parametrize("num", [2, 4])
def test_limits_that_do_not_fit_the_nodes_are_named(num):
    plan = gs.xsp(Layout.from_shapes({"w": (3, 1)}))
    words = (
        rf"f\(budget=\{{'bin': Fixed\(…\)\}}\): expected one limit, or one per node .*\(3,\), got shape \({num},\)\."
    )
    with pytest.raises(ValueError, match=words):
        Ledger(plan, [("bin", gs.Fixed((1.0,) * num))], np.zeros(1), call="f")


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (gs.Fixed(1.0), TypeError, "expected a subclass of Budget"),
        (type("Plain", (gs.budget.Budget,), {}), ValueError, r"register\(Plain\): expected a name"),
        (Twice, ValueError, r"register\(Twice\): expected a name that no budget has, got 'fixed', which is Fixed"),
        (
            dataclasses.make_dataclass(
                "Bare", ["size"], bases=(gs.budget.Budget,), frozen=True, namespace={"name": "bare"}
            ),
            ValueError,
            r"register\(Bare\): expected a default for every field, .* none for 'size'",
        ),
    ],
)
def test_what_cannot_be_registered_is_named(kind, error, words):
    before = dict(BUDGETS)
    with pytest.raises(error, match=words):
        register(kind)
    assert before == BUDGETS
