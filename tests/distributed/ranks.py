"""Running a function on several ranks of gloo, each a process, with a time limit."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 150  # seconds; a hang is a failure, not a wait


def on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``work(rank, world, *args)`` on every rank and return what the ranks returned.

    Raises:
        AssertionError: a rank raised (its traceback is shown), or the time limit passed.
    """
    context = mp.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(r, world, port, answers, work, args)) for r in range(world)]
    for rank in ranks:
        rank.start()
    results: list[Any] = [None] * world
    try:
        for _ in range(world):
            rank_index, error, value = answers.get(timeout=LIMIT)
            assert error is None, f"rank {rank_index}:\n{error}"
            results[rank_index] = torch.load(io.BytesIO(value))
    finally:
        for rank in ranks:
            rank.join(timeout=5)
            if rank.is_alive():
                rank.kill()
    return results


def _rank(rank: int, world: int, port: int, answers: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        packed = io.BytesIO()  # tensors in a queue are shared memory, which ends with the rank
        torch.save(work(rank, world, *args), packed)
        answers.put((rank, None, packed.getvalue()))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
