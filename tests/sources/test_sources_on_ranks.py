"""Samples and terms on two ranks: terms by the norms of the whole batch, samples by each rank's own part."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gradsplit.sources import RunningLimit, SampleSplitter, TermSplitter
from tests.distributed.ranks import on_ranks

STEPS = 4
LOOSE = RunningLimit(factor=1e12)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _batch(step: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _train_terms(model: nn.Module, rank: int, world: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    splitter = TermSplitter(model)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        y = model(_batch(step)[rank::world])
        loud = y[:, 1].square().mean() * 1e3
        if step == 2 and rank == 0:
            loud = loud * math.nan
        splitter.backward(quiet=y[:, 0].square().mean(), loud=loud)
        seen += [torch.tensor([row.scale for row in splitter.rows()]), torch.tensor(len(splitter.named()))]
        optimizer.step()
    return [*seen, *(parameter.detach().clone() for parameter in model.parameters())]


def _terms_on_a_rank(rank: int, world: int) -> Any:
    return _train_terms(nn.parallel.DistributedDataParallel(_net()), rank, world)


def test_terms_are_bounded_by_the_norms_of_the_whole_batch():
    (alone,) = [_train_terms(_net(), 0, 1)]
    for found in on_ranks(2, _terms_on_a_rank):
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other)


def _sharded_terms(rank: int, world: int) -> Any:
    model = fully_shard(_net(), mesh=init_device_mesh("cpu", (world,)))
    try:
        TermSplitter(model)
    except ValueError as error:
        return str(error)
    return ""


def test_terms_of_sharded_parameters_are_refused_by_name():
    assert all("sharded" in said for said in on_ranks(2, _sharded_terms))


def _samples(model: nn.Module, rank: int, world: int) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = []
    with SampleSplitter(model, LOOSE) as splitter:
        for step in range(STEPS):
            optimizer.zero_grad()
            x = _batch(step)
            x[5] = math.nan
            model(x[rank::world]).square().sum(1).mean().backward()
            optimizer.step()
        names = [(row.step, row.sample) for row in splitter.named()]
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return names, [parameter.detach().clone() for parameter in full]


def _samples_on_a_rank(rank: int, world: int, mode: str) -> Any:
    if mode == "ddp":
        return _samples(nn.parallel.DistributedDataParallel(_net()), rank, world)
    model = _net()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return _samples(fully_shard(model, mesh=mesh), rank, world)


def _check_samples(mode: str) -> None:
    names, alone = _samples(_net(), 0, 1)
    assert set(names) == {(step, 5) for step in range(STEPS)}
    found = on_ranks(2, _samples_on_a_rank, mode)
    assert found[0][0] == []
    assert set(found[1][0]) == {(step, 2) for step in range(STEPS)}
    for _, weights in found:
        for one, other in zip(weights, alone, strict=True):
            torch.testing.assert_close(one, other)


def test_samples_under_ddp_are_those_of_one_process():
    _check_samples("ddp")


def test_samples_under_fsdp2_are_those_of_one_process():
    _check_samples("fsdp2")
