"""Faults planted in what ranks tell each other: each must show in the weights or in the state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import gradsplit as gs
from gradsplit.distributed import ShardedKernel
from gradsplit.optim.updates.sharded import Gathered, ShardedUpdate
from tests.distributed.models import batch, make_net, shard, weights_of
from tests.distributed.ranks import on_ranks

STEPS = 5


def deaf(self: ShardedKernel, values: Tensor) -> Tensor:
    return values


def copies_not_counted(self: ShardedKernel, tensors: Any) -> Tensor:
    return torch.zeros_like(self._numel)


def nothing_written(self: Gathered, row: Tensor, t: int, piece: Tensor) -> None:
    return None


def nothing_learned(self: Any, *arguments: Any) -> None:
    return None


FAULTS: dict[str, tuple[str, Any, str, Callable[..., Any] | None]] = {
    "none": ("fsdp", ShardedKernel, "add_", None),
    "none, replicas": ("tp", ShardedKernel, "add_", None),
    "a rank hears nothing": ("fsdp", ShardedKernel, "add_", deaf),
    "replicas are added up": ("tp", ShardedKernel, "_held", copies_not_counted),
    "pieces are not sent": ("fsdp", Gathered, "write", nothing_written),
    "other ranks' moments stand still": ("fsdp", None, "learn_elsewhere", nothing_learned),
}


def train(model: torch.nn.Module, fault: str, *, planted: bool) -> Any:
    mode, owner, name, wrong = FAULTS[fault]
    splitter = None
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if mode == "tp":
        splitter = gs.GradientSplitter(model, plan="whole", budget=gs.Fixed(0.5))
    else:
        optimizer = gs.GSO(model, 0.05, second_moment="bin", direction="adam")
    if planted and owner is None:
        (part,) = optimizer._parts
        assert type(part.update) is ShardedUpdate
        owner = type(part.update._in_place)
    with mock.patch.object(owner, name, wrong) if planted and wrong is not None else nullcontext():
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            if splitter is not None:
                splitter.step()
            optimizer.step()
    state = [optimizer.state[p]["bin_sq"] for p in model.parameters()] if splitter is None else []
    return weights_of(model), state


def work(rank: int, world: int, fault: str) -> Any:
    return train(shard(make_net(), FAULTS[fault][0], world), fault, planted=True)


def difference(mine: Any, true: Any) -> float:
    weights = max(float((mine[0][name] - true[0][name]).abs().max()) for name in true[0])
    state = max(
        [float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine[1], true[1], strict=True)], default=0.0
    )
    return max(weights, state)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault: str) -> None:
    alone = train(make_net(), fault, planted=False)
    worst = max(difference(answer, alone) for answer in on_ranks(2, work, fault))
    assert (worst > 1e-4) == (not fault.startswith("none")), worst
    assert worst > 1e-4 or worst < 1e-6
