"""A small model with every difficulty: sizes no number of ranks divides, a convolution, a tied weight, tiny tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """37, 11 and 3 rows; one layer used twice; for tensor parallelism a pair of 8-wide layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 11, 3, padding=1)
        self.wide = nn.Linear(11, 37)
        self.back = nn.Linear(37, 11)
        self.up = nn.Linear(11, 8)
        self.down = nn.Linear(8, 11)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).mean(-1)
        for _ in range(2):  # a tied use: one gradient from two places
            h = h + self.back(torch.tanh(self.wide(h)))
        h = h + self.down(torch.relu(self.up(h)))
        return self.head(h)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 2, 6, generator=generator, dtype=torch.float64)
    return x * 10 ** torch.randn((), generator=generator, dtype=torch.float64), torch.arange(8) % 3


def shard(net: Net, mode: str, world: int) -> nn.Module:
    """Distribute the model in one of the modes; every rank sees the same batch, so gradients equal one process's."""
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    if mode == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    elif mode == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    elif mode in ("tp", "fsdp+tp"):
        sizes = (world,) if mode == "tp" else (2, world // 2)
        names = ("tp",) if mode == "tp" else ("dp", "tp")
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if mode == "tp":
            return net
        mesh = mesh["dp"]
    else:
        raise ValueError(mode)
    for layer in (net.conv, net.wide, net.back):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def full(tensor: Any) -> Tensor:
    """The whole tensor on every rank."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by the names of the bare model."""
    return {name.replace("module.", ""): full(p) for name, p in model.named_parameters()}
