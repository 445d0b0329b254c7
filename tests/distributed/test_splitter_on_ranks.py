"""The splitter on several ranks: the same numbers as in one process, by one all-reduce per step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gradsplit as gs
from tests.distributed.models import batch, make_net, shard, weights_of
from tests.distributed.ranks import counted, on_ranks

STEPS = 20


def blocks(layout: gs.Layout) -> gs.Plan:
    """Boxes of 4 x 3 that no shard's border respects, below the module tree."""
    from gradsplit.plan import Boxes, Plan

    columns: list[list[int]] = [[] for _ in range(5)]
    for t, (rows, cols) in enumerate(zip(layout.rows, layout.cols, strict=True)):
        for top in range(0, rows, 4):
            for left in range(0, cols, 3):
                for column, value in zip(columns, (t, top, min(top + 4, rows), left, min(left + 3, cols)), strict=True):
                    column.append(value)
    return Plan(layout, Boxes.from_columns(*columns, range(len(columns[0]))), modules=True)


PLANS: dict[str, tuple[Any, Any]] = {
    "rows, default": ("xsp", None),
    "boxes over borders": (blocks, {"root": gs.Fixed(2.0), "module": gs.Ema(1.5, warmup=1), "bin": gs.Fixed(0.5)}),
    "modules": (blocks, {"module": gs.Ema(1.2, warmup=1)}),
    "one bin": ("whole", gs.Fixed(0.5)),  # a shard and a replica in one bin
    "columns": (lambda layout: gs.xsp(layout, axis=1), gs.Relative(0.1)),
}


def train(model: torch.nn.Module, plan: str, steps: int = STEPS) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
    """Train and return the weights, the scales of every step, and the collectives of every step of ours."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    strategy, budget = PLANS[plan]
    splitter = gs.GradientSplitter(model, plan=strategy, budget=budget, optimizer=optimizer)
    scales, collectives = [], []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        calls: list[str] = []
        with counted(calls):
            scales.append(splitter.step().decision.scale_B.clone())
        assert set(calls) <= {"all_reduce"}
        collectives.append(len(calls))
        optimizer.step()
    return weights_of(model), scales, collectives


MODES = {1: ("fsdp",), 2: ("ddp", "fsdp", "tp"), 4: ("ddp", "fsdp", "hsdp", "tp", "fsdp+tp")}


def work(rank: int, world: int) -> dict[str, Any]:
    """Every mode and plan on the same ranks: starting processes costs more than the training."""
    return {f"{mode}/{plan}": train(shard(make_net(), mode, world), plan) for mode in MODES[world] for plan in PLANS}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {plan: train(make_net(), plan) for plan in PLANS}


@pytest.mark.parametrize("world", MODES)
def test_equals_one_process(world: int, alone: dict[str, Any]) -> None:
    answers = on_ranks(world, work)
    for key in answers[0]:
        mode, plan = key.split("/")
        weights_alone, scales_alone, _ = alone[plan]
        assert any((scale < 1).any() for scale in scales_alone)  # where nothing binds nothing would be shown
        for answer in answers:
            weights, scales, collectives = answer[key]
            assert collectives == [0 if mode == "ddp" else 1] * STEPS, key
            for mine, first, theirs in zip(scales, answers[0][key][1], scales_alone, strict=True):
                assert torch.equal(mine, first), key  # the same bits on every rank
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
            for name, weight in weights_alone.items():
                torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-9)
