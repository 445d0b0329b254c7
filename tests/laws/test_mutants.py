"""Every law catches what was broken to show it: a test that cannot fail is a defect."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import gradsplit as gs
from gradsplit.kernels.eager import EagerKernel
from tests.laws import (
    laws_of_backends,
    laws_of_budgets,
    mutants_of_backends,
    mutants_of_budgets,
    mutants_of_formulas,
    mutants_of_plans,
    mutants_of_rules,
    mutants_of_steps,
    mutants_of_updates,
)
from tests.laws.cases import PLANS, ZOO, tensors
from tests.laws.test_rules import norms_and_limits

# Where a backend cannot serve a memory layout it falls back and says so; the laws hold all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*falls back to eager torch")

CAUGHT = (AssertionError, IndexError)
"""An oracle that walks over a broken plan may also fall off its edge."""


@pytest.mark.parametrize(("mutant", "law"), mutants_of_plans.MUTANTS.items(), ids=lambda x: x.__name__)
def test_a_broken_strategy_is_caught(mutant, law):
    with pytest.raises(CAUGHT):
        law(mutant, ZOO)


@pytest.mark.parametrize(("mutant", "law"), mutants_of_rules.MUTANTS.items(), ids=lambda x: x.__name__)
def test_a_broken_rule_is_caught(mutant, law):
    plan = PLANS["tree_sp over rows"](ZOO)
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        for seed in range(20):
            law(mutant, plan, *norms_and_limits(plan, seed))


HISTORY = [np.array([1.0, 2.0, 0.5])] * 4 + [np.array([30.0, 2.0, 0.5]), np.array([1.0, 1.0, 1.0])]


@pytest.mark.parametrize(("mutant", "law"), mutants_of_budgets.MUTANTS, ids=lambda x: type(x).__name__)
def test_a_broken_budget_is_caught(mutant, law):
    more = {}
    if law is laws_of_budgets.check_units:
        more = {"rescaled": dataclasses.replace(mutant, eps=4 * mutant.eps)}
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        law(mutant, HISTORY, **more)


def _arguments(law, plan, dtype, strides):
    given = tensors(ZOO, dtype, strides, 2, size=1e19 if dtype == torch.float32 else 1.0)
    if law in (laws_of_backends.check_scaling, laws_of_backends.check_equals_reference):
        scale_B = torch.linspace(0, 1, plan.num_bins, dtype=torch.float64)
        zero_B = scale_B == 0
        for tensor in given if law is laws_of_backends.check_scaling else []:
            if tensor.numel() and zero_B[0]:
                tensor.view(-1)[0] = float("inf")
                break
        return given, scale_B, zero_B
    return (given,)


@pytest.mark.parametrize(("mutant", "law"), mutants_of_backends.MUTANTS.items(), ids=lambda x: x.__name__)
def test_a_broken_backend_is_caught_and_the_eager_one_is_not(mutant, law):
    plan = PLANS["xsp"](ZOO)
    cases = [(torch.float32, "contiguous"), (torch.bfloat16, "contiguous"), (torch.float64, "contiguous")]
    if law is laws_of_backends.check_writes_reach_the_tensor:
        cases += [(torch.float32, "gaps"), (torch.float32, "channels_last")]
    for dtype, strides in cases:
        law(EagerKernel, plan, *_arguments(law, plan, dtype, strides))
    with pytest.raises(AssertionError):
        for dtype, strides in cases:
            law(mutant, plan, *_arguments(law, plan, dtype, strides))


@pytest.mark.parametrize(("mutant", "law"), mutants_of_steps.MUTANTS.items(), ids=lambda x: x.__name__)
def test_a_broken_splitter_is_caught(mutant, law):
    with pytest.raises(AssertionError):
        law(mutant.make)


@pytest.mark.parametrize("law", mutants_of_steps.LAWS, ids=lambda x: x.__name__)
def test_the_true_splitter_passes_where_the_broken_ones_do_not(law):
    assert law(mutants_of_steps._Splitter.make) is None


@pytest.mark.parametrize(("mutant", "law"), mutants_of_updates.MUTANTS.items(), ids=lambda x: x.__name__)
def test_a_broken_update_is_caught(mutant, law):
    with pytest.raises(AssertionError):
        law(mutant)


@pytest.mark.parametrize("law", mutants_of_updates.LAWS, ids=lambda x: x.__name__)
def test_the_true_update_passes_where_the_broken_ones_do_not(law):
    assert law(gs.GSO) is None


@pytest.mark.parametrize(("mutant", "law"), mutants_of_formulas.MUTANTS.items(), ids=lambda x: x.__name__)
def test_a_broken_formula_is_caught(mutant, law):
    with pytest.raises(AssertionError):
        law(mutant)


@pytest.mark.parametrize("law", mutants_of_formulas.LAWS, ids=lambda x: x.__name__)
def test_the_true_formulas_pass_where_the_broken_ones_do_not(law):
    assert law(mutants_of_formulas._with(mutants_of_formulas.ReferenceUpdate)) is None
    assert law(gs.GSO) is None
