"""What a decision costs: limits and projection at 100,000 bins, on one core."""

from __future__ import annotations

import statistics
import time

import torch

import gradsplit as gs
from gradsplit.budget import Ledger

from .figures import Figure

__all__ = ["decide_figure"]


def decide_figure(num_bins: int = 100_000, turns: int = 40) -> Figure:
    """Return the time of one decision by Ema with the bottom-up rule over a module tree."""
    shapes = {f"h.{i}.{name}.weight": (1_000, 4) for i in range(num_bins // 5_000) for name in "abcde"}
    plan = gs.tree_sp(gs.Layout.from_shapes(shapes), inner=gs.xsp)
    budgets = [("bin", gs.Ema(1.5, warmup=1)), ("module", gs.Fixed(30.0)), ("root", gs.Fixed(100.0))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ledger = Ledger(plan, budgets, torch.zeros(plan.num_bins, dtype=torch.float64))
        generator = torch.Generator().manual_seed(0)
        times = []
        for turn in range(turns + 5):
            squares = torch.rand(plan.num_bins, dtype=torch.float64, generator=generator)
            start = time.perf_counter()
            ledger.decide(squares)
            if turn >= 5:
                times.append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    name = "decide: Ema per bin, limits of modules and root, bottom-up, one core"
    detail = {"ms": times, "nodes": plan.num_nodes}
    return Figure(name, f"{plan.num_bins:,} bins", statistics.median(times), 10.0, "ms", detail)
