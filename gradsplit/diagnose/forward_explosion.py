"""Forward explosion: the activations themselves grow from layer to layer, which no bound on gradients can cure."""

from __future__ import annotations

import math

from . import explosion
from .evidence import Evidence
from .finding import Finding

DECADES = 2.0


def find(evidence: Evidence) -> list[Finding]:
    """At most one finding: the growth from the first activation (or 1, if that is smaller) to the largest."""
    links = [link for link in reversed(evidence.chain.links) if math.isfinite(link.activation) and link.kind != "loss"]
    if len(links) < 2:
        return []
    start = max(links[0].activation, 1.0)
    worst = max(links, key=lambda link: link.activation)
    way = links[: links.index(worst) + 1]
    grown = math.log10(worst.activation / start) if worst.activation > 0 else 0.0
    hot_start = evidence.explained({links[0].module})
    excess = grown - evidence.explained({link.module for link in way}) + (hot_start if way else 0.0)
    if excess < DECADES:
        return []
    first = next(link for link in way if link.activation >= start * 10 ** (0.05 * grown))
    stages = max(1, len(way) - way.index(first))
    a_layer = 10 ** (grown / stages)
    culprit = max(way, key=lambda link: link.forward_gain if math.isfinite(link.forward_gain) else 0.0)
    alone = culprit.forward_gain > 0 and math.log10(culprit.forward_gain) >= 0.5 * grown
    name = culprit.module if alone else first.module
    where = (
        f"most of it in {culprit.name}, forward gain {culprit.forward_gain:.3g}"
        if alone
        else f"from {first.name} on, {a_layer:.3g} a link over {stages} links"
    )
    return [
        Finding(
            "forward explosion",
            name,
            10**grown,
            "growth of the activation's root mean square, no unit",
            f"the forward pass explodes by a factor of {10**grown:.3g}: {where}",
            f"activation {links[0].activation:.3g} at {links[0].name}, {worst.activation:.3g} at {worst.name}",
            f"no bound on gradients cures this: gs.balance_(model, loss_fn, batch), scaling by {1 / a_layer:.2g} a "
            f"link, "
            "or normalisation",
            # a forward explosion brings a backward one with it, and is the cause
            max([excess, *(finding.severity for finding in explosion.find(evidence))]) + 0.25,
        )
    ]
