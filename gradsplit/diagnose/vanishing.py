"""Vanishing: the signal is lost on its way to the first layer."""

from __future__ import annotations

import math

from .evidence import Evidence
from .finding import Finding

DECADES = 3.0


def find(evidence: Evidence) -> list[Finding]:
    """At most one finding: the signal at the lowest layer with parameters against the loss's."""
    links = [
        link
        for link in evidence.chain.links[1:]
        if math.isfinite(link.parameter_norm) and math.isfinite(link.cumulative)
    ]
    if len(links) < 2 or not evidence.finite:
        return []
    bottom = links[-1]
    lost = -bottom.cumulative
    if lost < DECADES:
        return []
    way = evidence.chain.way(bottom.name)
    top = max(way, key=lambda link: link.cumulative)
    stages = max(1, len(way) - 1 - way.index(top))
    a_link = 10 ** (-(top.cumulative - bottom.cumulative) / stages)
    return [
        Finding(
            "vanishing",
            bottom.module,
            10**-lost,
            "share of the loss's signal, no unit",
            f"the signal vanishes: {bottom.name} receives {10**-lost:.2g} of what leaves the loss",
            f"signal {top.signal:.3g} at {top.name}, {bottom.signal:.3g} at {bottom.name}, {a_link:.3g} a link",
            f"scale the weights between them by {1 / a_link:.2g} a link (gs.balance_), or add residual connections",
            (lost - DECADES) / 3 + 0.5,
        )
    ]
