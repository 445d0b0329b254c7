"""Four events of a training run, each with torch's global clip and with row bins side by side.

Ten layers of norm 1; then one of them gets a NaN, an inf, a finite 3e30, or a norm of 1000.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradsplit as gs

LAYERS, BAD = 10, 3


def model_with_gradients():
    """Ten 4 x 4 layers whose gradients have norm 1."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(LAYERS)))
    for layer in model:
        gradient = torch.randn(4, 4, generator=generator)
        layer.weight.grad = gradient / gradient.norm()
    return model


def happens(model, event):
    gradient = model[BAD].weight.grad
    if event == "a thousand-fold layer":
        gradient.mul_(1000)
    else:
        gradient[2, 1] = float(event)


def gradients(model):
    return [layer.weight.grad.clone() for layer in model]


# What is left of the nine healthy gradients and of the bad one after torch's global clip to 1.
AFTER_GLOBAL_CLIP = {
    "nan": (lambda g: g.isnan().all(), lambda g: g.isnan().all()),
    "inf": (lambda g: (g == 0).all(), lambda g: g[2, 1].isnan()),
    "3e30": (lambda g: (g == 0).all(), lambda g: (g == 0).all()),
    "a thousand-fold layer": (lambda g: 0.0009 < g.norm() < 0.0011, lambda g: 0.99 < g.norm() < 1.01),
}


@pytest.mark.parametrize("event", AFTER_GLOBAL_CLIP)
def test_a_global_clip_spoils_the_healthy_layers(event):
    model = model_with_gradients()
    happens(model, event)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    healthy, bad = AFTER_GLOBAL_CLIP[event]
    for i, gradient in enumerate(gradients(model)):
        assert (bad if i == BAD else healthy)(gradient), f"layer {i}: {gradient}"


@pytest.mark.parametrize("event", AFTER_GLOBAL_CLIP)
@pytest.mark.parametrize("strategy", ["xsp", "per_tensor"])
def test_bins_keep_every_other_gradient_exactly_and_name_the_bad_one(strategy, event):
    model = model_with_gradients()
    healthy = gradients(model)
    splitter = gs.GradientSplitter(model, strategy, gs.Fixed(2.0))
    happens(model, event)
    record = splitter.step()
    for i, (before, after) in enumerate(zip(healthy, gradients(model), strict=True)):
        if i != BAD:
            assert torch.equal(before, after), f"layer {i} changed"
    bad, worst = gradients(model)[BAD], record.worst(1)[0]
    if event in ("nan", "inf"):
        assert worst.outcome == gs.Outcome.ZEROED
        assert not math.isfinite(worst.norm)
        assert worst.norm_after == 0
    else:
        assert worst.outcome == gs.Outcome.SCALED
        assert worst.norm_after == pytest.approx(2.0)
        assert worst.norm > 100
    if strategy == "per_tensor":
        assert worst.name == "3.weight"
        bad_rows, kept_rows = bad, None
    elif event == "a thousand-fold layer":
        assert worst.name.startswith("3.weight[")
        bad_rows, kept_rows = bad, None
    else:
        assert worst.name == "3.weight[2:3]"
        bad_rows, kept_rows = bad[2:3], [0, 1, 3]
    if kept_rows is not None:
        assert torch.equal(bad[kept_rows], healthy[BAD][kept_rows]), "the layer's own healthy rows changed"
    if event in ("nan", "inf"):
        assert (bad_rows == 0).all()
    else:
        assert (bad_rows.norm(dim=1) <= 2.0 * (1 + 1e-6)).all()


@pytest.mark.parametrize("event", AFTER_GLOBAL_CLIP)
def test_gso_updates_every_other_row_as_if_nothing_had_happened(event):
    finals = []
    for broken in (False, True):
        model = model_with_gradients()
        for i, layer in enumerate(model):
            nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(i))
        before = [layer.weight.detach().clone() for layer in model]
        if broken:
            happens(model, event)
        gs.GSO(model, lr=0.01, direction="adam").step()
        finals.append([layer.weight.detach().clone() for layer in model])
    for i, (clean, after) in enumerate(zip(*finals, strict=True)):
        rows = [r for r in range(4) if i != BAD or (r != 2 and event != "a thousand-fold layer")]
        assert torch.equal(clean[rows], after[rows]), f"layer {i} moved differently"
        moved = (after - before[i]).norm(dim=1)
        bound = 0.03 * before[i].norm(dim=1) + 0.01 * 0.01 * before[i].norm(dim=1)
        assert (moved <= bound * (1 + 1e-5)).all(), f"layer {i} moved by {moved}, bound {bound}"
    if event in ("nan", "inf"):
        assert torch.equal(finals[1][BAD][2], before[BAD][2]), "a row without a finite gradient moved"
