"""Explosion: the signal grows on its way from the loss to the first layer."""

from __future__ import annotations

import math

from .evidence import Evidence
from .finding import Finding

DECADES = 2.0


def find(evidence: Evidence) -> list[Finding]:
    """At most one finding: the largest growth of the chain, less what hot weights on the way explain."""
    links = [link for link in evidence.chain.links[1:] if math.isfinite(link.cumulative)]
    if not links or not evidence.finite:
        return []
    worst = max(links, key=lambda link: link.cumulative)
    way = [link for link in evidence.chain.way(worst.name) if link.kind != "loss"]
    grown = worst.cumulative - min(0.0, min(link.cumulative for link in way))
    excess = grown - evidence.explained({link.module for link in way})
    if excess < DECADES:
        return []
    first = next(link for link in way if link.cumulative >= worst.cumulative - 0.95 * grown)
    links = way[way.index(first) :]
    a_link = 10 ** (grown / max(1, len(links)))
    culprit = max(way, key=lambda link: _log(link.gain))
    alone = _log(culprit.gain) >= 0.5 * grown
    name = culprit.module if alone else first.module
    where = (
        f"most of it in {culprit.name}, whose factor has gain {culprit.gain:.3g}"
        if alone
        else f"from {first.name} to {worst.name}, {a_link:.3g} a link over {len(links)} links"
    )
    return [
        Finding(
            "explosion",
            name,
            10**grown,
            "growth of the signal, no unit",
            f"the signal explodes by a factor of {10**grown:.3g}: {where}",
            f"signal {first.signal:.3g} at {first.name}, {worst.signal:.3g} at {worst.name}",
            f"scale the weights between them by {1 / a_link:.2g} a link (gs.balance_), add normalisation or residual "
            "connections, or bound the parameters by rows (gs.GradientSplitter)",
            excess,
        )
    ]


def _log(gain: float) -> float:
    return math.log10(gain) if math.isfinite(gain) and gain > 0 else -math.inf
