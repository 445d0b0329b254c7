"""Where a step's time goes behind clip + fused AdamW: in the loops, in the decision, around them; beside it the memory.

    python benchmarks/speed_profile.py --out benchmarks/results/speed_profile.json

Each turn is the step, the baseline, and summing up one array of the parameters' size and scaling another in place, in
this order. "loops" is the time from handing the tables to the threads until all are done, "limit" what moving the
step's bytes would have taken at the bandwidth of these two in the same turn. On a virtual machine that bandwidth
changes twofold within minutes, so every turn is kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gradsplit as gs
from gradsplit.budget import Ledger
from gradsplit.kernels import numba_cpu
from gradsplit.lab.speed.figures import LAYOUTS, RATE, parameters_of
from gradsplit.lab.speed.session import conditions
from gradsplit.optim.updates import numba_cpu as fused_update

TWO_PASSES = {"bin": gs.Ema(1.5), "root": gs.Fixed(1e9)}
PROGRAMS: dict[str, tuple[int, int, Callable[[Any], Callable[[], object]]]] = {
    "splitter, nothing over its limit": (1, 0, lambda named: gs.GradientSplitter(named, budget=gs.Fixed(1e9)).step),
    "GSO per element": (0, 7, lambda named: gs.GSO(named, lr=RATE, direction="adam").step),
    "GSO per bin": (0, 5, lambda named: gs.GSO(named, lr=RATE, second_moment="bin", direction="adam").step),
    "GSO per element, two passes": (
        1,
        7,
        lambda named: gs.GSO(named, lr=RATE, budget=TWO_PASSES, direction="adam").step,
    ),
}
"""Name -> arrays that are only read, arrays that an update moves, and what makes the step."""


class Clock:
    """Adds up the time spent in functions."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Put a watch around an attribute."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = inner(*arguments, **options)
            self.taken[part] = self.taken.get(part, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, timed)


def profile(layout: str, turns: int, clock: Clock) -> list[dict[str, Any]]:
    """Return the turns of every program on one layout, in milliseconds."""
    named, _ = parameters_of(LAYOUTS[layout]())
    parameters = [p for _, p in named]
    adamw = torch.optim.AdamW(parameters, lr=RATE, fused=True)
    one, other = (torch.ones(sum(p.numel() for p in parameters)) for _ in range(2))
    rows = []
    for name, (reads, moved, make) in PROGRAMS.items():
        step, kept = make(named), []
        for turn in range(turns + 3):
            clock.taken.clear()
            start = time.perf_counter()
            step()
            ours = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(parameters, 1e9, foreach=True)
            if name.startswith("GSO"):
                adamw.step()
            theirs = time.perf_counter()
            one.sum()
            read = time.perf_counter()
            other.mul_(1.0)
            scaled = time.perf_counter()
            inside = {part: clock.taken.get(part, 0.0) for part in ("loops", "decision")}
            row = {"step": ours - start, **inside, "around": ours - start - sum(inside.values())}
            row |= {"baseline": theirs - ours, "limit": reads * (read - theirs) + moved / 2 * (scaled - read)}
            if turn >= 3:
                kept.append({part: 1e3 * seconds for part, seconds in row.items()})
        medians = {part: statistics.median(one[part] for one in kept) for part in kept[0]}
        medians["loops / limit"] = statistics.median(one["loops"] / one["limit"] for one in kept)
        print(layout, name, {part: round(value, 2) for part, value in medians.items()}, flush=True)
        rows.append({"layout": layout, "program": name, "medians": medians, "turns_ms": kept})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the raw results")
    parser.add_argument("--layouts", default="gpt-23m,gpt-124m,resnet-50")
    parser.add_argument("--turns", type=int, default=25)
    options = parser.parse_args()
    clock = Clock()
    clock.watch(fused_update, "run", "loops")
    clock.watch(numba_cpu, "run", "loops")
    clock.watch(Ledger, "decide", "decision")
    rows = [row for layout in options.layouts.split(",") for row in profile(layout, options.turns, clock)]
    if options.out is not None:
        options.out.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
