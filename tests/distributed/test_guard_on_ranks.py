"""What makes one rank diverge makes all go back, to the same weights, and with one collective a look."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import gradsplit as gs
from tests.distributed.models import batch, make_net, shard
from tests.distributed.ranks import counted, on_ranks


def _full(model: torch.nn.Module) -> list[torch.Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def work(rank: int, world: int, kind: str) -> dict[str, Any]:
    model = make_net()
    model = DistributedDataParallel(model) if kind == "ddp" else shard(model, "fsdp", world)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    guard = gs.Guard(model, optimizer, every=5)
    answers: dict[str, Any] = {}
    for step in range(9):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if rank == 1 and step == 7:  # a fault of one rank's weights; the mean of the losses shows it to all
            loss = loss * math.nan
        loss.backward()
        optimizer.step()
        calls: list[str] = []
        with counted(calls):
            guard.step(loss)
        if step == 2:
            answers["calls"] = list(calls)
        if step == 4:
            answers["snapshot"] = _full(model)
        if step == 7:
            answers["after"] = _full(model)
    answers["end"] = _full(model)
    answers["actions"] = [(action.kind, action.step, action.to_step, action.num_undone) for action in guard.actions]
    return answers


def _check(kind: str) -> None:
    first, second = on_ranks(2, work, kind)
    assert first["calls"] == second["calls"] == ["all_reduce"]
    assert first["actions"] == second["actions"] == [("rolled_back", 7, 5, 3)]
    for mine, theirs in zip(first["end"], second["end"], strict=True):
        assert torch.equal(mine, theirs) and mine.isfinite().all()
    for now, then in zip(first["after"], first["snapshot"], strict=True):
        assert torch.equal(now, then)


def test_all_ranks_of_ddp_go_back_when_one_diverges() -> None:
    _check("ddp")


def test_all_ranks_of_fsdp_go_back_when_one_diverges() -> None:
    _check("fsdp")
