"""The laws of every budget, over histories drawn by hypothesis."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsplit.budget import BUDGETS as REGISTERED
from tests.laws import laws_of_budgets as laws
from tests.laws.cases import BUDGETS

# Positive norms over a few decades, up to what a float32 tensor can have and beyond 1.8e19, where its squares overflow.
NORM = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([1e-20, 1.8e19, 3e30, 3e38]))
HISTORIES = st.lists(st.lists(NORM, min_size=3, max_size=3).map(np.array), min_size=5, max_size=12)
CALM = st.lists(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3).map(np.array), min_size=5, max_size=12)


@pytest.mark.parametrize("law", laws.ALL, ids=lambda law: law.__name__)
@pytest.mark.parametrize("budget", BUDGETS)
@settings(max_examples=15)
@given(history=HISTORIES)
def test_on_drawn_histories(budget, law, history):
    law(BUDGETS[budget], history)


@pytest.mark.parametrize("budget", REGISTERED)
@settings(max_examples=15)
@given(history=HISTORIES)
def test_a_spike_at_first_does_not_move_the_default_constants(budget, history):
    """The instances of the other laws forget fast; those that users get have long memories."""
    laws.check_a_spike_at_first_is_forgotten(REGISTERED[budget](), history)


def in_units_four_times_as_large(budget):
    """The same budget with every constant that has units four times as large."""
    units = {"fixed": ("limit",), "relative": ("eps",), "relative_step": ("floor", "length")}.get(budget.name, ())
    return dataclasses.replace(budget, **{name: 4.0 * getattr(budget, name) for name in units})


@pytest.mark.parametrize("budget", BUDGETS)
@settings(max_examples=15)
@given(history=CALM)
def test_limits_have_the_units_of_norms(budget, history):
    laws.check_units(BUDGETS[budget], history, in_units_four_times_as_large(BUDGETS[budget]))


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_limit_of_a_bin_binds_within_a_few_steps(budget):
    """The instances that the other laws use are tight enough to show something."""
    history = [np.array([1.0, 2.0])] * 4 + [np.array([100.0, 200.0])] * 2
    limits, _ = laws.replay(BUDGETS[budget], history)
    assert (limits[-1] < history[-1]).any(), f"{BUDGETS[budget]} binds nothing"
