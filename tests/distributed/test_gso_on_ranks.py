"""GSO on several ranks: the weights of one process, and state that moves between numbers of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import gradsplit as gs
from tests.distributed.models import batch, full, make_net, shard
from tests.distributed.ranks import on_ranks

STEPS = 6
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one moment a row": {"second_moment": "bin"},
    "columns": {"plan": lambda layout: gs.xsp(layout, axis=1)},
}
# All-reduces a step: one carries gradients and weights, one the updates, since a bias is one bin over all ranks.
REDUCTIONS = {"ddp": 0, "fsdp": 2, "tp": 2, "hsdp": 2, "fsdp+tp": 2}
MODES = {2: ("ddp", "fsdp", "tp"), 4: ("fsdp", "hsdp", "fsdp+tp")}


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[int]:
    """Train and return our all-reduces of each step."""
    reductions = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        calls = [0]
        reduce = dist.all_reduce

        def counted(*args: Any, reduce: Any = reduce, calls: list[int] = calls, **kwargs: Any) -> Any:
            calls[0] += 1
            return reduce(*args, **kwargs)

        dist.all_reduce = counted
        try:
            optimizer.step()
        finally:
            dist.all_reduce = reduce
        reductions.append(calls[0])
    return reductions


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace("module.", ""): full(p) for name, p in model.named_parameters()}


def work(rank: int, world: int) -> dict[str, Any]:
    answers = {}
    for mode in MODES[world]:
        for name, options in VARIANTS.items():
            model = shard(make_net(), mode, world)
            reductions = train(model, gs.GSO(model, 0.05, **options), range(STEPS))
            answers[f"{mode}/{name}"] = weights_of(model), reductions
    return answers


@pytest.mark.parametrize("world", MODES)
def test_equals_one_process(world: int) -> None:
    alone = {}
    for name, options in VARIANTS.items():
        model = make_net()
        train(model, gs.GSO(model, 0.05, backend="reference", **options), range(STEPS))
        alone[name] = weights_of(model)
    for answer in on_ranks(world, work):
        for key, (weights, reductions) in answer.items():
            mode, name = key.split("/")
            assert reductions == [REDUCTIONS[mode]] * STEPS, key
            for tensor, weight in alone[name].items():
                torch.testing.assert_close(
                    weights[tensor], weight, rtol=0, atol=1e-7, msg=lambda m, key=key, t=tensor: f"{key} {t}: {m}"
                )


def save(rank: int, world: int) -> Any:
    model = shard(make_net(), "fsdp", world)
    optimizer = gs.GSO(model, 0.05, second_moment="bin")
    train(model, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True)
    # Plain tensors in the state are the optimizer's own; the run goes on, so they are copied.
    saved = weights_of(model), copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    train(model, optimizer, range(3, STEPS))
    return saved, weights_of(model)


def resume(rank: int, world: int, weights: Any, state: Any) -> Any:
    net = make_net()
    net.load_state_dict(weights)
    model = shard(net, "fsdp", world) if world > 1 else net
    optimizer = gs.GSO(model, 0.05, second_moment="bin")
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    for p in model.parameters():
        assert optimizer.state[p]["bin_sq"].dtype == torch.float32
    train(model, optimizer, range(3, STEPS))
    return weights_of(model)


def test_saved_on_two_ranks_loads_on_four_and_on_one() -> None:
    (saved, uninterrupted), _ = on_ranks(2, save)
    weights, state = saved
    for world in (4, 1):
        for resumed in on_ranks(world, resume, weights, state):
            for name, weight in uninterrupted.items():
                torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6)
