"""Wrapped models: DistributedDataParallel is seen through, and GradientSplitter works beside ChainSplitter."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import gradsplit as gs
from gradsplit.chain import ChainSplitter, gradient_chain
from tests.chain.nets import TwoHeads


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    cls, box = model(batch)
    return cls.square().mean() + 1e3 * box.square().mean()


def test_data_parallel_models_are_seen_through() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = TwoHeads()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        batch = torch.randn(6, 4)
        with ChainSplitter(wrapped, parameters="modules") as chain:
            for _ in range(2):
                loss_of(wrapped, batch).backward()
        rows = {row.name: row.bounded for row in chain.rows()}
        assert rows["trunk.2->box"] == 2 and rows["trunk.2->cls"] == 0
        model.zero_grad()
        assert gradient_chain(wrapped, loss_of, batch).link("box").signal > 0
    finally:
        dist.destroy_process_group()


def test_a_gradient_splitter_with_many_bins_stands_in_for_module_limits(recwarn) -> None:
    torch.manual_seed(0)
    model, batch = TwoHeads(), torch.randn(6, 4)
    splitter = gs.GradientSplitter(model, plan="xsp", budget=gs.Fixed(0.01))
    with ChainSplitter(model, parameters=splitter) as chain:
        for _ in range(4):
            model.zero_grad()
            loss_of(model, batch).backward()
            splitter.step()
    assert not recwarn.list
    assert chain.worst(1)[0].name == "trunk.2->box"
    assert all(float(row.norm()) <= 0.01 * (1 + 1e-5) for p in model.parameters() if p.dim() == 2 for row in p.grad)
