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

EVENTS = ("nan on rank 1", "none on rank 1", "none anywhere", "a bias, none on rank 1")


def work(rank: int, world: int) -> dict[str, Any]:
    model = shard(make_net(), "fsdp", world)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(0.1))
    answers: dict[str, Any] = {"copies": splitter.kernel.name}
    for event in EVENTS:
        x, y = batch(0)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        weight, bias = (dict(model.named_parameters())[f"wide.{name}"] for name in ("weight", "bias"))
        if event == "nan on rank 1" and rank == 1:
            weight.grad.to_local()[0, 0] = float("nan")
        if event == "none anywhere" or (event == "none on rank 1" and rank == 1):
            weight.grad = None
        if event == "a bias, none on rank 1":
            answers["first half"] = bias.grad.to_local().norm()
            if rank == 1:
                bias.grad = None
        record = splitter.step()
        answers[event] = record.norm_B, record.decision.scale_B, [r.name for r in record.worst(1)]
    return answers


def test_one_rank_alone() -> None:
    first, second = on_ranks(2, work)
    assert first["copies"].endswith("sharded")
    for event in EVENTS:
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
    bias = [one.name for one in plan.bins].index("wide.bias")
    torch.testing.assert_close(first["a bias, none on rank 1"][0][bias], first["first half"])  # what there is


def alone_in_its_group(rank: int, world: int) -> Any:
    """A group of one tensor, without a gradient on rank 1: rank 0 must not wait for ever."""
    answers = {}
    for moment in ("element", "bin"):
        model = shard(make_net(), "fsdp", world)
        named = dict(model.named_parameters())
        names = ("wide.weight", "wide.bias")
        groups = [{"params": [(name, named[name])], "plan": "xsp"} for name in names]
        groups.append({"params": [(name, p) for name, p in named.items() if name not in names]})
        optimizer = gs.GSO(groups, lr=0.05, second_moment=moment, direction="adam")
        before = {name: named[name].to_local().clone() for name in names}
        for step in range(2):
            x, y = batch(step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            for name in names:
                if rank == 1:
                    named[name].grad = None
            optimizer.step()
        answers[moment] = [not torch.equal(before[name], named[name].to_local()) for name in names]
    return answers


def test_a_group_without_gradients_on_one_rank_keeps_nobody_waiting() -> None:
    first, second = on_ranks(2, alone_in_its_group)
    assert first == {"element": [True, True], "bin": [True, True]}
    assert second == {"element": [False, False], "bin": [False, False]}


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


def in_backward_of_replicas(rank: int, world: int) -> list[str]:
    messages = []
    wrapped = shard(make_net(), "ddp", world)
    try:
        gs.GSO(wrapped, in_backward=True, direction="adam")
    except ValueError as error:
        messages.append(str(error))
    optimizer = gs.GSO(wrapped.module, in_backward=True, direction="adam")  # the wrapper is not seen, the processes are
    x, y = batch(0)
    try:
        torch.nn.functional.cross_entropy(wrapped(x), y).backward()
    except RuntimeError as error:
        messages.append(str(error))
    optimizer.step()
    return messages


def test_in_backward_is_refused_where_gradients_are_averaged_later() -> None:
    for built, run in on_ranks(2, in_backward_of_replicas):
        assert "DistributedDataParallel" in built and "in_backward=False" in built
        assert "before DDP has averaged" in run and "in_backward=False" in run


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
