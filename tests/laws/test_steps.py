"""The laws of a step: strategies x budgets x dtypes x memory layouts, through the splitter that users call."""

from __future__ import annotations

import pytest
import torch

import gradsplit as gs
from tests.laws import laws_of_steps as laws
from tests.laws.cases import BUDGETS, DTYPES, PLANS, STRIDES, ZOO, plan_of, served_backends, splitter_of
from tests.laws.test_plans import BY_NAME

# Where a backend cannot serve a memory layout it falls back and says so; the laws hold all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*falls back to eager torch")

TREE = {"root": gs.Fixed(3.0), "module": gs.Ema(1.2, warmup=2), "tensor": gs.Fixed(1.0), "bin": gs.Relative(0.1)}
TUPLE = (gs.Fixed(0.7), gs.Percentile(0.5))
COMBINED = {**BUDGETS, "one for each level": TREE, "two at once": TUPLE}


def plan_for(strategy, budget):
    """A budget with modules needs a tree that has them."""
    if budget == "one for each level":
        return PLANS["tree_sp over rows"](ZOO)
    return PLANS[strategy](ZOO)


@pytest.mark.parametrize("budget", COMBINED)
@pytest.mark.parametrize("strategy", PLANS)
def test_limits_hold_after_every_step(strategy, budget):
    laws.check_limits_hold_after_a_step(
        splitter_of, plan_for(strategy, budget), COMBINED[budget], torch.float32, "contiguous"
    )


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_hold_in_every_dtype_and_memory_layout(dtype, strides):
    for budget in ("relative_step", "one for each level"):
        plan = plan_for("lbf, few bins", budget)
        laws.check_limits_hold_after_a_step(splitter_of, plan, COMBINED[budget], dtype, strides)


@pytest.mark.parametrize("backend", served_backends())
def test_limits_hold_with_every_backend_and_rule(backend):
    def make(pairs, plan, budget):
        return splitter_of(pairs, plan, budget, backend=backend, rule="nearest")

    plan = PLANS["tree_sp over rows"](ZOO)
    laws.check_limits_hold_after_a_step(make, plan, TREE, torch.float32, "transposed")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("budget", COMBINED)
def test_bad_values_stay_in_their_bin(budget, bad):
    for strategy in ("xsp", "lbf, few bins"):
        plan = plan_for(strategy, budget)
        for target in (0, plan.num_bins // 2):
            laws.check_bad_values_stay_in_their_bin(splitter_of, plan, COMBINED[budget], torch.float32, bad, target)


@pytest.mark.parametrize("rule", ["bottom_up", "nearest"])
@pytest.mark.parametrize("backend", served_backends())
def test_bad_values_stay_in_their_bin_with_every_backend(backend, rule):
    plan = PLANS["tree_sp over rows"](ZOO)
    laws.check_bad_values_stay_in_their_bin(
        splitter_of, plan, TREE, torch.bfloat16, float("nan"), 3, {"backend": backend, "rule": rule}
    )


@pytest.mark.parametrize("budget", COMBINED)
@pytest.mark.parametrize("strategy", ["xsp", "lbf, few bins", "tree_sp"])
def test_saving_and_loading_in_the_middle_changes_nothing(strategy, budget):
    laws.check_saving_changes_nothing(splitter_of, plan_for(strategy, budget), COMBINED[budget], torch.float32)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_generous_limits_every_bit_is_kept(dtype, strides):
    for backend in served_backends():

        def make(pairs, plan, budget, backend=backend):
            return splitter_of(pairs, plan, budget, backend=backend)

        laws.check_generous_limits_keep_every_bit(make, PLANS["tree_sp over lbf"](ZOO), dtype, strides)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("strategy", PLANS)
def test_the_order_of_tensors_does_not_matter(strategy, budget):
    laws.check_order_of_tensors(splitter_of, ZOO, BY_NAME.get(strategy, PLANS[strategy]), BUDGETS[budget])


@pytest.mark.parametrize("budget", COMBINED)
def test_an_absent_gradient_is_a_gradient_of_zeros_that_stays_absent(budget):
    plan = plan_for("xsp", budget)
    for absent in (0, 1, 4):
        laws.check_absent_gradients(splitter_of, plan, COMBINED[budget], absent)


@pytest.mark.parametrize("c", [2.0**-20, 1e-3, 1e3, 2.0**40])
def test_gradients_and_limits_in_other_units(c):
    laws.check_units(splitter_of, plan_of("xsp", ZOO), c)
