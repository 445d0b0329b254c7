"""Compiled loops over as many threads as torch uses: torch's own, or Python's where torch's cannot be entered.

A pool of further OpenMP threads would fight torch's for the cores. The workers of torch spin for milliseconds after
torch's last loop, so any other thread would have to wait for them on every core but the caller's; the workers
themselves go over to the next loop at once.

The loops run in Python threads, which release the GIL, in two cases. One is a torch whose GOMP_parallel cannot be found
by name (macOS, Windows). The other is a forked child: it has no threads and would wait for them for ever. Starting a
Python worker costs some 40 microseconds, so work below `SMALL` elements stays on the caller's thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

__all__ = ["BEGUN", "NEXT", "SMALL", "TEAM", "THREADS", "entry_to_team", "run", "threads_for"]

SMALL = 1 << 18
"""Elements below which starting a thread costs more than it saves."""

NEXT, BEGUN, THREADS, TEAM = range(4)
"""What the threads of one loop share in ``work``: the next chunk, the number of threads that have begun, the number of
threads to use, and the address of GOMP_parallel or 0."""

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A compiled loop that shares out its chunks, as those of `numba_loops` do, and its arguments after ``work``."""

_pools: dict[int, ThreadPoolExecutor] = {}  # by number of workers
_forked = False


def threads_for(num_elements: int) -> int:
    """Return how many threads to use: `torch.get_num_threads()`, or one where starting another would cost more."""
    return 1 if num_elements < SMALL else torch.get_num_threads()


@lru_cache
def entry_to_team() -> int:
    """Return the address of the function by which torch's own loops enter its OpenMP threads; 0 if there is none."""
    if not torch.backends.openmp.is_available():
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system without a list of all names
        return 0


def run(calls: Sequence[Call], threads: int) -> None:
    """Make every call, with its chunks shared among threads; return when all of them are done.

    Args:
        calls: loops with their arguments.
        threads: how many threads take part, >= 1.
    """
    team = entry_to_team() if threads > 1 and not _forked else 0
    together = [(loop, _work(threads, team), arguments) for loop, arguments in calls]

    def work() -> None:
        for loop, shared, arguments in together:
            loop(shared, *arguments)

    if threads <= 1 or team:
        return work()
    try:
        pool = _pools.get(threads - 1) or _pools.setdefault(threads - 1, ThreadPoolExecutor(threads - 1, "gradsplit"))
        others = [pool.submit(work) for _ in range(threads - 1)]
    except RuntimeError:  # the interpreter is shutting down: no new threads
        return work()
    work()
    for other in others:
        if not other.cancel():  # one that has not begun would find nothing left to do
            other.result()
    return None


def _work(threads: int, team: int) -> np.ndarray:
    work = np.zeros(4, dtype=np.int64)
    work[THREADS], work[TEAM] = threads, team
    return work


def _leave_threads_behind() -> None:
    global _forked
    _forked = True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_threads_behind)
