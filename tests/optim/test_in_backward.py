"""GSO inside backward: the same steps as outside, no gradient left, and a clear error where that cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsplit as gs


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _loss(model, step):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


def _train(*, steps=4, **options):
    model = _model()
    optimizer = gs.GSO(model, lr=1e-2, backend="eager", **options, direction="adam")
    for step in range(steps):
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()
    return model, optimizer


def _assert_same(ours, theirs):
    for mine, true in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("moment", ["element", "bin"])
@pytest.mark.parametrize("budget", [(gs.Relative(0.2), gs.RelativeStep(0.03)), gs.Ema(1.5, warmup=2)], ids=str)
def test_same_steps_as_outside(moment, budget):
    options = {"second_moment": moment, "budget": budget}
    _assert_same(_train(in_backward=True, **options)[0], _train(**options)[0])


def test_gradients_are_freed():
    model = _model()
    optimizer = gs.GSO(model, in_backward=True, backend="eager", direction="adam")
    _loss(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()


def test_accumulated_gradients_make_one_step():
    model, whole = _model(), _model()
    optimizer, reference = (
        gs.GSO(model, in_backward=True, backend="eager", direction="adam"),
        gs.GSO(whole, backend="eager", direction="adam"),
    )
    with optimizer.accumulating():
        _loss(model, 0).backward()
    _loss(model, 1).backward()
    optimizer.step()
    _loss(whole, 0).backward()
    _loss(whole, 1).backward()
    reference.step()
    _assert_same(model, whole)


def test_a_second_backward_without_arming_is_refused():
    model = _model()
    optimizer = gs.GSO(model, in_backward=True, backend="eager", direction="adam")  # its hooks end with it
    _loss(model, 0).backward()
    with pytest.raises(RuntimeError, match="accumulating"):
        _loss(model, 1).backward()
    optimizer.step()


def test_reentrant_checkpointing_of_a_shared_weight_is_detected():
    layer = nn.Linear(4, 4)
    optimizer = gs.GSO(layer, in_backward=True, backend="eager", direction="adam")  # its hooks end with it
    x = torch.randn(2, 4, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=True)
    y = checkpoint(layer, y, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()
    optimizer.step()


@pytest.mark.parametrize("level", ["root", "module"])
def test_limits_over_several_tensors_are_refused(level):
    with pytest.raises(ValueError, match=level):
        gs.GSO(
            _model(), plan="tree_sp", in_backward=True, budget={level: gs.Fixed(1.0)}, backend="eager", direction="adam"
        )


def test_a_bin_over_several_tensors_is_refused():
    with pytest.raises(ValueError, match="inside one tensor"):
        gs.GSO(_model(), plan="whole", in_backward=True, backend="eager", direction="adam")


def test_a_scaler_is_refused():
    model = _model()
    optimizer, scaler = gs.GSO(model, in_backward=True, backend="eager", direction="adam"), torch.amp.GradScaler("cpu")
    scaler.scale(_loss(model, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_saved_in_the_middle():
    whole, _ = _train(steps=6, in_backward=True, budget=gs.Ema(1.5, warmup=2))
    model, optimizer = _train(steps=3, in_backward=True, budget=gs.Ema(1.5, warmup=2))
    again = _model()
    again.load_state_dict(model.state_dict())
    resumed = gs.GSO(again, lr=1e-2, in_backward=True, budget=gs.Ema(1.5, warmup=2), backend="eager", direction="adam")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        _loss(again, step).backward()
        resumed.step()
    _assert_same(again, whole)


def test_accumulating_is_for_in_backward_alone():
    with pytest.raises(ValueError, match="in_backward=True"):
        gs.GSO(_model(), backend="eager", direction="adam").accumulating()
