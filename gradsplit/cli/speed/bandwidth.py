"""What memory allows: bytes a second of reading, copying, adding and scaling, on as many bytes as a step moves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["bandwidth"]


def bandwidth(num_elements: int, *, rounds: int = 7) -> dict[str, float]:
    """Return bytes a second, medians over rounds taken in turn; every array read or written counts once.

    "copy" and "triad" (a = b + s c) write to an array they did not read, which costs most processors a hidden read;
    "scale" (a = s a) writes where it read, as an optimizer does.
    """
    a, b, c = (torch.ones(num_elements) for _ in range(3))
    programs: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (1, b.sum),
        "copy": (2, lambda: a.copy_(b)),
        "triad": (3, lambda: torch.add(b, c, alpha=0.5, out=a)),
        "scale": (2, lambda: b.mul_(1.0)),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, (_, program) in programs.items():
            start = time.perf_counter()
            program()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: 4 * num_elements * arrays / statistics.median(times[name]) for name, (arrays, _) in programs.items()}
