"""The laws of both rules from limits to scales, on every plan of the zoo and on trees drawn by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradsplit as gs
from gradsplit.budget import RULES
from gradsplit.plan import Layout
from tests.laws import laws_of_rules as laws
from tests.laws.cases import PLANS, ZOO, generator
from tests.laws.oracles import bottom_up_scales

RULE = {name: (lambda plan, norm, limit, name=name: gs.project(plan, norm, limit, rule=name)) for name in RULES}


def tree_of(paths):
    """A plan whose tree is that of the dotted paths, one element a bin."""
    return gs.tree_sp(Layout.from_shapes(dict.fromkeys(paths, (1,))))


def norms_and_limits(plan, seed):
    """Norms of one size (odd seeds) or over 40 decades, some not finite; limits, some of them 0 and some infinite."""
    rng = generator(seed)
    norm_B = np.exp(rng.uniform(-46, 46, plan.num_bins) * (0.02 if seed % 2 else rng.choice([0.05, 1.0])))
    norm_B[rng.random(plan.num_bins) < 0.1] = 0.0
    norm_B[rng.random(plan.num_bins) < 0.1] = rng.choice([np.inf, np.nan])
    limit_N = np.exp(rng.uniform(-3, 3, plan.num_nodes))
    limit_N[rng.random(plan.num_nodes) < 0.3] = np.inf
    limit_N[rng.random(plan.num_nodes) < 0.05] = 0.0
    return norm_B, limit_N


@pytest.mark.parametrize("law", laws.ALL, ids=lambda law: law.__name__)
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("rule", RULES)
def test_on_every_plan(rule, strategy, law):
    plan = PLANS[strategy](ZOO)
    for seed in range(3):
        law(RULE[rule], plan, *norms_and_limits(plan, seed))


PATHS = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(lambda parts: ".".join([*parts, "w"])),
    min_size=1,
    max_size=8,
    unique=True,
)


@given(PATHS, st.integers(0, 10_000))
def test_on_drawn_trees(paths, seed):
    plan = tree_of(paths)
    norm_B, limit_N = norms_and_limits(plan, seed)
    for rule in RULE.values():
        for law in laws.ALL:
            law(rule, plan, norm_B, limit_N)


@given(PATHS, st.integers(0, 10_000))
def test_bottom_up_is_what_its_sentence_says(paths, seed):
    plan = tree_of(paths)
    norm_B, limit_N = norms_and_limits(plan, seed)
    norm_B = np.where(np.isfinite(norm_B), norm_B, 0.0)
    want = bottom_up_scales(plan, norm_B, limit_N)
    np.testing.assert_allclose(gs.project(plan, norm_B, limit_N), want, rtol=1e-9, atol=1e-14)
