"""Broken updates of GSO. Each is named for the law that must catch it.

Four of them (bias correction off by one, decay times the rate twice, a lost write, None replaced by zeros) are
mutants that the optimizer tests of PyTorch itself let through.
"""

from __future__ import annotations

import torch

import gradsplit as gs
from tests.laws import laws_of_updates as laws
from tests.laws.cases import PLANS

PLAN = PLANS["xsp"](laws.LAYOUT)


def _states(optimizer):
    return [(p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


class BiasCorrectionOffByOne(gs.GSO):
    def step(self, closure=None):
        for _, state in _states(self):
            if not state:
                continue
            state["step"] += 1
        loss = super().step(closure)
        for _, state in _states(self):
            if state and state["step"] > 1:
                state["step"] -= 1
        return loss


class DecayTimesTheRateTwice(gs.GSO):
    def step(self, closure=None):
        kept = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] *= group["lr"]
        loss = super().step(closure)
        for group, decay in zip(self.param_groups, kept, strict=True):
            group["weight_decay"] = decay
        return loss


class LosesWritesToGaps(gs.GSO):
    """A parameter that is not contiguous is updated in a copy."""

    def step(self, closure=None):
        kept = [(p, p.detach().clone()) for p, _ in _states(self) if not p.is_contiguous()]
        loss = super().step(closure)
        for p, old in kept:
            p.data.copy_(old)
        return loss


class NoneIsZero(gs.GSO):
    def step(self, closure=None):
        for p, _ in _states(self):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return super().step(closure)


class Descends(gs.GSO):
    """`maximize` is ignored."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["maximize"] = False
        return super().step(closure)


class CapsTheTensor(gs.GSO):
    """The cap binds whole tensors, so that a row may move by more than its share."""

    def __init__(self, pairs, **options):
        super().__init__(pairs, **(options | {"plan": "per_tensor"}))


class Uncapped(gs.GSO):
    def __init__(self, pairs, **options):
        super().__init__(pairs, **options, budget=gs.Relative(0.2))


class SkipsTheWholeStep(gs.GSO):
    """What a gradient scaler does: one bad value, and nobody moves."""

    def step(self, closure=None):
        if all(p.grad is None or torch.isfinite(p.grad).all() for p, _ in _states(self)):
            super().step(closure)


class DecaysWhatItPassesOver(gs.GSO):
    def step(self, closure=None):
        bad = [p for p, _ in _states(self) if p.grad is not None and not torch.isfinite(p.grad).all()]
        super().step(closure)
        for p in bad:
            p.data.mul_(0.999)


class ForgetsTheFirstMoment(gs.GSO):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for _, state in _states(self):
            state["exp_avg"].zero_()


class KeepsBinStatisticsInHalfPrecision(gs.GSO):
    """What torch's own `load_state_dict` does to a float32 statistic of a bfloat16 parameter."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for _, state in _states(self):
            state["bin_sq"] = state["bin_sq"].bfloat16().float()


def _formulas(make):
    laws.check_equals_the_formulas(make, PLAN, {})


def _formulas_in_gaps(make):
    laws.check_equals_the_formulas(make, PLAN, {"strides": "transposed"})


def _formulas_ascending(make):
    laws.check_equals_the_formulas(make, PLAN, {"maximize": True})


def _moves(make):
    laws.check_rows_move_by_a_share_of_their_length(make, PLAN, torch.float64)


def _bad(make):
    laws.check_a_bad_bin_is_passed_over(make, PLAN, float("nan"), {})


def _saving(make):
    laws.check_saving_changes_nothing(make, PLAN, torch.bfloat16, {"second_moment": "bin"})


MUTANTS = {
    BiasCorrectionOffByOne: _formulas,
    DecayTimesTheRateTwice: _formulas,
    LosesWritesToGaps: _formulas_in_gaps,
    NoneIsZero: _formulas,
    Descends: _formulas_ascending,
    CapsTheTensor: _moves,
    Uncapped: _moves,
    SkipsTheWholeStep: _bad,
    DecaysWhatItPassesOver: _bad,
    ForgetsTheFirstMoment: _saving,
    KeepsBinStatisticsInHalfPrecision: _saving,
}

LAWS = (_formulas, _formulas_in_gaps, _formulas_ascending, _moves, _bad, _saving)
