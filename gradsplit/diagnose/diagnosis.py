"""diagnose: it takes one batch and gives findings in plain words, worst first; and the table of their kinds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.chain import Chain
from ..chain.joints import LossFn, bare
from ..resume.generators import generators_state, generators_within, load_generators_state, load_state_of, state_of
from . import activations, samples, signals, steps, weights
from .evidence import Evidence, ForkShare, gather
from .finding import Finding


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        name: the kind as users read it; every finding of this kind carries the name.
        find: evidence -> findings of this kind.
        explodes: whether it says that something explodes.
        reads_broken: whether it can judge a net whose loss or signals are not finite.
    """

    name: str
    find: Callable[[Evidence], list[Finding]]
    explodes: bool = False
    reads_broken: bool = False


KINDS: tuple[Kind, ...] = (
    Kind("nonfinite", activations.nonfinite, reads_broken=True),
    Kind("hot layer", weights.hot_layer, explodes=True, reads_broken=True),
    Kind("uneven layer", weights.uneven_layer, reads_broken=True),
    Kind("forward explosion", signals.forward_explosion, explodes=True, reads_broken=True),
    Kind("explosion", signals.explosion, explodes=True),
    Kind("explosion through time", signals.explosion_through_time, explodes=True),
    Kind("vanishing through time", signals.vanishing_through_time),
    Kind("head share", signals.head_share),
    Kind("one sample", samples.one_sample, reads_broken=True),
    Kind("loud term", samples.loud_term, reads_broken=True),
    Kind("missing normalisation", weights.missing_norm, reads_broken=True),
    Kind("long step", steps.long_step, reads_broken=True),
    Kind("unstable rate", steps.unstable_rate),
    Kind("dead units", activations.dead_units),
    Kind("saturation", activations.saturation),
    Kind("vanishing", signals.vanishing),
    Kind("no signal", signals.no_signal),
)
"""The table of findings; a new kind is a function and a row."""

EXPLODING = frozenset(kind.name for kind in KINDS if kind.explodes)
"""The kinds that say that something explodes; a healthy net must have none of them."""


@contextmanager
def undisturbed(model: nn.Module, *used: Any) -> Iterator[None]:
    """Restore what passes change: buffers, gradients, and all generators, also those that model and ``used`` hold."""
    buffers = [
        (module._buffers, key, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
    ]
    grads = [(p, p.grad) for p in model.parameters()]
    own = [(one, state_of(one)) for root in (model, *used) for _, one in generators_within(root)]
    drawn = generators_state()
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        load_generators_state(drawn)
        for generator, state in own:
            if state is not None:
                load_state_of(generator, state)
        with torch.no_grad():
            for held, key, buffer, old in buffers:
                held[key] = buffer
                if buffer is not None and old is not None:
                    with suppress(RuntimeError):  # expanded: no pass can have written to it in place either
                        buffer.copy_(old)
        for p, grad in grads:
            p.grad = grad


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with the gradient of a net on one batch.

    Attributes:
        findings: worst first; empty for a sound net.
        chain: the factored gradient from which they were read.
        forks: the signals of the task heads at each fork.
        loss: the loss.
        notes: what was not examined, and why.
    """

    findings: tuple[Finding, ...]
    chain: Chain
    forks: tuple[ForkShare, ...]
    loss: float
    notes: tuple[str, ...] = ()

    def text(self, limit: int = 10) -> str:
        """The findings as numbered paragraphs, then the loss weights for several heads, then the notes."""
        count = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
        lines = [f"loss {self.loss:.4g}, {count}"]
        for number, finding in enumerate(self.findings[:limit], 1):
            lines.append(f"{number}. [{finding.kind}] {finding.text()}")
        if len(self.findings) > limit:
            lines.append(f"... and {len(self.findings) - limit} more")
        for fork in self.forks:
            if min(fork.norms.values(), default=0.0) > 0:
                weights = ", ".join(f"{name} {weight:.3g}" for name, weight in signals.loss_weights(fork.norms).items())
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
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]],
    batch: Any,
    optimizer: Any = None,
    *,
    ladder: bool = False,
) -> Diagnosis:
    """Say in plain words what is wrong with the gradient of a net, worst first.

    Explosion is a product of gains above one. This function measures the gains, so it names the place where the growth
    *begins*, and not the place where the gradient is large. The model's parameters, buffers, gradients and mode are
    left as they were, and so are all random generators.

    Args:
        model: any module, in the mode in which it trains.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`; it may not be finite. A mapping from names to scalar tensors
            stands for their sum, and the terms are then compared.
        batch: what the loss takes.
        optimizer: if given, its learning rate is compared with the sharpness of the loss (20 more backward passes).
        ladder: whether to try the optimizer's next step with one tensor after the other. For the rows for which the
            step is too long, `taylor_ladder` then gives the radius of convergence. What it costs is measured in
            docs/results/diagnose.md.

    Returns:
        A `Diagnosis`: `.text()`, `.to_dict()`, `.findings`, `.chain`, `.notes`.

    Raises:
        ValueError: the loss is not a scalar, or does not depend on the parameters; or `ladder` is set without an
            optimizer.

    >>> import torch
    >>> model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    >>> _ = model[2].weight.data.mul_(100)
    >>> diagnose(model, lambda m, x: m(x).square().mean(), torch.ones(4, 8)).findings[0].name
    '2'
    """
    if ladder and optimizer is None:
        raise ValueError(
            "diagnose(ladder=True): expected an optimizer with it, got none. Pass optimizer=…, whose next step the "
            "ladder judges, or use gs.taylor_ladder for radii without a step."
        )
    model = bare(model, call="diagnose")
    with undisturbed(model, loss_fn, batch, optimizer):
        evidence = gather(model, _summed(loss_fn), batch, optimizer)
        evidence.ladder, evidence.terms_of = ladder, loss_fn
        findings = judge(evidence)
    return Diagnosis(tuple(findings), evidence.chain, tuple(evidence.forks), evidence.chain.loss, tuple(evidence.notes))


def _summed(loss_fn: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]) -> LossFn:
    """The loss as one tensor, where the user's function may give its terms by name."""
    if not callable(loss_fn):
        raise TypeError(
            f"diagnose(loss_fn={type(loss_fn).__name__}): expected a function of the model and a batch. Write for "
            "example lambda model, batch: model(batch).square().mean()."
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = loss_fn(model, batch)
        return reduce(operator.add, found.values()) if isinstance(found, Mapping) and found else found  # type: ignore[return-value]

    return loss


def judge(evidence: Evidence) -> list[Finding]:
    """All findings, worst first; findings of equal severity are in the order of `KINDS`."""
    findings = []
    for kind in KINDS:
        if evidence.finite or kind.reads_broken:
            findings.extend(kind.find(evidence))
    return sorted(findings, key=lambda finding: -finding.severity)
