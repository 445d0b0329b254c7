"""No signal: modules with parameters that the loss does not reach."""

from __future__ import annotations

import math

from .evidence import Evidence
from .finding import Finding


def find(evidence: Evidence) -> list[Finding]:
    """One finding for each module that owns trainable parameters and gets no signal, or is never called."""
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
            continue  # it runs under no_grad, or hands on a tensor that is cut elsewhere
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
