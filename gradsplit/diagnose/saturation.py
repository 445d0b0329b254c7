"""Saturation: squashing functions at their ends, where their derivative is nothing."""

from __future__ import annotations

from .evidence import Evidence
from .finding import Finding

SHARE = 0.5


def find(evidence: Evidence) -> list[Finding]:
    """One finding an activation function of which at least half the outputs are within 0.5 % of an end."""
    return [
        Finding(
            "saturation",
            entry.module,
            entry.saturated,
            "share of outputs",
            f"{entry.module}: {entry.saturated:.0%} of its outputs are saturated",
            f"outputs of {entry.kind} within 0.5 % of its range's ends, where its derivative is nearly 0",
            "scale the weights in front of it down, or normalise its input",
            entry.saturated,
        )
        for entry in evidence.activity
        if entry.saturated >= SHARE
    ]
