"""A small model trained with and without a GradScaler."""

from __future__ import annotations

import copy

import torch

import gradsplit as gs
from tests.optim.small import model_of

SCALE = 2.0**16
INF = float("inf")
HISTORY = (gs.Ema(1.1, warmup=1), gs.ZScore(1.0, warmup=2), gs.Percentile(0.5))


def loss_of(model, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return (model(x) - 3).square().mean() * (30.0 if step == 2 else 1.0)


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000, **options)


def snapshot(model, optimizer):
    """Everything that a step may move."""
    return copy.deepcopy((list(model.parameters()), optimizer.state_dict()))


def assert_same(a, b):
    """Equal bit for bit, whatever they are made of."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def train(model, optimizer, steps, scaler=None, between=None):
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if between is not None:
            between()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def check_a_scale_changes_nothing(make):
    """Law of updates: under a scaler, the steps are those without one, in unscaled units."""
    weights = []
    for scaler in (None, scaler_of()):
        model = model_of()
        optimizer = make(list(model.named_parameters()), lr=0.05, direction="adam", budget=gs.Fixed(1.0))
        train(model, optimizer, range(5), scaler)
        weights.append(list(model.parameters()))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def check_an_overflow_moves_nothing(make):
    """Law of updates: on an overflow weights, moments, counters and history stay as they are, bit for bit."""
    model, scaler = model_of(), scaler_of()
    optimizer = make(list(model.named_parameters()), lr=0.05, direction="adam", budget=(*HISTORY, gs.RelativeStep()))
    train(model, optimizer, range(3), scaler)
    before = snapshot(model, optimizer)
    train(model, optimizer, [3], scaler, lambda: model[2].weight.grad[1].fill_(INF))
    assert_same(before, snapshot(model, optimizer))
