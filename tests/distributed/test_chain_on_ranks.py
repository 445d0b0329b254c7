"""A fork bounded and modules limited on several ranks: the weights of one process, by one all-reduce per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gradsplit.chain import ChainSplitter
from tests.chain.nets import TwoHeads
from tests.distributed.models import weights_of
from tests.distributed.ranks import counted, on_ranks

STEPS = 6


def make() -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads().double()


def shard(model: TwoHeads, mode: str, world: int) -> nn.Module:
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (world,))
    if mode == "tp":
        return parallelize_module(model, mesh, {"trunk.0": ColwiseParallel(), "trunk.2": RowwiseParallel()})
    for layer in (model.trunk, model.cls):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    norms, made = [], []
    chain = ChainSplitter(model, at="forks", total=0.1).attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        cls, box = model(x)
        (cls.square().mean() + 1e3 * box.square().mean()).backward()
        if step == 3:
            poisoned = next(p for name, p in model.named_parameters() if name.endswith("cls.0.weight")).grad
            local = poisoned.to_local() if hasattr(poisoned, "to_local") else poisoned
            local[:1] = float("nan")
        calls: list[str] = []
        with counted(calls):
            optimizer.step()
        made.append(len(calls))
        norms.append(chain.module_norms)
    chain.remove()
    return weights_of(model), norms, made


def work(rank: int, world: int) -> Any:
    return {mode: train(shard(make(), mode, world)) for mode in ("ddp", "fsdp", "tp")}


def test_modules_are_limited_as_in_one_process() -> None:
    true_weights, true_norms, _ = train(make())
    answers = on_ranks(2, work)
    for answer in answers:
        for mode, (weights, norms, made) in answer.items():
            # The set-up counts copies; afterwards there is one per step.
            assert made[1:] == [0 if mode == "ddp" else 1] * (STEPS - 1), mode
            for name, weight in true_weights.items():
                torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            for mine, first, true in zip(norms, answers[0][mode][1], true_norms, strict=True):
                torch.testing.assert_close(mine, first, rtol=0, atol=0, equal_nan=True)  # the same bits on every rank
                finite = true.isfinite()
                assert torch.equal(finite, mine.isfinite())
                torch.testing.assert_close(mine[finite].float(), true[finite].float(), rtol=1e-4, atol=1e-7)
