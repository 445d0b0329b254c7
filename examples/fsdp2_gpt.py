"""A character GPT on the Python language reference, sharded by FSDP2, optimised by GSO.

    torchrun --nproc-per-node 2 examples/fsdp2_gpt.py --steps 200

Nothing in the script knows of gradsplit but the optimizer's line. On one process it runs unsharded: compare the losses.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradsplit as gs
from gradsplit.lab.registry import workload


def main() -> None:
    """Train, and print the loss from rank 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--lr", type=float, default=1e-2)
    steps, lr = vars(options.parse_args()).values()

    torch.set_num_threads(1)
    task = workload("gpt").build(seed=0)
    model = task.model
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    optimizer = gs.GSO(model, lr=lr, direction="adam")  # the same line on one process and on a thousand
    for step in range(steps):
        windows = [part.chunk(world)[rank] for part in task.batch(step)]  # each rank its share of the batch
        optimizer.zero_grad()
        loss = task.loss(model, tuple(windows))
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            mean = loss.detach()
            if world > 1:
                dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:4d}  loss {float(mean) / world:.4f}", flush=True)
    if world > 1:
        dist.barrier()  # nobody leaves while another still sends
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
