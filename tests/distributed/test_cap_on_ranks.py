"""A cap behind an optimizer of sharded tensors: the weights of one process, shard by shard, without a second copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gradsplit as gs
from gradsplit import update_cap
from tests.distributed.models import batch, make_net, shard, weights_of
from tests.distributed.ranks import counted, on_ranks
from tests.distributed.test_splitter_on_ranks import blocks

PLANS: dict[str, tuple[Any, Any, str]] = {
    "rows": ("xsp", None, "cap"),
    "rows, share": ("xsp", None, "share"),
    "boxes over borders": (blocks, None, "cap"),
    "whole": ("whole", None, "cap"),
    "root": ("xsp", {"root": gs.RelativeStep(0.01)}, "cap"),
}


def train(model: torch.nn.Module, name: str) -> tuple[dict[str, Tensor], list[int]]:
    """Train with a rate at which every step is capped; return the weights, and the sums over ranks behind each step."""
    plan, budget, step = PLANS[name]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    splitter = gs.GradientSplitter(model, plan, budget, optimizer=optimizer, cap_updates=True, step=step)
    cap, behind = splitter._cap, []
    assert cap is not None
    apply = cap.apply

    def counting() -> None:
        calls: list[str] = []
        with counted(calls):
            apply()
        behind.append(len(calls))

    cap.apply = counting  # type: ignore[method-assign]
    for i in range(4):
        x, y = batch(i)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return weights_of(model), behind


def work(rank: int, world: int) -> dict[str, Any]:
    update_cap.BLOCK = 16
    return {f"{mode}/{name}": train(shard(make_net(), mode, world), name) for mode in ("fsdp", "tp") for name in PLANS}


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Any]]:
    return on_ranks(2, work)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("mode", ["fsdp", "tp"])
def test_capped_steps_of_shards_are_those_of_one_process(mode: str, name: str, on_two: list[dict[str, Any]]) -> None:
    expected, _ = train(make_net(), name)
    for rank in on_two:
        weights, behind = rank[f"{mode}/{name}"]
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)
        assert behind == [1] * 4, "one sum over the ranks per step, for the biases if for nothing else"
