"""The README's table of events, each run through `clip_grad_norm_` and through GradientSplitter on equal gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import gradsplit as gs
from gradsplit.budget import Outcome

BAD = 3  # the tensor the event happens in; the other nine are healthy


def _model(norm: float = 1.0) -> nn.Module:
    """Ten 4 x 4 weights, each with a gradient of the given norm, in equal entries."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(10)))
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, norm / 4)
    return model


def _gradients(model: nn.Module) -> list[Tensor]:
    return [weight.grad for weight in model.parameters()]


def _plant(model: nn.Module, event: str) -> None:
    bad = _gradients(model)[BAD]
    if event == "layer":
        bad.mul_(1000.0)
    else:
        bad[1, 2] = {"nan": math.nan, "inf": math.inf, "huge": 3e30}[event]


@pytest.mark.parametrize("event", ["nan", "inf", "huge", "layer"])
def test_a_global_clip_lets_one_tensor_reach_all_others(event):
    model = _model()
    _plant(model, event)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    gradients = _gradients(model)
    healthy = gradients[:BAD] + gradients[BAD + 1 :]
    if event == "nan":
        assert all(g.isnan().all() for g in gradients)
    elif event == "inf":
        assert all((g == 0).all() for g in healthy)
        assert gradients[BAD][1, 2].isnan()
    elif event == "huge":
        assert all((g == 0).all() for g in gradients)
    else:
        assert all(g.norm() == pytest.approx(0.001, rel=1e-3) for g in healthy)


@pytest.mark.parametrize("event", ["nan", "inf", "huge", "layer"])
def test_splitting_keeps_every_other_row_bit_for_bit(event):
    model = _model()
    _plant(model, event)
    record = gs.GradientSplitter(model, budget=gs.Fixed(1.0)).step()
    worst = record.worst(4)
    for number, gradient in enumerate(_gradients(model)):
        touched = set() if number != BAD else set(range(4)) if event == "layer" else {1}
        for row in range(4):
            kept = bool((gradient[row] == 0.25).all())
            assert kept is (row not in touched), f"row {row} of tensor {number}"
    bad = _gradients(model)[BAD]
    if event in ("nan", "inf"):
        assert (bad[1] == 0).all()
        assert (worst[0].name, worst[0].outcome) == (f"{BAD}.weight[1:2]", Outcome.ZEROED)
    elif event == "huge":
        assert bad[1].norm() == pytest.approx(1.0)
        assert (worst[0].name, worst[0].outcome) == (f"{BAD}.weight[1:2]", Outcome.SCALED)
    else:
        assert bad.norm(dim=1).tolist() == pytest.approx([1.0] * 4)
        assert {report.name for report in worst} == {f"{BAD}.weight[{row}:{row + 1}]" for row in range(4)}
