"""Checkpoints move between numbers of ranks: bins are defined on global shapes, so a saved run goes on anywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import gradsplit as gs
from tests.distributed.models import batch, make_net, shard, weights_of
from tests.distributed.ranks import on_ranks

KINDS: dict[str, dict[str, Any]] = {
    "element": {},
    "bin": {"second_moment": "bin"},
    "history": {"budget": {"bin": (gs.Ema(1.5, warmup=2), gs.RelativeStep(0.03)), "root": gs.Ema(1.2, warmup=2)}},
}
SAVED, END = 4, 9


def made(world: int, kind: str) -> tuple[torch.nn.Module, gs.GSO]:
    net = make_net()
    model = net if world == 0 else shard(net, "fsdp", world)
    return model, gs.GSO(model, 0.05, **KINDS[kind], direction="adam")


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)  # the pace follows the largest rate, which is state
        x, y = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def parts_of(model: torch.nn.Module, optimizer: gs.GSO) -> dict[str, Any]:
    """What goes into a checkpoint."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "history": optimizer.state_dict()["gradsplit"],
    }


def save(rank: int, world: int, folder: str) -> Any:
    answers = {}
    for kind in KINDS:
        model, optimizer = made(world, kind)
        train(model, optimizer, range(SAVED))
        dcp.save(parts_of(model, optimizer), checkpoint_id=f"{folder}/{kind}")
        options = StateDictOptions(full_state_dict=True)
        whole = weights_of(model), copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        train(model, optimizer, range(SAVED, END))
        answers[kind] = whole, weights_of(model)
    return answers


def load(rank: int, world: int, folder: str) -> Any:
    answers = {}
    for kind in KINDS:
        model, optimizer = made(world, kind)
        state = parts_of(model, optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{kind}", no_dist=world == 0)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        optimizer.load_state_dict({**optimizer.state_dict(), "gradsplit": state["history"]})
        train(model, optimizer, range(SAVED, END))
        answers[kind] = weights_of(model)
    return answers


def load_whole(rank: int, world: int, whole: Any, *, everywhere: bool) -> Any:
    """From full state dicts: on every rank, or on rank 0 alone, from which they are broadcast."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=not everywhere)
    model, optimizer = made(world, "bin")
    weights, state = copy.deepcopy(whole)  # torch makes shards of what it is given, in place
    given = everywhere or rank == 0
    set_model_state_dict(model, weights if given else {}, options=options)
    set_optimizer_state_dict(model, optimizer, state if given else {}, options=options)
    for p in model.parameters():
        assert optimizer.state[p]["bin_sq"].dtype == torch.float32
    train(model, optimizer, range(SAVED, END))
    return weights_of(model)


def load_both_ways(rank: int, world: int, whole: Any) -> Any:
    return [load_whole(rank, world, whole, everywhere=everywhere) for everywhere in (True, False)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, on_ranks(2, save, str(folder))[0]


def assert_same(mine: dict[str, torch.Tensor], true: dict[str, torch.Tensor], what: str) -> None:
    assert set(mine) == set(true)
    for name, weight in true.items():
        torch.testing.assert_close(
            mine[name], weight, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{what}, {name}: {m}"
        )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a plain process, on purpose
@pytest.mark.parametrize("world", [4, 1, 0], ids=["four ranks", "one rank", "no group"])
def test_saved_on_two_ranks_goes_on(world: int, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, uninterrupted = saved
    answers = on_ranks(world, load, str(folder)) if world else [load(0, 0, str(folder))]
    for answer in answers:
        for kind in KINDS:
            assert_same(answer[kind], uninterrupted[kind][1], f"{kind} on {world}")


def test_full_state_dicts_load_everywhere_and_by_broadcast(saved: tuple[Path, dict[str, Any]]) -> None:
    whole, true = saved[1]["bin"]
    for answer in on_ranks(2, load_both_ways, whole):
        for mine in answer:
            assert_same(mine, true, "full state dict")
