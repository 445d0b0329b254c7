"""Findings that are read off the values in the passes: the first inf or NaN, dead units, saturated units."""

from __future__ import annotations

import math

import torch

from ..chain.joints import tensors_in
from .evidence import Evidence
from .finding import Finding

SHARE = 0.5
"""The share of units, or of outputs, from which an activation function is a finding."""


def nonfinite(evidence: Evidence) -> list[Finding]:
    """The first parameter, input, module or operation that made an inf or a NaN.

    Parameters and data come before the forward pass, and the forward pass comes before the backward pass. That holds
    too where the loss is finite because it leaves the values out that are not: on the way back 0 times NaN is NaN.
    """
    for name, p in evidence.model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            what, count = "its parameter is not finite before the step", int((~torch.isfinite(p)).sum())
            change = "restore a checkpoint from before this parameter broke"
            owner = name.rpartition(".")[0] or "(root)"
            return [_nonfinite(owner, what, f"{name} holds {count} entries that are inf or NaN", change)]
    if evidence.broken is not None:
        return [_masked_forward(evidence) or _broken_backward(evidence)]
    if math.isfinite(evidence.chain.loss):
        return []
    for place, tensor in tensors_in(evidence.batch):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return [
                _nonfinite("(input)", "the batch is not finite", f"batch{place} holds inf or NaN", "clean the data")
            ]
    # The list is in the order in which calls return, so the first such call is the innermost and the earliest.
    for call in evidence.calls:
        if call.clean_in and not call.clean_out:
            name = call.module or "(root)"
            what = "it makes the first inf or NaN of the forward pass"
            change = "look for log or division of zero, an exponential, or an overflow of its number format"
            return [_nonfinite(name, what, "its inputs were finite and its output was not", change)]
    what = "the loss is not finite although the model's outputs are"
    change = "look for log(0), 0/0 or an exponential in the loss"
    return [_nonfinite("(loss)", what, f"loss = {evidence.chain.loss}", change)]


def _masked_forward(evidence: Evidence) -> Finding | None:
    """Where the forward pass made what the backward pass meets at its break; None if it met finite values only.

    A mask of -inf is no fault if finite values come out of the next call. So the search starts at the first NaN, and
    goes back to the last finite call before it.
    """
    assert evidence.broken is not None
    calls, broken = evidence.calls, evidence.broken.module
    met = "" if broken in ("(root)", "(loss)") else broken
    if all(call.clean_in and call.clean_out for call in calls if call.module == met):
        return None
    bad = [i for i, call in enumerate(calls) if not call.clean_out] or [0]
    place = next((i for i in bad if calls[i].nan_out), bad[0])
    while place and not calls[place - 1].clean_out:
        place -= 1
    call = calls[place]
    value = "NaN" if call.nan_in or call.nan_out else "inf"
    seen = (
        f"the loss is finite, since it leaves the {value} out; on the way back 0 times inf or NaN is NaN, which "
        f"{broken} is the first to meet"
    )
    change = "keep the forward pass finite, for example x / (s + eps): a mask behind it does not mend the gradient"
    if call.clean_in and not call.clean_out:
        what = f"it makes the first {value} of the forward pass, which does not reach the loss"
        return _nonfinite(call.module or "(root)", what, f"its inputs were finite; {seen}", change)
    if any(not bool(torch.isfinite(t).all()) for _, t in tensors_in(evidence.batch) if t.is_floating_point()):
        return _nonfinite("(input)", "the batch is not finite, and the loss leaves that out", seen, "clean the data")
    return _nonfinite("(root)", f"code between its modules makes the first {value} of the forward pass", seen, change)


def _broken_backward(evidence: Evidence) -> Finding:
    broken = evidence.broken
    assert broken is not None
    overflow = broken.largest > 1e30
    why = "the signal overflows its number format" if overflow else "its derivative does not exist at this value"
    change = (
        "bound the signal above it (gs.ChainSplitter), or mend the gains named below"
        if overflow
        else "keep its argument away from the singular point, for example sqrt(x + eps) or log(x.clamp(min=eps))"
    )
    seen = (
        f"the signal enters {broken.operation} finite (largest entry {broken.largest:.3g}) and leaves it inf or NaN; "
        "this is the first such operation from the loss down"
    )
    return _nonfinite(broken.module, f"the backward pass breaks there: {why}", seen, change)


def _nonfinite(name: str, what: str, seen: str, change: str) -> Finding:
    return Finding("nonfinite", name, math.nan, "", f"{name}: {what}", seen, change, 100.0)


def dead_units(evidence: Evidence) -> list[Finding]:
    """Units of a rectifier are zero for the whole batch and pass no signal.

    There is one finding per activation function of which at least half the units are dead.
    """
    return [
        Finding(
            "dead units",
            entry.module,
            entry.dead,
            "share of units",
            f"{entry.module}: {entry.dead:.0%} of its units are zero for every sample",
            f"{entry.kind} gave exactly 0 for the whole batch in these units, so no signal passes them",
            "lower the learning rate, raise the bias before it, or use a rectifier with a slope on both sides",
            3.0 if entry.dead == 1.0 else entry.dead,
        )
        for entry in evidence.activity
        if entry.dead >= SHARE
    ]


def saturation(evidence: Evidence) -> list[Finding]:
    """A squashing function works at its ends, where its derivative is nearly zero.

    There is one finding per activation function of which at least half the outputs are within 0.5 % of an end.
    """
    return [
        Finding(
            "saturation",
            entry.module,
            entry.saturated,
            "share of outputs",
            f"{entry.module}: {entry.saturated:.0%} of its outputs are saturated",
            f"outputs of {entry.kind} within 0.5 % of its range's ends, where its derivative is nearly 0",
            "scale down the weights before it, or normalise its input",
            entry.saturated,
        )
        for entry in evidence.activity
        if entry.saturated >= SHARE
    ]
