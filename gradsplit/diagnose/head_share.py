"""A head that drowns a trunk: shares of the trunk's signal by consumer, and the loss weight that equalises them."""

from __future__ import annotations

import math

from ..chain.chain import Link
from .evidence import Evidence, ForkShare
from .finding import Finding

RATIO = 10.0


def find(evidence: Evidence) -> list[Finding]:
    """One finding for each task fork whose strongest branch outweighs another by ten."""
    findings = []
    for fork in evidence.forks:
        carrying = {name: norm for name, norm in fork.norms.items() if norm > 0 and math.isfinite(norm)}
        if len(carrying) < 2:
            continue
        strong = max(carrying, key=lambda name: carrying[name])
        # against the next strongest, a head that is merely finished accuses nobody: take the median of the others
        others = sorted(norm for name, norm in carrying.items() if name != strong)
        other = others[len(others) // 2]
        ratio = carrying[strong] / other
        if ratio < RATIO:
            continue
        share = carrying[strong] / sum(carrying.values())
        weight = loss_weights(carrying)[strong]
        weak = min((name for name in carrying if name != strong), key=lambda name: abs(carrying[name] - other))
        name, where = _origin(evidence, fork, strong, weak)
        # what a hot weight inside the head explains is that weight's finding
        excess = math.log10(ratio) - evidence.explained(set(fork.modules[strong]))
        shares = ", ".join(f"{name} {norm:.3g}" for name, norm in sorted(carrying.items(), key=lambda item: -item[1]))
        findings.append(
            Finding(
                "head share",
                name,
                share,
                "share of the trunk's signal",
                f"{strong} drowns the trunk: {share:.1%} of the signal at {fork.module} comes from it",
                f"signals at {fork.module}: {shares}; {where}",
                f"a loss weight of {weight:.2g} (1/{1 / weight:.0f}) on its loss would equalise the heads; "
                'gs.ChainSplitter(model, at="forks") does it without a weight, with limits on the modules',
                max(0.0, 0.8 * excess),
            )
        )
    return findings


def _origin(evidence: Evidence, fork: ForkShare, strong: str, weak: str) -> tuple[str, str]:
    """Where in the strong branch the excess over the weak one begins: the loss, or the layer with the larger gain."""
    ours, theirs = _layers(evidence, fork, strong), _layers(evidence, fork, weak)
    if not ours or not theirs:
        return strong, "the branches have no layers to compare"
    at_top = math.log10(ours[0].signal / theirs[0].signal) if ours[0].signal > 0 and theirs[0].signal > 0 else 0.0
    worst, excess = None, at_top
    if len(ours) == len(theirs):
        for mine, other in zip(ours, theirs, strict=True):
            if mine.gain > 0 and other.gain > 0 and math.log10(mine.gain / other.gain) > excess:
                worst, excess = mine, math.log10(mine.gain / other.gain)
    if worst is None:
        return strong, f"its loss alone sends {10**at_top:.3g} times the signal of {weak}'s"
    return worst.module, f"{worst.name} has {10**excess:.3g} times the gain of its counterpart in {weak}"


def _layers(evidence: Evidence, fork: ForkShare, branch: str) -> list[Link]:
    inside = set(fork.modules[branch])
    return [link for link in evidence.chain.links if link.module in inside and math.isfinite(link.parameter_norm)]


def loss_weights(norms: dict[str, float]) -> dict[str, float]:
    """The weight of each head's loss that would make all signals as large as the smallest.

    >>> loss_weights({"box": 46.0, "class": 1.0})["class"]
    1.0
    """
    smallest = min(norm for norm in norms.values() if norm > 0)
    return {name: smallest / norm for name, norm in norms.items() if norm > 0}
