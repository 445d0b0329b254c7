"""GSO on several ranks: the weights of one process, by one all-reduce per step where each bin is bounded by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gradsplit as gs
from gradsplit.optim.updates import sharded as sharded_update
from tests.distributed.models import batch, make_net, shard, weights_of
from tests.distributed.ranks import counted, on_ranks

STEPS, FEW = 20, 5
ROOT = {"root": gs.Fixed(2.0), "bin": (gs.Relative(0.2), gs.RelativeStep(0.03))}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one moment per row": {"second_moment": "bin"},
    "columns": {"plan": lambda layout: gs.xsp(layout, axis=1)},
    "limit of the sum": {"plan": "tree_sp", "budget": ROOT},
    "too much to gather": {},
    "in backward": {"in_backward": True},
    "block after block": {},
}
MODES = {1: ("fsdp",), 2: ("ddp", "fsdp", "tp"), 4: ("ddp", "fsdp", "hsdp", "tp", "fsdp+tp")}


def reductions(world: int, mode: str, variant: str) -> int:
    """All-reduces per step: none for replicas; a second one where limits look beyond the bin, or too much is spread."""
    if mode == "ddp" or variant == "in backward":  # the latter reduces inside backward
        return 0
    if variant == "block after block":
        return 4  # every step asks which block is next: copies are counted anew
    return 2 if world > 1 and variant in ("limit of the sum", "too much to gather") else 1


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[int]:
    """Train and return our collectives of each step."""
    made = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        calls: list[str] = []
        with counted(calls):
            optimizer.step()
        assert set(calls) <= {"all_reduce"}
        made.append(len(calls))
    return made


def run(model: torch.nn.Module, variant: str, **options: Any) -> tuple[dict[str, torch.Tensor], list[int], Any]:
    limits = sharded_update.GATHERED, sharded_update.GATHERED_PER_BIN
    if variant == "too much to gather":
        sharded_update.GATHERED = sharded_update.GATHERED_PER_BIN = 0
    try:
        optimizer = gs.GSO(model, 0.05, **VARIANTS[variant], **options, direction="adam")
        if variant == "block after block":
            gs.CyclicBlocks(optimizer, model, switch_every=1, order="energy")
    finally:
        sharded_update.GATHERED, sharded_update.GATHERED_PER_BIN = limits
    made = train(model, optimizer, range(STEPS if variant == "default" else FEW))
    return weights_of(model), made, [part.update.decision.scale_B for part in optimizer._parts]


def work(rank: int, world: int) -> dict[str, Any]:
    answers = {}
    for mode in MODES[world]:
        variants = ["default", "one moment per row"]
        if mode == "fsdp" or world == 2:
            variants += ["columns", "limit of the sum", "too much to gather"]
        if mode not in ("ddp", "tp"):  # plain tensors in several processes are refused
            variants += ["in backward", "block after block"]
        for variant in variants:
            answers[mode, variant] = run(shard(make_net(), mode, world), variant)
    return answers


@pytest.mark.parametrize("world", MODES)
def test_equals_one_process(world: int) -> None:
    alone = {variant: run(make_net(), variant, backend="reference") for variant in VARIANTS}
    answers = on_ranks(world, work)
    for answer in answers:
        for key, (weights, made, scales) in answer.items():
            true_weights, _, true_scales = alone[key[1]]
            assert made == [reductions(world, *key)] * len(made), key
            for mine, first, true in zip(scales, answers[0][key][2], true_scales, strict=True):
                assert torch.equal(mine, first), key  # the same bits on every rank
                torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
            for name, weight in true_weights.items():
                torch.testing.assert_close(
                    weights[name], weight, rtol=0, atol=1e-7, msg=lambda m, key=key, n=name: f"{key} {n}: {m}"
                )


def updates_of(rank: int, world: int) -> tuple[str, str]:
    optimizer = gs.GSO(shard(make_net(), "fsdp", world), fused=True, direction="adam")
    (part,) = optimizer._parts
    return type(part.update._in_place.update).__name__, type(part.update._across.update).__name__


def test_row_shards_and_gathered_tensors_are_updated_in_compiled_loops() -> None:
    pytest.importorskip("numba", reason="the fused update needs the package numba: pip install gradsplit[fast]")
    assert on_ranks(2, updates_of) == [("FusedUpdate", "FusedUpdate")] * 2
