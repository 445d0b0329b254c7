"""Broken budgets. Each is named for the law that must catch it."""

from __future__ import annotations

from dataclasses import dataclass

import gradsplit as gs
from gradsplit.budget import Budget, Line
from tests.laws import laws_of_budgets as laws


@dataclass(frozen=True)
class LimitBelowZero(gs.Ema):
    """A mean minus a spread may be negative."""

    def limits(self, xp, reading, state):
        return super().limits(xp, reading, state) - 2.0 * reading.norm


@dataclass(frozen=True)
class DividesByNothing(gs.ZScore):
    """No floor under sigma."""

    def limits(self, xp, reading, state):
        mean, variance, seen = state
        limit = mean + self.z * (reading.norm - mean) * (variance / variance)
        return xp.where(seen >= self.warmup, limit, xp.full(len(mean), float("inf"), mean))


@dataclass(frozen=True)
class RelativeToSiblings(gs.Ema):
    """Limits from the mean over all nodes: one node's explosion moves its neighbours' limits."""

    def limits(self, xp, reading, state):
        return super().limits(xp, reading, state) * 0.0 + 1.5 * reading.norm.sum() / len(reading.norm)


@dataclass(frozen=True)
class LearnsFromNothing(gs.Ema):
    """A step without a gradient enters as a norm of 0, and the limit collapses."""

    def learn(self, xp, reading, kept, state):
        mean, seen, bounded = state
        return mean + (1 - self.beta) * (kept - mean), seen + 1.0, bounded


@dataclass(frozen=True)
class LearnsTheRawSpike(gs.Ema):
    """History takes in the norm as measured, so that an explosion raises its own limit."""

    def learn(self, xp, reading, kept, state):
        mean, seen, bounded = state
        observed = kept > 0
        fresh = mean + (1 - self.beta) * (reading.norm - mean)
        return xp.where(observed, fresh, mean), xp.where(observed, seen + 1.0, seen), bounded


@dataclass(frozen=True)
class BeginsWithTheFirst(gs.budget.RunningMedian):
    """The running median begins at the first norm, whatever comes after it."""

    def learn(self, xp, reading, kept, state):
        median, high, count = super().learn(xp, reading, kept, state)
        return xp.where(state[2] < 1, median, xp.where(state[2] < 3, state[0], median)), high, count


@dataclass(frozen=True)
class WarmsUpByThePlainMean(gs.Ema):
    """The first observations enter as they are, and nothing is bounded among them."""

    def limits(self, xp, reading, state):
        mean, seen, _ = state
        return xp.where(seen >= self.warmup, self.ratio * mean, xp.full(len(mean), float("inf"), mean))

    def learn(self, xp, reading, kept, state):
        mean, seen, bounded = state
        weight = xp.maximum(1.0 / (seen + 1.0), xp.full(len(mean), 1 - self.beta, mean))
        observed = kept > 0
        return xp.where(observed, mean + weight * (kept - mean), mean), xp.where(observed, seen + 1.0, seen), bounded


@dataclass(frozen=True)
class ForgetsUnits(gs.Relative):
    """A limit that is a number and not a length."""

    def limits(self, xp, reading, state):
        return super().limits(xp, reading, state) + 0.01


@dataclass(frozen=True)
class LooksAtTheFramework(gs.Fixed):
    """Another limit where the arrays are torch's."""

    def limits(self, xp, reading, state):
        return super().limits(xp, reading, state) * (2.0 if "torch" in xp.__name__ else 1.0)


@dataclass(frozen=True)
class ForgetsTheSchedule(gs.RelativeStep):
    """A limit that does not follow the pace, while its line does."""

    def limits(self, xp, reading, state):
        return super().limits(xp, reading._replace(pace=reading.pace * 0.0 + 1.0), state)

    def line(self):
        return gs.RelativeStep(self.tau, self.floor, self.length).line()


@dataclass(frozen=True)
class LineOfTheRoot(gs.Relative):
    """A line with the floor in the place of the root."""

    def line(self):
        return Line(slope=self.factor, root=self.factor * self.eps)


@dataclass(frozen=True)
class ConstantThatVaries(gs.Relative):
    def constant(self):
        return self.factor


SHORT = {"beta": 0.5, "warmup": 2, "patience": 2}

MUTANTS: list[tuple[Budget, object]] = [
    (LimitBelowZero(1.05, **SHORT), laws.check_limits_are_limits),
    (DividesByNothing(0.5, beta=0.5, warmup=2), laws.check_limits_are_limits),
    (RelativeToSiblings(1.05, **SHORT), laws.check_nodes_are_apart),
    (LearnsFromNothing(1.05, **SHORT), laws.check_absence_teaches_nothing),
    (LearnsTheRawSpike(1.05, **SHORT), laws.check_spike_has_no_weight_beyond_its_limit),
    (BeginsWithTheFirst(), laws.check_a_spike_at_first_is_forgotten),
    (WarmsUpByThePlainMean(), laws.check_a_spike_at_first_is_forgotten),
    (ForgetsUnits(0.05), laws.check_units),
    (LooksAtTheFramework(0.5), laws.check_namespaces_agree),
    (ForgetsTheSchedule(0.05), laws.check_its_descriptions_are_true),
    (LineOfTheRoot(0.05), laws.check_its_descriptions_are_true),
    (ConstantThatVaries(0.05), laws.check_its_descriptions_are_true),
]
