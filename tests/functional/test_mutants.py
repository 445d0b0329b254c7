"""Planted faults: each makes the numbers differ from PyTorch's by far more than the law allows, on the case named.

They run in float64 numpy, where nothing is compiled and the honest functions agree to 1e-9.
"""

from __future__ import annotations

import numpy as np
import pytest

import gradsplit as gs
from gradsplit.budget import decision as deciding
from gradsplit.budget import projection as bottom_up
from gradsplit.functional import Patterns, adam, gso_rule, splitting
from tests.functional import in_torch
from tests.functional.cases import CASES, LR, MOMENTUM, gradients, pace_at, weights

STEPS = 12
RATE = LR / (1 - MOMENTUM)


def distance_of_scales(name, pace=pace_at, reach=lambda step: pace_at(step) * RATE, held=weights):
    """How far scales are from PyTorch's over some steps; the hooks are where a caller can go wrong."""
    case = CASES[name]
    split = splitting(case.plan(), case.budget, rule=case.rule)
    history, far = split.init(weights()), 0.0
    for step in range(STEPS):
        given = gradients(step)
        w = held() if held is weights else held(given)
        _, history, decision = split.update(given, history, w, np.float64(pace(step)), np.float64(reach(step)))
        far = max(far, float(np.abs(decision.scale_B - in_torch.scales(name)[step]).max()))
    return far


def distance_of_weights(second_moment):
    """How far GSO's weights are from PyTorch's after its run."""
    rule = gso_rule(CASES["xsp / relative"].plan(), second_moment=second_moment)
    held = weights()
    state = rule.init(held)
    for i in range(in_torch.GSO_STEPS):
        given = in_torch.gso_gradients(i, held)
        changes, state, _ = rule.update(given, state, held, in_torch.GSO_LR * pace_at(i), pace_at(i))
        held = [w + change for w, change in zip(held, changes, strict=True)]
    pairs = zip(held, in_torch.after_gso(second_moment), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def test_without_a_fault_the_distances_are_those_of_rounding():
    assert distance_of_scales("xsp / relative_step") < 1e-9
    assert distance_of_scales("tree_sp over rows / every budget / nearest") < 1e-9
    assert distance_of_weights("element") < 1e-4
    assert distance_of_weights("bin") < 1e-4


CALLERS = {
    "the pace of the schedule is left out": ("xsp / relative_step", {"pace": lambda step: 1.0}),
    "momentum is left out of the reach": ("xsp / relative_step", {"reach": lambda step: pace_at(step) * LR}),
    "the rate is that of the step before": ("xsp / relative_step", {"reach": lambda step: pace_at(step - 1) * RATE}),
    "gradients stand for weights": ("xsp / relative", {"held": lambda given: given}),
}


@pytest.mark.parametrize("fault", CALLERS)
def test_a_fault_of_the_caller_is_caught(fault):
    name, hooks = CALLERS[fault]
    assert distance_of_scales(name, **hooks) > 1e-5


def _learns_the_spike(self, xp, reading, kept, state, honest=gs.Ema.learn):
    return honest(self, xp, reading, reading.norm, state)


def _over_shortened_rows(self, arrays, honest=Patterns.amounts_B, **named):
    return honest(self, [a[..., :-1] if a.ndim > 1 and a.shape[-1] > 1 else a for a in arrays], **named)


def _root_of_a_scale(norm, limit, honest=bottom_up.bin_scales):
    return honest(norm, limit) ** 0.5


FAULTS = {
    "history takes in the raw spike": ("xsp / ema", gs.Ema, "learn", _learns_the_spike),
    "the last column is not measured": ("xsp / fixed", Patterns, "amounts_B", _over_shortened_rows),
    "a scale is the root of what it should be": ("xsp / fixed", deciding, "bin_scales", _root_of_a_scale),
    "children add by their lengths": (
        "tree_sp over rows / every budget / bottom_up",
        deciding.sums_for(np.zeros(1)),
        "of",
        staticmethod(lambda norm: norm),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_inside_is_caught(fault, monkeypatch):
    name, place, attribute, wrong = FAULTS[fault]
    in_torch.scales(name)  # PyTorch's numbers come from the honest code, made beforehand
    monkeypatch.setattr(place, attribute, wrong)
    assert distance_of_scales(name) > 1e-5


def _late_correction(xp, beta, step, honest=adam.grown):
    return honest(xp, beta, step + 1.0)


def _swapped_memories(xp, beta, step, honest=adam.grown):
    return honest(xp, 0.9 if beta == 0.999 else 0.999, step)


def _no_zeroes(self, arrays, scale_B, zero_B, honest=Patterns.scaled):
    return honest(self, arrays, np.where(zero_B, 1.0, scale_B), np.zeros_like(zero_B))


def _caps_nothing(plan, terms, history, *rest, honest=adam.decide, **named):
    decision, history = honest(plan, terms, history, *rest, **named)
    if any(term.budget.bounds_update for term in terms):
        decision = gs.Decision(plan, decision.norm_B, decision.finite_B, np.ones_like(decision.scale_B), ())
    return decision, history


GSO_FAULTS = {
    "the correction of the moments is a step late": ("grown", _late_correction),
    "the two memories are swapped in the correction": ("grown", _swapped_memories),
    "the update is not capped": ("decide", _caps_nothing),
}


@pytest.mark.parametrize("second_moment", ["element", "bin"])
@pytest.mark.parametrize("fault", GSO_FAULTS)
def test_a_fault_of_gso_is_caught(fault, second_moment, monkeypatch):
    in_torch.after_gso(second_moment)
    attribute, wrong = GSO_FAULTS[fault]
    monkeypatch.setattr(adam, attribute, wrong)
    assert distance_of_weights(second_moment) > 1e-4


def test_a_broken_bin_that_is_not_zeroed_is_caught(monkeypatch):
    monkeypatch.setattr(Patterns, "scaled", _no_zeroes)
    split = splitting(CASES["xsp / fixed"].plan(), gs.Fixed(0.5))
    given = gradients(6)
    bounded, _, decision = split.update(given, split.init(given))
    assert not decision.finite_B.all()
    assert not all(np.isfinite(array).all() for array in bounded)
