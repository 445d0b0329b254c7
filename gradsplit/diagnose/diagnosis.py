"""diagnose: one batch in, findings in plain words out, worst first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..chain.chain import Chain
from ..chain.joints import LossFn, bare
from .evidence import Evidence, ForkShare, gather
from .finding import Finding
from .head_share import loss_weights
from .registry import REGISTRY


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what passes change: buffers (running statistics), gradients, the state of the generator."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    for p, _ in grads:
        p.grad = None
    devices = sorted({p.device.index or 0 for p, _ in grads if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)
        for p, grad in grads:
            p.grad = grad


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with the gradient of a net on one batch.

    Attributes:
        findings: worst first; empty for a sound net.
        chain: the factored gradient that they were read from.
        forks: signals of the task heads at each fork.
        loss: the loss.
        notes: what a finding could not, or did not, ask.
    """

    findings: tuple[Finding, ...]
    chain: Chain
    forks: tuple[ForkShare, ...]
    loss: float
    notes: tuple[str, ...] = ()

    def text(self, limit: int = 10) -> str:
        """The findings as numbered paragraphs; then loss weights for several heads, and the notes."""
        count = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
        lines = [f"loss {self.loss:.4g}, {count}"]
        for number, finding in enumerate(self.findings[:limit], 1):
            lines.append(f"{number}. [{finding.kind}] {finding.text()}")
        if len(self.findings) > limit:
            lines.append(f"... and {len(self.findings) - limit} more")
        for fork in self.forks:
            if min(fork.norms.values(), default=0.0) > 0:
                weights = ", ".join(f"{name} {weight:.3g}" for name, weight in loss_weights(fork.norms).items())
                lines.append(f"loss weights that would equalise the heads' signals at {fork.module}: {weights}")
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "loss": self.loss if abs(self.loss) < float("inf") else str(self.loss),
            "findings": [finding.to_dict() for finding in self.findings],
            "forks": [{"module": fork.module, "norms": fork.norms} for fork in self.forks],
            "notes": list(self.notes),
            "chain": self.chain.to_dict(),
        }


def diagnose(
    model: nn.Module, loss_fn: LossFn, batch: Any, optimizer: Any = None, *, ladder: bool = False
) -> Diagnosis:
    """Say in plain words what is wrong with the gradient of a net, worst first.

    Explosion is a product of gains above one; this measures the gains, so it can name where the growth *begins* instead
    of where the gradient is large. The model's parameters, buffers, gradients and mode are left as they were.

    Args:
        model: any module, in the mode in which it trains.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`; it may not be finite.
        batch: what the loss takes.
        optimizer: with one, its learning rate is held against the sharpness of the loss (20 more backward passes).
        ladder: take its next step with one tensor after the other, and hold what raises the loss so against the radius
            of convergence of `taylor_ladder`, row by row; see docs/diagnose.md for what it costs.

    Returns:
        A `Diagnosis`: `.text()`, `.to_dict()`, `.findings`, `.chain`, `.notes`.

    Raises:
        ValueError: the loss is no scalar, or does not depend on the parameters; the ladder without an optimizer.

    >>> import torch
    >>> model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    >>> _ = model[2].weight.data.mul_(100)
    >>> diagnose(model, lambda m, x: m(x).square().mean(), torch.ones(4, 8)).findings[0].name
    '2'
    """
    if ladder and optimizer is None:
        raise ValueError(
            "diagnose(ladder=True): expected an optimizer with it, got none. Pass optimizer=…, whose next step the "
            "ladder judges, or see gs.taylor_ladder for radii without a step."
        )
    model = bare(model)
    with undisturbed(model):
        evidence = gather(model, loss_fn, batch, optimizer)
        evidence.ladder = ladder
        findings = judge(evidence)
    return Diagnosis(tuple(findings), evidence.chain, tuple(evidence.forks), evidence.chain.loss, tuple(evidence.notes))


def judge(evidence: Evidence) -> list[Finding]:
    """All findings of the registry, worst first; equal ones in the registry's order."""
    findings = []
    for kind in REGISTRY:
        if evidence.finite or kind.reads_broken:
            findings.extend(kind.find(evidence))
    return sorted(findings, key=lambda finding: -finding.severity)
