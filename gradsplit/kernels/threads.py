"""Compiled loops over as many threads as torch uses: torch's own, or Python's where torch's cannot be had.

No pool of OpenMP threads of its own: a library's own fights torch's for the cores. torch's workers go on spinning for
milliseconds after torch's last loop, so on every core but the caller's another thread would have to wait for them; the
workers themselves go over to the next loop at once. Where torch has no GOMP_parallel to be found by name (macOS,
Windows), and in a forked child, which has no threads and would wait for them for ever, the loops run in Python threads
that release the GIL. Starting a worker costs some 40 microseconds there, so work below `SMALL` elements stays on the
caller's thread.
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

__all__ = ["SMALL", "entry_to_team", "run", "threads_for"]

SMALL = 1 << 18

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A compiled loop that shares out its chunks, see `sharing`, and its arguments after ``work``."""

_pools: dict[int, ThreadPoolExecutor] = {}  # by number of workers
_forked = False


def threads_for(num_elements: int) -> int:
    """Return how many threads to use: `torch.get_num_threads()`, or one where starting another would cost more."""
    return 1 if num_elements < SMALL else torch.get_num_threads()


@lru_cache
def entry_to_team() -> int:
    """Return the address of the function that torch's own loops enter its OpenMP threads by; 0 where it has none."""
    if not torch.backends.openmp.is_available():
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system without a list of all names
        return 0


def run(calls: Sequence[Call], threads: int) -> None:
    """Make every call with its chunks shared among threads; all has been done when this returns."""
    entry = entry_to_team() if threads > 1 and not _forked else 0
    together = [(loop, np.array([0, 0, threads, entry]), arguments) for loop, arguments in calls]

    def work() -> None:
        for loop, shared, arguments in together:
            loop(shared, *arguments)

    if threads <= 1 or entry:
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


def _leave_threads_behind() -> None:
    global _forked
    _forked = True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_threads_behind)
