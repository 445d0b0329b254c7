"""What befalls one rank alone: every rank decides the same, and nobody waits for ever."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gradsplit as gs
from tests.distributed.models import batch, make_net, shard
from tests.distributed.ranks import on_ranks


def work(rank: int, world: int) -> dict[str, Any]:
    model = shard(make_net(), "fsdp", world)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(0.1))
    answers: dict[str, Any] = {"copies": splitter.kernel.name}
    for event in ("nan on rank 1", "none on rank 1", "none anywhere"):
        x, y = batch(0)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        weight = dict(model.named_parameters())["wide.weight"]
        if event == "nan on rank 1" and rank == 1:
            weight.grad.to_local()[0, 0] = float("nan")
        if event == "none anywhere" or (event == "none on rank 1" and rank == 1):
            weight.grad = None
        record = splitter.step()
        answers[event] = record.norm_B, record.decision.scale_B, [r.name for r in record.worst(1)]
    return answers


def test_one_rank_alone() -> None:
    first, second = on_ranks(2, work)
    assert first["copies"].endswith("sharded")
    for event in ("nan on rank 1", "none on rank 1", "none anywhere"):
        for mine, theirs in zip(first[event], second[event], strict=True):
            if isinstance(mine, torch.Tensor):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
            else:
                assert mine == theirs
    assert first["nan on rank 1"][2] == ["wide.weight[19:20]"]  # 37 rows on two ranks: 19 and 18
    healthy = first["nan on rank 1"][0]
    missing, none = first["none on rank 1"][0], first["none anywhere"][0]
    plan = gs.xsp(gs.layout_of(make_net()))
    rows = [b for b, one in enumerate(plan.bins) if one.name.startswith("wide.weight")]
    others = [b for b in range(plan.num_bins) if b not in rows]
    torch.testing.assert_close(missing[others], healthy[others])
    torch.testing.assert_close(missing[rows[:19]], healthy[rows[:19]])  # the present rank's rows count
    assert (missing[rows[19:]] == 0).all()
    assert (none[rows] == 0).all()


def lonely(rank: int, world: int) -> str:
    """The splitter told of too few ranks."""
    model = shard(make_net(), "fsdp", world)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    try:
        gs.GradientSplitter(model, budget=gs.Fixed(1.0), process_group=alone)
    except ValueError as error:
        return str(error)
    return ""


def test_too_few_ranks_are_named() -> None:
    for message in on_ranks(2, lonely):
        assert "whole number of copies" in message
        assert "process_group=" in message


def dies(rank: int, world: int) -> None:
    model = shard(make_net(), "fsdp", world)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0))
    x, y = batch(0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    dist.barrier()
    if rank == 1:
        os._exit(1)
    splitter.step()


def test_a_rank_that_ends_is_a_clear_error_on_the_others() -> None:
    with pytest.raises(AssertionError, match=r"rank 0:(.|\n)*RuntimeError: .*every rank to take part.*A rank has"):
        on_ranks(2, dies)
