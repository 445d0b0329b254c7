"""Running functions on ranks of gloo, each a process, with a time limit.

Starting a process costs more than most tests, so the ranks of a world stay for the tests that follow; after an error
or a hang they are ended and made anew.
"""

from __future__ import annotations

import io
import os
import queue
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 150  # seconds; a hang is a failure, not a wait
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier")


class World:
    """The ranks of one world size."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.tasks = [context.Queue() for _ in range(size)]
        self.answers = context.Queue()
        self.ranks = [
            context.Process(target=_rank, args=(r, size, port, self.tasks[r], self.answers), daemon=True)
            for r in range(size)
        ]
        for rank in self.ranks:
            rank.start()

    def call(self, work: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((work, args))
        results: list[Any] = [None] * len(self.ranks)
        for _ in self.ranks:
            try:
                rank, error, value = self.answers.get(timeout=LIMIT)
            except queue.Empty:
                raise AssertionError(f"no answer within {LIMIT} s: a rank hangs") from None
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = torch.load(io.BytesIO(value))
        return results

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()


_WORLDS: dict[int, World] = {}


def on_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``work(rank, size, *args)`` on every rank and return what the ranks returned.

    Raises:
        AssertionError: a rank raised (its traceback is shown), or the time limit passed.
    """
    if size not in _WORLDS:
        _WORLDS[size] = World(size)
    try:
        return _WORLDS[size].call(work, args)
    except BaseException:
        _WORLDS.pop(size).end()
        raise


def _rank(rank: int, size: int, port: int, tasks: Any, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        while True:
            work, args = tasks.get()
            packed = io.BytesIO()  # tensors in a queue are shared memory, which ends with the rank
            torch.save(work(rank, size, *args), packed)
            answers.put((rank, None, packed.getvalue()))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))


@contextmanager
def counted(calls: list[str]) -> Iterator[None]:
    """Note the name of every collective that is called through `torch.distributed` inside the block."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, noting(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
