"""Nothing in a step waits for the device: proved on a device that has no values to wait for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs
from tests.kernels.launches import Operations
from tests.laws.cases import BUDGETS


def attached(budget, strategy, *, backend="auto", device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 5), nn.Linear(5, 2)).to(device)
    groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    levels = {"bin": budget, "root": gs.Ema(2.0), "tensor": budget}
    splitter = gs.GradientSplitter(model, strategy, levels, optimizer=optimizer, backend=backend)
    return model, splitter


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("strategy", ["xsp", "tree_sp"])
def test_a_step_brings_nothing_to_the_host(budget, strategy):
    model, splitter = attached(BUDGETS[budget], strategy, backend="eager")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with Operations("cpu") as operations:
            splitter.step()
        assert not operations.brought, operations.brought


@pytest.mark.parametrize("rule", ["bottom_up", "nearest"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_step_runs_where_there_are_no_values(budget, rule):
    """On the meta device any look at a value raises."""
    model, splitter = attached(BUDGETS[budget], "xsp", device="meta")
    splitter.rule = splitter.ledger.rule = rule
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        record = splitter.step()
    assert record.decision.scale_B.device.type == "meta"
    assert record.norm_after_B().shape == (splitter.plan.num_bins,)
    assert record.decision.limit_N.shape == (splitter.plan.num_nodes,)


def test_the_count_of_waits_can_fail():
    with Operations("cpu") as operations:
        torch.ones(3).sum().item()
    assert operations.brought
