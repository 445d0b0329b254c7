"""Findings that are read off the signal: where it grows, fades, is drowned by one head, or does not arrive."""

from __future__ import annotations

import math

from ..chain.chain import Link
from .evidence import Evidence, ForkShare
from .finding import Finding

GROWN, LOST = 2.0, 3.0
"""Decades of growth, and of loss, between the loss and the lowest layer that count as a finding."""
GROWN_IN_TIME, LOST_IN_TIME = 2.0, 6.0
"""The same over the time steps of a recurrence."""
DROWNS = 10.0
"""How many times larger than the others' a head's signal must be."""


def explosion(evidence: Evidence) -> list[Finding]:
    """The signal grows on its way from the loss to the first layer.

    There is at most one finding: the largest growth of the chain, without what hot weights on the way explain.
    """
    links = [link for link in evidence.chain.links[1:] if math.isfinite(link.cumulative)]
    if not links or not evidence.finite:
        return []
    worst = max(links, key=lambda link: link.cumulative)
    way = [link for link in evidence.chain.way(worst.name) if link.kind != "loss"]
    grown = worst.cumulative - min(0.0, min(link.cumulative for link in way))
    excess = grown - evidence.explained({link.module for link in way})
    if excess < GROWN:
        return []
    first = next(link for link in way if link.cumulative >= worst.cumulative - 0.95 * grown)
    links = way[way.index(first) :]
    per_link = 10 ** (grown / max(1, len(links)))
    culprit = max(way, key=lambda link: _log(link.gain))
    alone = _log(culprit.gain) >= 0.5 * grown
    name = culprit.module if alone else first.module
    where = (
        f"most of it in {culprit.name}, whose factor has gain {culprit.gain:.3g}"
        if alone
        else f"from {first.name} to {worst.name}, {per_link:.3g} per link over {len(links)} links"
    )
    return [
        Finding(
            "explosion",
            name,
            10**grown,
            "growth of the signal, no unit",
            f"the signal explodes by a factor of {10**grown:.3g}: {where}",
            f"signal {first.signal:.3g} at {first.name}, {worst.signal:.3g} at {worst.name}",
            f"scale the weights between them by {1 / per_link:.2g} per link (gs.balance_), add normalisation or "
            "residual connections, or bound the parameters by rows (gs.GradientSplitter)",
            excess,
        )
    ]


def forward_explosion(evidence: Evidence) -> list[Finding]:
    """The activations themselves grow from layer to layer, which no bound on gradients can cure.

    There is at most one finding: the growth from the first activation (or 1, if that is smaller) to the largest.
    """
    links = [link for link in reversed(evidence.chain.links) if math.isfinite(link.activation) and link.kind != "loss"]
    if len(links) < 2:
        return []
    start = max(links[0].activation, 1.0)
    worst = max(links, key=lambda link: link.activation)
    way = links[: links.index(worst) + 1]
    grown = math.log10(worst.activation / start) if worst.activation > 0 else 0.0
    hot_start = evidence.explained({links[0].module})
    excess = grown - evidence.explained({link.module for link in way}) + (hot_start if way else 0.0)
    if excess < GROWN:
        return []
    first = next(link for link in way if link.activation >= start * 10 ** (0.05 * grown))
    stages = max(1, len(way) - way.index(first))
    per_link = 10 ** (grown / stages)
    culprit = max(way, key=lambda link: link.forward_gain if math.isfinite(link.forward_gain) else 0.0)
    alone = culprit.forward_gain > 0 and math.log10(culprit.forward_gain) >= 0.5 * grown
    name = culprit.module if alone else first.module
    where = (
        f"most of it in {culprit.name}, forward gain {culprit.forward_gain:.3g}"
        if alone
        else f"from {first.name} on, {per_link:.3g} per link over {stages} links"
    )
    return [
        Finding(
            "forward explosion",
            name,
            10**grown,
            "growth of the activation's root mean square, no unit",
            f"the forward pass explodes by a factor of {10**grown:.3g}: {where}",
            f"activation {links[0].activation:.3g} at {links[0].name}, {worst.activation:.3g} at {worst.name}",
            "no bound on gradients cures this: use gs.balance_(model, loss_fn, batch), "
            f"scale the weights by {1 / per_link:.2g} per link, or add normalisation",
            # A forward explosion brings a backward one with it, and it is the cause.
            max([excess, *(finding.severity for finding in explosion(evidence))]) + 0.25,
        )
    ]


def vanishing(evidence: Evidence) -> list[Finding]:
    """The signal is lost on its way to the first layer.

    There is at most one finding: the signal at the lowest layer with parameters, compared with the loss's.
    """
    links = [
        link
        for link in evidence.chain.links[1:]
        if math.isfinite(link.parameter_norm) and math.isfinite(link.cumulative)
    ]
    if len(links) < 2 or not evidence.finite:
        return []
    bottom = links[-1]
    lost = -bottom.cumulative
    if lost < LOST:
        return []
    way = evidence.chain.way(bottom.name)
    top = max(way, key=lambda link: link.cumulative)
    stages = max(1, len(way) - 1 - way.index(top))
    per_link = 10 ** (-(top.cumulative - bottom.cumulative) / stages)
    return [
        Finding(
            "vanishing",
            bottom.module,
            10**-lost,
            "share of the loss's signal, no unit",
            f"the signal vanishes: {bottom.name} receives {10**-lost:.2g} of what leaves the loss",
            f"signal {top.signal:.3g} at {top.name}, {bottom.signal:.3g} at {bottom.name}, {per_link:.3g} per link",
            f"scale the weights between them by {1 / per_link:.2g} per link (gs.balance_), or add residual connections",
            (lost - LOST) / 3 + 0.5,
        )
    ]


def no_signal(evidence: Evidence) -> list[Finding]:
    """A module owns trainable parameters, but it gets no signal or is never called; one finding per module."""
    if not evidence.finite:
        return []
    called = {call.module for call in evidence.calls}
    reached = {link.module for link in evidence.chain.links if link.signal > 0}
    linked = {link.module for link in evidence.chain.links}
    findings = []
    for name, module in evidence.model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not name or not own or name in reached:
            continue
        if name in called and name not in linked:
            continue  # it runs under no_grad, or it returns a tensor that another module made
        never = name not in called
        if never and any(p.grad is not None for p in own):
            continue  # its parent reads the weights directly, as nn.MultiheadAttention does with its projection
        findings.append(
            Finding(
                "no signal",
                name,
                0.0,
                "L2 norm of the signal",
                f"{name}: it is never called" if never else f"{name}: no signal reaches it",
                "no call in the forward pass" if never else "the gradient of the loss by its output is zero or missing",
                "remove it, freeze it, or look for a detach(), an argmax or an unused output between it and the loss",
                0.3 if never else 1.0,
            )
        )
    return findings if all(math.isfinite(f.value) for f in findings) else []


def explosion_through_time(evidence: Evidence) -> list[Finding]:
    """The signal of a recurrence grows too much over the sequence; one finding per layer of a recurrent module."""
    return [
        Finding(
            "explosion through time", module, 10 ** min(total, 300.0), "growth over the sequence, no unit",
            f"{name}: the signal grows by 10^{total:.1f} through time", told,
            "draw the gain to one (gs.gain_penalty), shorten the sequence, or scale the recurrent weight by "
            f"{1 / per_step:.2g}; bounding the time steps did not help in trials", total,
        )
        for name, module, total, per_step, told in _growth_in_time(evidence)
        if total >= GROWN_IN_TIME
    ]  # fmt: skip


def vanishing_through_time(evidence: Evidence) -> list[Finding]:
    """The signal of a recurrence fades too much over the sequence; one finding per layer of a recurrent module."""
    return [
        Finding(
            "vanishing through time", module, 10 ** max(total, -300.0), "share left after the sequence",
            f"{name}: only 10^{total:.1f} of the signal is left at the first step", told,
            "draw the gain to one (gs.gain_penalty), raise a forget gate's bias, or initialise the recurrent weight "
            "orthogonal", 0.4,
        )
        for name, module, total, _, told in _growth_in_time(evidence)
        if total <= -LOST_IN_TIME
    ]  # fmt: skip


def _growth_in_time(evidence: Evidence) -> list[tuple[str, str, float, float, str]]:
    """Layer, module, log10 of the growth over the sequence, growth per step, and both in words."""
    found = []
    for steps in evidence.chain.recurrences:
        known = [math.log10(gain) for gain in steps.gain_T if gain > 0 and math.isfinite(gain)]
        if not known:
            continue
        total, per_step = sum(known), 10 ** (sum(known) / len(known))
        exponent = steps.exponents[0] if steps.exponents else math.nan
        told = f"{len(known)} steps of mean gain {per_step:.3g}, leading Lyapunov exponent {exponent:+.3f} per step"
        found.append((steps.name, steps.name.split(" layer ")[0], total, per_step, told))
    return found


def head_share(evidence: Evidence) -> list[Finding]:
    """One head drowns the trunk: one finding per task fork whose strongest branch outweighs another by ten."""
    findings = []
    for fork in evidence.forks:
        carrying = {name: norm for name, norm in fork.norms.items() if norm > 0 and math.isfinite(norm)}
        if len(carrying) < 2:
            continue
        strong = max(carrying, key=lambda name: carrying[name])
        # The median of the others, since a head that has merely finished must not make another one guilty.
        others = sorted(norm for name, norm in carrying.items() if name != strong)
        other = others[len(others) // 2]
        ratio = carrying[strong] / other
        if ratio < DROWNS:
            continue
        share = carrying[strong] / sum(carrying.values())
        weight = loss_weights(carrying)[strong]
        weak = min((name for name in carrying if name != strong), key=lambda name: abs(carrying[name] - other))
        name, where = _origin(evidence, fork, strong, weak)
        # What a hot weight inside the head explains belongs to the finding of that weight.
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


def _log(gain: float) -> float:
    return math.log10(gain) if math.isfinite(gain) and gain > 0 else -math.inf
