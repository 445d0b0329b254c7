"""A step too long for some rows: they alone, moved as the optimizer would, leave the reach of their Taylor series."""

from __future__ import annotations

import math

from ..ladder.ladder import Ladder
from .evidence import Evidence
from .finding import Finding
from .step_trial import Part, StepTrial

ORDER = 30
MAX_TENSORS, MAX_LADDERS = 32, 3
SEVEREST = 1.0
"""A hot layer, an explosion or a missing norm shortens radii: such a cause is named before its consequence."""


def find(evidence: Evidence) -> list[Finding]:
    """One finding for each tensor with guilty rows; asked only with `ladder=True`, and what hinders it is a note."""
    if not evidence.ladder:
        return []
    if not evidence.finite:
        hindrance = "the loss or its gradient is not finite"
    elif any(p.device.type != "cpu" for p in evidence.model.parameters()):
        hindrance = "it runs on the CPU alone"
    elif any(p.is_complex() for p in evidence.model.parameters()):
        hindrance = "it has no rules for complex parameters"
    else:
        try:
            return _ask(evidence)
        except Exception as error:  # tracing runs foreign code in an unusual way: no diagnosis may fail by it
            hindrance = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].partition('. ')[0]}"
    evidence.notes.append(f"the ladder was not asked: {hindrance}")
    return []


def _ask(evidence: Evidence) -> list[Finding]:
    trial = StepTrial.of(evidence.model, evidence.loss_fn, evidence.batch, evidence.optimizer)
    wholes = [trial.whole(name) for name, moves in trial.update.direction.items() if moves.numel()]
    if not wholes:
        evidence.notes.append("the ladder was not asked: the optimizer moves no tensor of the model")
        return []
    bound = [part for part in wholes if not trial.heals(part)]
    # A tensor that promises little cannot be guilty, so the most promising ones are enough.
    asked = sorted(bound, key=lambda part: -trial.promise(part))[:MAX_TENSORS]
    guilty = [part for part in asked if trial.guilty(part)]
    if not guilty:
        left = [f"{len(wholes) - len(bound)} before a normalisation"] if len(bound) < len(wholes) else []
        left += [f"{len(bound) - len(asked)} that promise little"] if len(asked) < len(bound) else []
        others = f"; not tried: {', '.join(left)}" if left else ""
        evidence.notes.append(f"the ladder: your step suits each of {len(asked)} tensors, taken alone{others}")
        return []
    if len(guilty) > MAX_LADDERS:
        evidence.notes.append(f"the ladder: your step is too long for {len(guilty)} tensors; {MAX_LADDERS} are shown")
    shown = [trial.narrowed(part) for part in guilty[:MAX_LADDERS]]
    ladder = trial.ladder(shown, ORDER)
    findings = []
    for b, part in enumerate(shown):
        if min(ladder.radius_B[b], ladder.safe_step_B[b]) < trial.update.rate[part.tensor]:
            findings.append(_finding(trial, ladder, b, part))
        else:
            evidence.notes.append(f"the ladder: {part} keeps little of its promise, but within its series")
    return findings


def _finding(trial: StepTrial, ladder: Ladder, b: int, part: Part) -> Finding:
    rate, radius, safe = trial.update.rate[part.tensor], ladder.radius_B[b], ladder.safe_step_B[b]
    good = rate * trial.good_share(part)
    # At the kink the series ends, not the fall of the loss: there the rate that was tried counts.
    advised = safe if good == 0 else good if ladder.limited_by[b] == "kink" else min(safe, good)
    half = rate / 2
    kept = (
        f"half of the promise is kept from {good:.2g} down"
        if good > 0
        else f"no rate from {rate / 2**24:.2g} up keeps half"
    )
    evidence = (
        f"moved alone along {trial.update.source}, loss {trial.before:.3g}: at your step the gradient promises "
        f"{trial.before - trial.promise(part):.3g} and the loss is {trial.after(part):.3g}; at {half:.2g} "
        f"{trial.before - trial.promise(part) / 2:.3g} and {trial.after(part, 0.5):.3g}; {kept}; "
        f"{_reach(ladder, b)}"
    )
    return Finding(
        "long step",
        part.tensor.rpartition(".")[0] or "(root)",
        float(radius),
        "radius of convergence, in units of the learning rate",
        f"{part}: radius {radius:.2g}, safe step {safe:.2g}, your step is {rate:.2g}",
        evidence,
        f"a rate of {advised:.2g} is within their reach; or cap the step of each row (gs.RelativeStep)",
        min(SEVEREST, math.log10(rate / advised)) if advised > 0 else SEVEREST,
    )


def _reach(ladder: Ladder, b: int) -> str:
    """What the ladder says of one direction, and what ends it."""
    ends = {
        "increase": "the loss is back at its start at the safe step",
        "radius": "no increase is foretold before the series breaks",
        "kink": "from the safe step on branches (ReLU, max) change sides, which no series sees",
        "no descent": "no descent is foretold",
    }
    apart = f"{ladder.radii[b].spread:.0%}"
    return f"by its series of order {ladder.order} (readings of the radius {apart} apart) {ends[ladder.limited_by[b]]}"
