"""Fuzzing: random, hostile and damaged input to every door of the package; out may come an answer or our own error.

A target is a function of a `random.Random`: a campaign gives it a seeded one, tests give it one of hypothesis, whose
draws shrink. A target returns "ok" or "refused", and raises only where something is wrong.
"""

from benchmarks.fuzz.budgets import budgets
from benchmarks.fuzz.checkpoints import checkpoint_bytes
from benchmarks.fuzz.command_lines import command_lines
from benchmarks.fuzz.configurations import configurations
from benchmarks.fuzz.layouts import layouts, plans
from benchmarks.fuzz.projections import projections
from benchmarks.fuzz.run_files import damaged_bytes, damaged_rows
from benchmarks.fuzz.states import states

TARGETS = {
    target.__name__: target
    for target in (
        layouts,
        plans,
        budgets,
        projections,
        states,
        damaged_bytes,
        damaged_rows,
        checkpoint_bytes,
        command_lines,
        configurations,
    )
}

__all__ = ["TARGETS"]
