"""Gains through time: a recurrence whose product of factors explodes or vanishes."""

from __future__ import annotations

import math

from .evidence import Evidence
from .finding import Finding

GROWN, LOST = 2.0, 6.0


def find(evidence: Evidence) -> list[Finding]:
    """One finding a layer of a recurrent module whose signal grows or fades too much over the sequence."""
    findings = []
    for steps in evidence.chain.recurrences:
        known = [math.log10(gain) for gain in steps.gain_T if gain > 0 and math.isfinite(gain)]
        if not known:
            continue
        total, a_step = sum(known), 10 ** (sum(known) / len(known))
        module = steps.name.split(" layer ")[0]
        exponent = steps.exponents[0] if steps.exponents else math.nan
        told = f"{len(known)} steps of mean gain {a_step:.3g}, leading Lyapunov exponent {exponent:+.3f} a step"
        if total >= GROWN:
            findings.append(
                Finding(
                    "explosion through time", module, 10 ** min(total, 300.0), "growth over the sequence, no unit",
                    f"{steps.name}: the signal grows by 10^{total:.1f} through time", told,
                    "draw the gain to one (gs.gain_penalty), shorten the sequence, or scale the recurrent weight by "
                    f"{1 / a_step:.2g}; bounding the time steps did not help in trials", total,
                )
            )  # fmt: skip
        elif total <= -LOST:
            findings.append(
                Finding(
                    "vanishing through time", module, 10 ** max(total, -300.0), "share left after the sequence",
                    f"{steps.name}: only 10^{total:.1f} of the signal is left at the first step", told,
                    "draw the gain to one (gs.gain_penalty), raise a forget gate's bias, or initialise the recurrent "
                    "weight orthogonal", 0.4,
                )
            )  # fmt: skip
    return findings
