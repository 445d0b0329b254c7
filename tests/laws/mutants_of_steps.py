"""Broken splitters. Each is named for the law that must catch it, with the arguments that show it."""

from __future__ import annotations

import torch

import gradsplit as gs
from tests.laws import laws_of_steps as laws
from tests.laws.cases import BUDGETS, PLANS, ZOO, sgd

PLAN = PLANS["xsp"](ZOO)
EMA = BUDGETS["ema"]


class _Splitter(gs.GradientSplitter):
    @classmethod
    def make(cls, pairs, plan, budget, **options):
        return cls(pairs, plan, budget, optimizer=sgd(pairs), **options)


class DecidesAndDoesNothing(_Splitter):
    def step(self):
        kept = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        record = super().step()
        for p, old in zip(self.parameters, kept, strict=True):
            p.grad = old
        return record


class ScalesTwice(_Splitter):
    """Within every limit, but not what the record says."""

    def step(self):
        super().step()
        record = super().step()
        for p in self.parameters:
            p.grad.mul_(0.9)
        return record


class DropsTheStep(_Splitter):
    """One bad value sets every gradient to zero: what skipping the step does."""

    def step(self):
        bad = not all(torch.isfinite(p.grad).all() for p in self.parameters)
        record = super().step()
        if bad:
            for p in self.parameters:
                p.grad.zero_()
        return record


class LearnsFromBadBins(_Splitter):
    """A bin that was not finite counts as an observation."""

    def step(self):
        record = super().step()
        first, *others = self.ledger.history
        if first:
            mean, seen, *rest = first
            self.ledger.history = ((mean, seen + (~record.decision.finite_B).to(seen.dtype), *rest), *others)
        return record


class ForgetsItsHistory(_Splitter):
    def load_state_dict(self, state):
        super().load_state_dict({**state, "history": self.ledger.state_dict()})


class ForgetsTheStep(_Splitter):
    def state_dict(self):
        return {**super().state_dict(), "step_count": 0}


class ForgetsTheLargestRate(_Splitter):
    """The optimizer's schedule has gone down: without the top of the saved run the pace is too fast."""

    def load_state_dict(self, state):
        super().load_state_dict({**state, "top_lr": []})


class RoundsEverything(_Splitter):
    def step(self):
        record = super().step()
        for p in self.parameters:
            dense = p.grad if not p.grad.is_sparse else p.grad.values()
            dense.div_(3).mul_(3)
        return record


class FirstTensorIsSpecial(_Splitter):
    def step(self):
        self.parameters[0].grad.mul_(0.5)
        return super().step()


class FillsAbsentGradients(_Splitter):
    def step(self):
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return super().step()


class AddsAConstantToTheNorm(_Splitter):
    def step(self):
        for p in self.parameters:
            p.grad.mul_(1 / (1 + 1e-3 / (1e-30 + p.grad.norm())))
        return super().step()


def _order(make):
    laws.check_order_of_tensors(make, ZOO, PLANS["xsp"], BUDGETS["fixed"])


def _limits(make):
    laws.check_limits_hold_after_a_step(make, PLAN, EMA, torch.float32, "contiguous")


def _bad(make):
    laws.check_bad_values_stay_in_their_bin(make, PLAN, EMA, torch.float32, float("nan"), 3)


def _saving(make):
    laws.check_saving_changes_nothing(make, PLAN, EMA, torch.float32)


def _saving_rates(make):
    laws.check_saving_changes_nothing(make, PLAN, gs.RelativeStep(1e-3), torch.float32)


def _generous(make):
    laws.check_generous_limits_keep_every_bit(make, PLAN, torch.float32, "contiguous")


def _absent(make):
    laws.check_absent_gradients(make, PLAN, EMA, 1)


def _units(make):
    laws.check_units(make, PLAN, 1e3)


MUTANTS = {
    DecidesAndDoesNothing: _limits,
    ScalesTwice: _limits,
    DropsTheStep: _bad,
    LearnsFromBadBins: _bad,
    ForgetsItsHistory: _saving,
    ForgetsTheStep: _saving,
    ForgetsTheLargestRate: _saving_rates,
    RoundsEverything: _generous,
    FirstTensorIsSpecial: _order,
    FillsAbsentGradients: _absent,
    AddsAConstantToTheNorm: _units,
}

LAWS = (_limits, _bad, _saving, _saving_rates, _generous, _order, _absent, _units)
