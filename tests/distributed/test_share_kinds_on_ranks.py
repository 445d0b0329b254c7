"""GSO by share on two ranks: every kind of tensor moves as in one process, however it is sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import gradsplit as gs
from tests.distributed.models import full
from tests.distributed.ranks import on_ranks
from tests.optim.share.zoo import give, zoo

STEPS = 4
MESHES = {"fsdp": (2,), "hsdp, 2 replicas": (2, 1), "hsdp, 2 shards": (1, 2)}


def distributed(model: nn.Module, mode: str) -> nn.Module:
    """Every parameter as a DTensor, sharded as FSDP2 shards it; it takes neither scalars nor complex numbers."""
    sizes = MESHES[mode]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("shard",) if len(sizes) == 1 else ("replicate", "shard"))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            last = Shard(0) if p.dim() else Replicate()
            placed = distribute_tensor(p.detach(), mesh, [*[Replicate()] * (mesh.ndim - 1), last])
            module.register_parameter(name, nn.Parameter(placed))
    model.tied.weight = model.words.weight
    return model


def give_all(model: nn.Module, plain: nn.Module, step: int) -> None:
    """Give every parameter the gradient of the plain model, sharded as it is."""
    give(plain, step, 300.0 if step == 2 else 1.0)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad is not None, name
        p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else q.grad


def train(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    optimizer, plain = gs.GSO(model, **options), zoo()
    optimizer.measures = True
    for step in range(STEPS):
        give_all(model, plain, step)
        optimizer.step()
    return {name: full(p) for name, p in model.named_parameters()} | {"cosines": optimizer.records[0].cosine_B}


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"fused": False},
    "columns": {"fused": False, "plan": lambda layout: gs.xsp(layout, axis=1)},
    "all Adam": {"fused": False, "direction": {"*": "adam"}},
}


def work(rank: int, world: int) -> dict[Any, Any]:
    return {
        (mode, variant): train(distributed(zoo(), mode), **VARIANTS[variant]) for mode in MESHES for variant in VARIANTS
    }


def test_every_kind_of_tensor_moves_as_in_one_process() -> None:
    alone = {variant: train(zoo(), **options) for variant, options in VARIANTS.items()}
    for answer in on_ranks(2, work):
        for (mode, variant), weights in answer.items():
            for name, weight in alone[variant].items():
                torch.testing.assert_close(
                    weights[name],
                    weight,
                    rtol=0,
                    atol=1e-9,
                    equal_nan=True,
                    msg=lambda m, key=(mode, variant), n=name: f"{key} {n}: {m}",
                )


class Routed(nn.Module):
    """Three experts on two ranks, and positions of which one rank holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 5, 4))
        self.experts = nn.Parameter(torch.randn(3, 7, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,eod->bteo", torch.tanh(x + self.positions), self.experts).tanh().sum((1, 2))


def train_routed(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    optimizer = gs.GSO(model, fused=False, **options)
    for step in range(STEPS):
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: full(p) for name, p in model.named_parameters()}


def routed() -> nn.Module:
    torch.manual_seed(0)
    return Routed().double()


def work_routed(rank: int, world: int) -> dict[Any, Any]:
    mesh = init_device_mesh("cpu", (world,))
    made = {inside: train_routed(fully_shard(routed(), mesh=mesh), in_backward=inside) for inside in (False, True)}
    return {**made, "refused": refusal(mesh)}


def refusal(mesh: Any) -> str:
    model = routed()
    model.experts = nn.Parameter(distribute_tensor(model.experts.detach(), mesh, [Shard(1)]))
    try:
        gs.GSO(model)
    except ValueError as error:
        return str(error)
    return ""


def test_fsdp2_with_experts_and_positions_makes_the_steps_of_one_process() -> None:
    alone = train_routed(routed())
    for answer in on_ranks(2, work_routed):
        for inside in (False, True):
            for name, weight in alone.items():
                torch.testing.assert_close(answer[inside][name], weight, rtol=0, atol=1e-9, msg=lambda m, n=name: n + m)


def test_experts_cut_inside_are_refused_by_name() -> None:
    for answer in on_ranks(2, work_routed):
        assert answer["refused"].startswith("shard_of('experts'): expected a shard that is a block of 21 rows, got")
        assert answer["refused"].endswith("of shape (3, 7, 4), which is seen as (21, 4). Shard dim 0 instead.")
