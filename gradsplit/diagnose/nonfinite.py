"""Non-finite: which parameter, module or operation made the first NaN or inf."""

from __future__ import annotations

import math

import torch

from ..chain.joints import tensors_in
from .evidence import Evidence
from .finding import Finding


def find(evidence: Evidence) -> list[Finding]:
    """The first producer: parameters and data before the forward pass, the forward pass before the backward pass."""
    for name, p in evidence.model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            what, count = "its parameter is not finite before the step", int((~torch.isfinite(p)).sum())
            change = "restore a checkpoint from before this parameter broke"
            owner = name.rpartition(".")[0] or "(root)"
            return [_finding(owner, what, f"{name} holds {count} entries that are inf or NaN", change)]
    if evidence.broken is not None:
        return [_backward(evidence)]
    if math.isfinite(evidence.chain.loss):
        return []
    for place, tensor in tensors_in(evidence.batch):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return [_finding("(input)", "the batch is not finite", f"batch{place} holds inf or NaN", "clean the data")]
    # the list is in the order in which calls return, so the first such call is the innermost and the earliest
    for call in evidence.calls:
        if call.clean_in and not call.clean_out:
            name = call.module or "(root)"
            what = "it makes the first inf or NaN of the forward pass"
            change = "look for log or division of zero, an exponential, or an overflow of its number format"
            return [_finding(name, what, "its inputs were finite and its output was not", change)]
    what = "the loss is not finite although the model's outputs are"
    change = "look for log(0), 0/0 or an exponential in the loss"
    return [_finding("(loss)", what, f"loss = {evidence.chain.loss}", change)]


def _backward(evidence: Evidence) -> Finding:
    broken = evidence.broken
    assert broken is not None
    overflow = broken.largest > 1e30
    why = "the signal overflows its number format" if overflow else "its derivative does not exist at this value"
    change = (
        "bound the signal above it (gs.ChainSplitter), or mend the gains named below"
        if overflow
        else "keep its argument away from the singular point, for example sqrt(x + eps) or log(x.clamp(min=eps))"
    )
    evidence_text = (
        f"the signal enters {broken.operation} finite (largest entry {broken.largest:.3g}) and leaves it inf or NaN; "
        "this is the first such operation from the loss down"
    )
    return _finding(broken.module, f"the backward pass breaks there: {why}", evidence_text, change)


def _finding(name: str, what: str, evidence: str, change: str) -> Finding:
    return Finding("nonfinite", name, math.nan, "", f"{name}: {what}", evidence, change, 100.0)
