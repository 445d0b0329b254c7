"""Mixed precision: GradScaler in front of GSO, bfloat16 autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs
from tests.optim.amp_runs import HISTORY, INF, SCALE, assert_same, loss_of, scaler_of, snapshot, train
from tests.optim.small import model_of

OPTIONS = {
    "default": {},
    "eager": {"backend": "eager"},
    "bin": {"second_moment": "bin"},
    "history": {"budget": (*HISTORY, gs.RelativeStep())},
    "root": {"budget": {"root": gs.Fixed(2.0), "bin": gs.Relative(0.2)}},
    "groups": {"maximize": True},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gso_under_a_scaler_makes_the_steps_that_it_makes_without_one(name, unscale):
    """Scales are powers of two, so limits hold in unscaled units to the last bit that the paths share."""
    model, other = model_of(), model_of()
    plain, scaled = (gs.GSO(m, lr=0.05, **OPTIONS[name], direction="adam") for m in (model, other))
    scaler = scaler_of()
    train(model, plain, range(6))
    train(other, scaled, range(6), scaler, (lambda: scaler.unscale_(scaled)) if unscale else None)
    assert scaler.get_scale() == SCALE
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert plain.state[p]["step"] == scaled.state[q]["step"] == 6


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bad", [INF, float("nan")])
def test_on_an_overflow_gso_moves_nothing_counts_nothing_and_learns_nothing(name, unscale, bad):
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, **OPTIONS[name], direction="adam"), scaler_of()
    between = (lambda: scaler.unscale_(optimizer)) if unscale else None
    train(model, optimizer, range(3), scaler, between)
    before = snapshot(model, optimizer)

    def break_one():
        model[2].weight.grad[1, 2] = bad
        if unscale:
            scaler.unscale_(optimizer)

    train(model, optimizer, [3], scaler, break_one)
    assert_same(before, snapshot(model, optimizer))
    assert scaler.get_scale() == SCALE / 2
    train(model, optimizer, [4], scaler, between)
    assert all(optimizer.state[p]["step"] == 4 for p in model.parameters())


def test_an_overflow_in_the_first_step_leaves_moments_of_zero():
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, direction="adam"), scaler_of()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, [0], scaler, lambda: model[0].bias.grad.fill_(INF))
    assert_same(before, [p.detach() for p in model.parameters()])
    assert all((value == 0).all() for p in model.parameters() for value in optimizer.state[p].values())


def test_a_scaled_step_never_reads_a_value_of_its_scaler(monkeypatch):
    """What GradScaler asks for by the sum of its findings would wait for the device; GSO is handed the findings."""
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, backend="eager", direction="adam"), scaler_of()
    train(model, optimizer, [0], scaler)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()

    def refuse(self, *_):
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as m:
        for reading in ("item", "__bool__", "__float__", "tolist", "numpy"):
            m.setattr(torch.Tensor, reading, refuse)
        scaler.step(optimizer)
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())


def test_the_cycle_of_blocks_does_not_turn_on_an_overflow():
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, direction="adam"), scaler_of()
    cyclic = gs.CyclicBlocks(optimizer, model, switch_every=1)
    train(model, optimizer, [0], scaler)
    before, turn = snapshot(model, optimizer), cyclic.state_dict()
    train(model, optimizer, [1], scaler, lambda: model[0].bias.grad.fill_(INF))
    assert_same(before, snapshot(model, optimizer))
    assert cyclic.state_dict() == turn


def test_float16_gradients_are_unscaled_in_float32():
    """Unscaled in float16, a gradient of 2^-30 would be 0."""
    weights = []
    for scale in (1.0, SCALE):
        p = nn.Parameter(torch.ones(2, 4, dtype=torch.float16))
        optimizer = gs.GSO([p], lr=0.25, budget=gs.Fixed(INF), weight_decay=0.0, eps=0.0, direction="adam")
        if scale > 1:
            p.grad = torch.full((2, 4), 2.0**-30 * scale, dtype=torch.float16)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
        else:
            p.grad = torch.full((2, 4), 2.0**-14, dtype=torch.float16)
        optimizer.step()
        weights.append(p.detach().clone())
    assert (weights[0] == 0.75).all()
    assert torch.equal(*weights)


def test_an_optimizer_inside_backward_refuses_a_scaler():
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, in_backward=True, direction="adam"), scaler_of()
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"expected unscaled gradients, got a step\(\) by GradScaler"):
        scaler.step(optimizer)


@pytest.mark.parametrize("second_moment", ["element", "bin"])
def test_training_under_bfloat16_autocast_comes_close_to_float32(second_moment):
    losses = []
    for enabled in (False, True):
        model = model_of()
        optimizer = gs.GSO(model, lr=0.05, second_moment=second_moment, direction="adam")
        for step in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = loss_of(model, step)
            loss.backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0] < 7


@pytest.mark.parametrize(
    "options", [{}, {"fused": False}, {"in_backward": True}], ids=["compiled", "eager", "backward"]
)
def test_a_step_inside_a_region_of_autocast_is_the_step_outside_of_it(options):
    """Newton-Schulz computes in a dtype of its own."""
    runs = []
    for enabled in (False, True):
        model = model_of()
        optimizer = gs.GSO(model, **options)
        for step in range(3):
            source = torch.Generator().manual_seed(step)
            loss = sum((p * torch.randn(p.shape, generator=source)).sum() for p in model.parameters())
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"direction": "adam"}], ids=["compiled", "eager", "adam"])
def test_a_run_that_begins_in_inference_mode_goes_on_outside_of_it(options):
    runs = []
    for enabled in (False, True):
        model = model_of()
        optimizer = gs.GSO(model, **options)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            with torch.inference_mode(enabled and step == 0):
                optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)
