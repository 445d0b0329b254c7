"""Dead units: rectifiers whose units are zero for the whole batch; they pass no signal."""

from __future__ import annotations

from .evidence import Evidence
from .finding import Finding

SHARE = 0.5


def find(evidence: Evidence) -> list[Finding]:
    """One finding an activation function of which at least half the units are dead."""
    return [
        Finding(
            "dead units",
            entry.module,
            entry.dead,
            "share of units",
            f"{entry.module}: {entry.dead:.0%} of its units are zero for every sample",
            f"{entry.kind} gave exactly 0 for the whole batch in these units, so no signal passes them",
            "lower the learning rate, move the bias in front of it up, or use a rectifier with a slope on both sides",
            3.0 if entry.dead == 1.0 else entry.dead,
        )
        for entry in evidence.activity
        if entry.dead >= SHARE
    ]
