"""A lowered rate acts in every step, whoever sets the rates, and is seen by nobody."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs


def test_the_lowered_rate_acts_on_every_later_step_and_the_scheduler_never_meets_it():
    w = nn.Parameter(torch.zeros(1))
    holder = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    guard = gs.Guard(holder, optimizer, scheduler=schedule, lr_factor=0.25)
    expected, rate = 0.0, 1.0
    for k in range(3):
        if k == 1:
            guard._first_snapshot()
            guard.roll_back("asked for by this test")
            expected, rate = 0.0, 0.25  # back to the first snapshot, and the schedule with it
        w.grad = torch.ones(1)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        expected -= rate * lr
        schedule.step()
        assert w.item() == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 3)


def test_a_rate_set_by_the_script_in_every_step_is_lowered_too():
    w = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=123.0)
    guard = gs.Guard(nn.ParameterList([w]), optimizer)
    guard._rate.factor = 0.5
    for lr in (1.0, 2.0):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.ones(1)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == lr
    assert w.item() == -1.5


def test_a_rate_that_is_a_tensor_is_lowered_in_place_and_set_back():
    w = nn.Parameter(torch.zeros(1))
    rate = torch.tensor(1.0)
    optimizer = torch.optim.SGD([w], lr=rate)
    guard = gs.Guard(nn.ParameterList([w]), optimizer)
    guard._rate.factor = 0.5
    w.grad = torch.ones(1)
    optimizer.step()
    assert w.item() == -0.5 and optimizer.param_groups[0]["lr"] is rate and rate.item() == 1.0


def test_a_step_that_raises_leaves_no_lowered_rate_behind():
    w = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    guard = gs.Guard(nn.ParameterList([w]), optimizer)
    guard._rate.factor = 0.5

    def closure():
        raise KeyError("the script's own")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    w.grad = torch.ones(1)
    optimizer.step()
    assert w.item() == -0.5 and optimizer.param_groups[0]["lr"] == 1.0
