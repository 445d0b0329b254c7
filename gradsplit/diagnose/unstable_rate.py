"""A learning rate beyond stability: sharpness against what the optimizer can follow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.joints import LossFn
from .evidence import Evidence
from .finding import Finding


def find(evidence: Evidence) -> list[Finding]:
    """At most one finding, for SGD (any momentum) and Adam or AdamW with a history."""
    optimizer = evidence.optimizer
    if optimizer is None or not evidence.finite:
        return []
    rates = [float(entry["lr"]) for entry in optimizer.param_groups]
    if not rates or max(rates) == 0:
        return []
    rate, first = max(rates), optimizer.param_groups[rates.index(max(rates))]
    if "momentum" in first:
        beta, scales = float(first["momentum"]), None
        bound = 2 * (1 + beta)
    elif "betas" in first and "eps" in first and any("exp_avg_sq" in s for s in optimizer.state.values()):
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


def sharpness(
    model: nn.Module, loss_fn: LossFn, batch: Any, *, iterations: int = 20, scales: list[Tensor] | None = None
) -> float:
    """Largest eigenvalue of the loss's Hessian on one batch, by power iteration on Hessian-vector products.

        v <- S H S v / ||S H S v||,   lambda = v . S H S v       (S = 1, or 1 / sqrt of Adam's denominator)

    Gradient descent with rate eta leaves its valley where eta lambda > 2 (Cohen et al. 2021, arXiv 2103.00065), with
    momentum beta (heavy ball) where it is > 2 (1 + beta), Adam where it is > 2 (1 + beta1) / (1 - beta1) on the
    preconditioned Hessian (Cohen et al. 2022, arXiv 2207.14484).

    Args:
        model: any module; fused recurrences and attention without a second derivative raise torch's own error.
        loss_fn: `loss_fn(model, batch) -> scalar`.
        batch: what the loss takes.
        iterations: Hessian-vector products.
        scales: per parameter, the entries of S.

    Returns:
        lambda, units of loss / parameter^2; the largest in size, so it may be negative.

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
        generator = torch.Generator().manual_seed(0)
        v = [torch.randn(p.shape, generator=generator).to(p) for p, _ in pairs]
        value = 0.0
        for _ in range(iterations):
            length = float(torch.sqrt(sum((part.double().square().sum() for part in v), torch.zeros(())).double()))
            if length == 0 or not math.isfinite(length):
                return length
            v = [part / length for part in v]
            shaped = [part * known[id(p)] if known else part for part, (p, _) in zip(v, pairs, strict=True)]
            inner = sum(
                ((g * s).sum() for (_, g), s in zip(pairs, shaped, strict=True)), torch.zeros((), device=v[0].device)
            )
            pushed = torch.autograd.grad(inner, [p for p, _ in pairs], retain_graph=True, allow_unused=True)
            image = [torch.zeros_like(p) if h is None else h for (p, _), h in zip(pairs, pushed, strict=True)]
            image = [part * known[id(p)] if known else part for part, (p, _) in zip(image, pairs, strict=True)]
            value = sum(float((a.double() * b.double()).sum()) for a, b in zip(v, image, strict=True))
            v = [part.detach() for part in image]
    return value


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
        scales.append(((state["exp_avg_sq"] / correction).sqrt() + entry["eps"]).rsqrt().to(p))
    return scales
