"""L-BF calibrated on shards cuts as in one process; what befalls one rank is the same answer on all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import gradsplit as gs
from tests.distributed.models import batch, make_net, shard
from tests.distributed.ranks import counted, on_ranks

PASSES = 4


def calibrated(model: nn.Module, event: str, *, here: bool) -> Any:
    splitter = gs.GradientSplitter(model, plan="lbf", budget=gs.Relative(0.1))
    passes = iter(range(PASSES))

    def closure() -> None:
        step = next(passes)
        x, y = batch(step)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        weight = dict(model.named_parameters())["wide.weight"]
        local = weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad
        if step == 1 and event == "nan":
            local[0, 0] = float("nan") if here else local[0, 0]
        if step == 1 and event == "none" and here:
            weight.grad = None

    calls: list[str] = []
    with counted(calls):
        plan = splitter.calibrate(closure, PASSES)
    x, y = batch(9)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    return plan.fingerprint, plan.num_bins, splitter.step().decision.scale_B, len(calls)


def work(rank: int, world: int) -> Any:
    last = world - 1
    return {
        (mode, event): calibrated(shard(make_net(), mode, world), event, here=rank == last)
        for mode in ("fsdp", "tp")
        for event in ("all sound", "nan", "none")
    }


def test_the_same_plan_on_every_rank_and_in_one_process() -> None:
    true = calibrated(make_net(), "all sound", here=False)
    without = calibrated(make_net(), "nan", here=True)  # leaves the second pass out for one tensor
    first, second = on_ranks(2, work)
    assert true[1] > len(gs.layout_of(make_net()))  # it does cut
    assert true[0] != without[0]
    for key in first:
        (plan, bins, scale_B, calls), (other_plan, _, other_scale_B, _) = first[key], second[key]
        assert plan == other_plan, key
        assert torch.equal(scale_B, other_scale_B), key
        assert bins > 0 and calls < 60
    for mode in ("fsdp", "tp"):
        assert first[mode, "all sound"][0] == true[0]
        torch.testing.assert_close(first[mode, "all sound"][2], true[2])
    assert first["fsdp", "nan"][0] == without[0]
