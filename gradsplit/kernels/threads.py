"""As many Python threads as torch uses, for compiled loops that release the GIL.

No OpenMP pool: one of a library's own dies after a fork and fights torch's for the cores. Starting a worker takes some
40 microseconds, so work below `SMALL` elements stays on the caller's thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["SMALL", "run", "threads_for"]

SMALL = 1 << 18

Call = tuple[Callable[..., Any], tuple[Any, ...]]

_pools: dict[int, ThreadPoolExecutor] = {}  # by number of workers; emptied in a forked child, which has no threads


def threads_for(num_elements: int) -> int:
    """Return how many threads to use: `torch.get_num_threads()`, or one where starting another would cost more."""
    return 1 if num_elements < SMALL else torch.get_num_threads()


def run(calls: Sequence[Call], threads: int) -> None:
    """Make every call in each of several threads; the calls share their work through counters among their arguments."""

    def work() -> None:
        for function, arguments in calls:
            function(*arguments)

    if threads <= 1:
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)
