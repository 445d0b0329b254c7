"""Broken formulas of GSO's update, planted in its eager definition. Each is named for the law that must catch it."""

from __future__ import annotations

import copy

import torch

import gradsplit as gs
from gradsplit.optim import parts
from gradsplit.optim.updates.reference import ReferenceUpdate
from tests.laws import laws_of_updates as laws
from tests.laws.cases import PLANS
from tests.optim import amp_runs

PLAN = PLANS["xsp"](laws.LAYOUT)


def _with(update):
    """GSO whose parts are updated by a changed definition."""

    def make(pairs, **options):
        optimizer = gs.GSO(pairs, **{"backend": "eager", **options})
        for part in optimizer._parts:
            part.update = update(part.split)
        return optimizer

    make.__name__ = update.__name__
    return make


class DecaysTheGradient(ReferenceUpdate):
    """L2 regularisation in the place of decoupled decay: Adam, not AdamW."""

    def step(self, gradients, states, groups, scaling=None):
        weights = self.split.parameters
        gradients = [
            g if g is None else g + group["weight_decay"] * w
            for g, w, group in zip(gradients, weights, groups, strict=True)
        ]
        super().step(gradients, states, [{**group, "weight_decay": 0.0} for group in groups], scaling)


class DecaysTwice(ReferenceUpdate):
    def step(self, gradients, states, groups, scaling=None):
        super().step(gradients, states, [{**g, "weight_decay": 2 * g["weight_decay"]} for g in groups], scaling)


class EpsilonUnderTheRoot(ReferenceUpdate):
    """sqrt(v + eps) is not sqrt(v) + eps."""

    def step(self, gradients, states, groups, scaling=None):
        for state, group in zip(states, groups, strict=True):
            if "exp_avg_sq" in state:
                state["exp_avg_sq"].add_(group["eps"])
        super().step(gradients, states, [{**group, "eps": 0.0} for group in groups], scaling)


class ForgetsTheBiasOfTheFirstMoment(ReferenceUpdate):
    def step(self, gradients, states, groups, scaling=None):
        groups = [
            {**g, "lr": g["lr"] * (1 - g["betas"][0] ** float(s["step"])) if s else g["lr"]}
            for g, s in zip(groups, states, strict=True)
        ]
        super().step(gradients, states, groups, scaling)


class SwapsTheBetas(ReferenceUpdate):
    def step(self, gradients, states, groups, scaling=None):
        super().step(gradients, states, [{**g, "betas": g["betas"][::-1]} for g in groups], scaling)


class SwapsTwoBins(ReferenceUpdate):
    """The scales of two rows change places."""

    def _factor(self, t, values_B, like):
        values_B = values_B.clone()
        first, last = self.split.bins_of_tensor[t][[0, -1]] if self.split.bins_of_tensor[t].size else (0, 0)
        values_B[[first, last]] = values_B[[last, first]]
        return super()._factor(t, values_B, like)


class SquaresTheGradientBeforeItsScale(ReferenceUpdate):
    """The second moment a bin takes in what was measured, not what was let through."""

    def _learn_bin_squares(self, decision, gradients, states, groups):
        kept = copy.copy(decision)
        object.__setattr__(kept, "scale_B", torch.ones_like(decision.scale_B))
        super()._learn_bin_squares(kept, gradients, states, groups)


class CapsWithTheDecay(ReferenceUpdate):
    """The bound on the update measures the decay too."""

    def _update(self, t, gradient, state, group, times_B, finite_B):
        update = super()._update(t, gradient, state, group, times_B, finite_B)
        return update + self.decay_T[t] * self.split.parameters[t]

    def step(self, gradients, states, groups, scaling=None):
        self.decay_T = [group["lr"] * group["weight_decay"] for group in groups]
        super().step(gradients, states, [{**group, "weight_decay": 0.0} for group in groups], scaling)


class DecaysApartFromTheCap(ReferenceUpdate):
    """The decay goes on at the full rate where the update is shortened."""

    def step(self, gradients, states, groups, scaling=None):
        before = [p.clone() for p in self.split.parameters]
        super().step(gradients, states, [{**group, "weight_decay": 0.0} for group in groups], scaling)
        for p, old, g, group in zip(self.split.parameters, before, gradients, groups, strict=True):
            if g is not None:
                p.sub_(old, alpha=group["lr"] * group["weight_decay"])


class LeavesOutTheCap(ReferenceUpdate):
    def step(self, gradients, states, groups, scaling=None):
        self.split.update, kept = None, self.split.update
        super().step(gradients, states, groups, scaling)
        self.split.update = kept


class NegatesTheGradientItself(ReferenceUpdate):
    """Under `maximize` the caller's gradient is overwritten."""

    def step(self, gradients, states, groups, scaling=None):
        for gradient, group in zip(gradients, groups, strict=True):
            if gradient is not None and group["maximize"]:
                gradient.neg_()
        super().step(gradients, states, [{**group, "maximize": False} for group in groups], scaling)


class TakesTheScaleForTheGradient(ReferenceUpdate):
    """Limits are compared with gradients that still carry a GradScaler's scale."""

    def step(self, gradients, states, groups, scaling=None):
        if scaling is not None:
            scaling = type(scaling)(None, scaling.found_inf)
        super().step(gradients, states, groups, scaling)


class LearnsOnAnOverflow(ReferenceUpdate):
    """What the scaler found is not heeded: bins that are finite move and teach."""

    def step(self, gradients, states, groups, scaling=None):
        if scaling is not None:
            scaling = type(scaling)(scaling.scale, torch.zeros_like(scaling.found_inf))
        super().step(gradients, states, groups, scaling)


def counts_an_overflow(pairs, **options):
    """GSO whose step counters go on although the step was left out."""

    class CountsAnOverflow(gs.GSO):
        def step(self, closure=None):
            kept = parts.advance
            parts.advance = lambda state, found_inf: kept(state, None)
            try:
                return super().step(closure)
            finally:
                parts.advance = kept

    return CountsAnOverflow(pairs, **options)


def _formulas(make):
    laws.check_equals_the_formulas(make, PLAN, {"weight_decay": 0.3})


def _formulas_of_a_bin(make):
    laws.check_equals_the_formulas(make, PLAN, {"second_moment": "bin"})


def _gradients_stay(make):
    laws.check_gradients_stay(make, PLAN)


def _moves(make):
    laws.check_rows_move_by_a_share_of_their_length(make, PLAN, torch.float64)


def _scaled(make):
    amp_runs.check_a_scale_changes_nothing(make)


def _overflow(make):
    amp_runs.check_an_overflow_moves_nothing(make)


MUTANTS = {
    _with(DecaysTheGradient): _formulas,
    _with(DecaysTwice): _formulas,
    _with(EpsilonUnderTheRoot): _formulas,
    _with(ForgetsTheBiasOfTheFirstMoment): _formulas,
    _with(SwapsTheBetas): _formulas,
    _with(SwapsTwoBins): _formulas,
    _with(CapsWithTheDecay): _formulas,
    _with(DecaysApartFromTheCap): _formulas,
    _with(SquaresTheGradientBeforeItsScale): _formulas_of_a_bin,
    _with(LeavesOutTheCap): _moves,
    _with(NegatesTheGradientItself): _gradients_stay,
    _with(TakesTheScaleForTheGradient): _scaled,
    _with(LearnsOnAnOverflow): _overflow,
    counts_an_overflow: _overflow,
}
LAWS = (_formulas, _formulas_of_a_bin, _gradients_stay, _moves, _scaled, _overflow)
