"""Initialisation: a layer whose weights are far hotter than its siblings', and the factor that mends it.

Such a layer is "hot" where it enlarges its input, and only "uneven" where even so it does not.
"""

from __future__ import annotations

import math

from .evidence import Evidence
from .finding import Finding

ENLARGES = 1.2


def find(evidence: Evidence) -> list[Finding]:
    """One finding a hot weight; a weight is judged by its siblings of the same family."""
    findings = []
    for entry in evidence.hot:
        name = entry.module or "(root)"
        links = [link for link in evidence.chain.links if link.module == entry.module]
        measured = "; ".join(
            f"measured gain of {link.name}: backward {link.gain:.3g}, forward {link.forward_gain:.3g}"
            for link in links[:1]
            if math.isfinite(link.forward_gain) or math.isfinite(link.gain)
        )
        findings.append(
            Finding(
                "hot layer" if entry.gain >= ENLARGES else "uneven layer",
                name,
                entry.gain,
                "gain of a random or constant input, rms out / rms in",
                f"{name}: its {entry.parameter} is {entry.ratio:.3g} times hotter than its siblings",
                f"its weights would make a random or constant input {entry.gain:.3g} times as large, its siblings' "
                f"{entry.reference:.3g} times" + (f"; {measured}" if measured else ""),
                f"multiply {entry.parameter} by {1 / entry.ratio:.2g}, or initialise it like its siblings",
                # above an explosion of the same size: this is the cause, that is the consequence
                math.log10(entry.ratio) + 0.5,
            )
        )
    return findings
