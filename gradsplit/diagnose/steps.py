"""Findings about the optimizer's next step: too long for some rows, or beyond what the sharpness of the loss allows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.joints import LossFn
from ..ladder.ladder import Ladder
from .evidence import Evidence
from .finding import Finding
from .step_trial import Part, StepTrial

ORDER = 30
MAX_TENSORS, MAX_LADDERS = 32, 3
SEVEREST = 1.0
"""A hot layer, an explosion or a missing norm shortens radii, so such a cause ranks above its consequence."""


def long_step(evidence: Evidence) -> list[Finding]:
    """The step is too long for some rows: moved alone, they leave the reach of their Taylor series.

    There is one finding per tensor with guilty rows. The ladder is asked only with `ladder=True`; what prevents it
    becomes a note.
    """
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
        except Exception as error:  # tracing runs foreign code in an unusual way, and no diagnosis may fail by it
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
            findings.append(_too_long(trial, ladder, b, part))
        else:
            evidence.notes.append(f"the ladder: {part} keeps little of its promise, but within its series")
    return findings


def _too_long(trial: StepTrial, ladder: Ladder, b: int, part: Part) -> Finding:
    rate, radius, safe = trial.update.rate[part.tensor], ladder.radius_B[b], ladder.safe_step_B[b]
    good = rate * trial.good_share(part)
    # At the kink the series ends, but the loss may go on falling, so there the rate that was tried counts.
    advised = safe if good == 0 else good if ladder.limited_by[b] == "kink" else min(safe, good)
    half = rate / 2
    kept = (
        f"half of the promise is kept from {good:.2g} down"
        if good > 0
        else f"no rate from {rate / 2**24:.2g} up keeps half"
    )
    seen = (
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
        seen,
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


def unstable_rate(evidence: Evidence) -> list[Finding]:
    """The learning rate is beyond stability: the loss is too sharp for the optimizer to follow it.

    There is at most one finding, for SGD with any momentum, and for Adam or AdamW with a history. Other optimizers that
    hold a momentum, such as RMSprop and Muon, divide or turn the gradient, so these bounds say nothing of them.
    """
    optimizer = evidence.optimizer
    if optimizer is None or not evidence.finite:
        return []
    rates = [float(entry["lr"]) for entry in optimizer.param_groups]
    if not rates or max(rates) == 0:
        return []
    rate, first = max(rates), optimizer.param_groups[rates.index(max(rates))]
    if first.get("maximize"):
        return []
    if "momentum" in first and "dampening" in first:
        scales, bound = None, _bound_of_momentum(first)
    elif (
        "betas" in first
        and "eps" in first
        and type(optimizer).__name__ not in ("NAdam", "RAdam")
        and any("exp_avg_sq" in s for s in optimizer.state.values())
    ):
        beta, scales = float(first["betas"][0]), _inverse_roots(evidence.model, optimizer, first)
        bound = 2 * (1 + beta) / (1 - beta)
    else:
        return []
    try:
        value = sharpness(evidence.model, evidence.loss_fn, evidence.batch, scales=scales)
    except RuntimeError as error:  # torch has no second derivative of some operations
        evidence.notes.append(f"the sharpness was not measured: {str(error).strip().partition(chr(10))[0]}")
        return []
    if not value > 0 or not math.isfinite(value) or rate * value <= bound:
        return []
    what = "sharpness" if scales is None else "preconditioned sharpness"
    return [
        Finding(
            "unstable rate",
            "(optimizer)",
            rate,
            "learning rate",
            f"the learning rate {rate:.3g} is {rate * value / bound:.3g} times beyond stability",
            f"{what} (largest eigenvalue of the Hessian on this batch) {value:.3g}; "
            f"{type(optimizer).__name__} is stable up to {bound / value:.2g}",
            f"lower the rate below {bound / value:.2g}, warm it up, or cap the step (gs.RelativeStep)",
            math.log10(rate * value / bound) + 0.2,
        )
    ]


def _bound_of_momentum(entry: Any) -> float:
    """Rate times sharpness up to which SGD settles on a parabola; torch leaves dampening out without momentum.

    >>> _bound_of_momentum({"momentum": 0.5, "dampening": 0.5}), _bound_of_momentum({"momentum": 0.5, "nesterov": True})
    (6.0, 1.5)
    """
    beta = float(entry["momentum"])
    if entry.get("nesterov"):
        return 2 * (1 + beta) / (1 + 2 * beta)
    passed = 1 - float(entry.get("dampening", 0.0)) * (beta != 0)
    return 2 * (1 + beta) / passed if passed > 0 else math.inf


def sharpness(
    model: nn.Module, loss_fn: LossFn, batch: Any, *, iterations: int = 20, scales: list[Tensor] | None = None
) -> float:
    """Largest eigenvalue of the loss's Hessian on one batch, by power iteration on Hessian-vector products.

        v <- S H S v / ||S H S v||,   lambda = v . S H S v       (S = 1, or 1 / sqrt of Adam's denominator)

    Gradient descent with rate eta leaves its valley where eta lambda > 2 (Cohen et al. 2021, arXiv 2103.00065). With
    momentum beta the bound is 2 (1 + beta) / (1 - dampening), and 2 (1 + beta) / (1 + 2 beta) with Nesterov's. For Adam
    it is 2 (1 + beta1) / (1 - beta1), on the preconditioned Hessian (Cohen et al. 2022, arXiv 2207.14484).

    Args:
        model: any module; fused recurrences and attention without a second derivative raise torch's own error.
        loss_fn: `loss_fn(model, batch) -> scalar`.
        batch: what the loss takes.
        iterations: Hessian-vector products; twice as many where the curvature of largest size is negative.
        scales: per parameter, the entries of S.

    Returns:
        lambda, in units of loss / parameter^2, of largest value. Where the eigenvalue of largest size is negative, the
        iteration runs again on S H S minus it, which has none below zero.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> round(sharpness(model, lambda m, x: 3.0 * m(x).square().sum(), torch.ones(1, 1)), 4)
    6.0
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = loss_fn(model, batch)
        grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        pairs = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return 0.0
        known = {id(p): s for p, s in zip(parameters, scales, strict=True)} if scales is not None else {}

        def largest(shift: float) -> float:
            generator = torch.Generator().manual_seed(0)
            v = [torch.randn(p.shape, generator=generator).to(p) for p, _ in pairs]
            value = 0.0
            for _ in range(iterations):
                length = float(torch.sqrt(sum((part.double().square().sum() for part in v), torch.zeros(())).double()))
                if length == 0:
                    return value
                if not math.isfinite(length):
                    return length
                v = [part / length for part in v]
                shaped = [part * known[id(p)] if known else part for part, (p, _) in zip(v, pairs, strict=True)]
                inner = sum(((g * s).sum() for (_, g), s in zip(pairs, shaped, strict=True)), v[0].new_zeros(()))
                pushed = torch.autograd.grad(inner, [p for p, _ in pairs], retain_graph=True, allow_unused=True)
                image = [torch.zeros_like(p) if h is None else h for (p, _), h in zip(pairs, pushed, strict=True)]
                image = [part * known[id(p)] if known else part for part, (p, _) in zip(image, pairs, strict=True)]
                value = sum(float((a.double() * b.double()).sum()) for a, b in zip(v, image, strict=True))
                v = [(part - shift * old).detach() for part, old in zip(image, v, strict=True)]
            return value

        top = largest(0.0)
        return largest(top) if top < 0 else top


def _inverse_roots(model: nn.Module, optimizer: Any, entry: Any) -> list[Tensor]:
    """1 / sqrt(sqrt(v_hat) + eps) of every trainable parameter, ones where Adam has no history."""
    scales = []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            scales.append(torch.ones_like(p))
            continue
        correction = 1 - float(entry["betas"][1]) ** float(state["step"])
        square = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # of AMSGrad
        scales.append(((square / correction).sqrt() + entry["eps"]).rsqrt().to(p))
    return scales
