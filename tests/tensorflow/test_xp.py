"""Budgets and projection on TensorFlow give numpy's numbers: eager, as a graph, and compiled by XLA."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gradsplit.budget import RULES, Ledger
from gradsplit.plan import Layout, tree_sp, xsp
from gradsplit.xp import namespace, numpy_xp
from tests.laws.cases import BUDGETS

LAYOUT = Layout.from_shapes({"a.w": (4, 3), "a.b": (4,), "c.w": (5, 4)})
PLANS = {"rows": xsp(LAYOUT), "tree": tree_sp(LAYOUT, inner="xsp")}


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow")


def test_the_namespace_has_the_functions_of_numpys(tf):
    xp = namespace(tf.constant([1.0]))
    assert xp.__name__ == "gradsplit.xp.tensorflow_xp"
    assert set(numpy_xp.__all__) <= set(vars(xp))


def test_a_constant_made_inside_a_graph_outlives_it(tf):
    kept = []

    @tf.function
    def first(x):
        kept.append(namespace(x).index(np.array([1, 0]), x))
        return x

    first(tf.constant([1.0, 2.0]))
    assert tf.gather(tf.constant([1.0, 2.0]), kept[0]).numpy().tolist() == [2.0, 1.0]


# XLA compiles the projection of a tree for seconds: once a rule.
MODES = [("rows", "eager"), ("rows", "graph"), ("tree", "eager"), ("tree", "xla")]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("plan", "mode"), MODES)
def test_budgets_at_all_levels_decide_as_in_numpy(tf, plan, rule, mode):
    plan = PLANS[plan]
    budgets = list(zip(itertools.cycle(("bin", "tensor", "root")), BUDGETS.values(), strict=False))
    rng = np.random.default_rng(0)
    steps = [
        np.exp(2 * rng.standard_normal((2, plan.num_bins))) for _ in range(3)
    ]  # histories are in force by the third
    steps[1][0][1] = np.inf
    ours = Ledger(plan, budgets, tf.zeros(1, tf.float64), rule=rule)
    theirs = Ledger(plan, budgets, np.zeros(1), rule=rule)
    expected = [theirs.decide(*step).scale_B for step in steps]
    squares, weights = (tf.constant(np.stack(column)) for column in zip(*steps, strict=True))

    def run(squares, weights):
        return tf.stack([ours.decide(squares[i], weights[i]).scale_B for i in range(len(steps))])

    got = run(squares, weights) if mode == "eager" else tf.function(run, jit_compile=mode == "xla")(squares, weights)
    np.testing.assert_allclose(got.numpy(), np.stack(expected), rtol=1e-12, atol=0)
    assert (np.stack(expected) < 1).any(), "the case bounds nothing"
