"""What `torch.compile` gives a step of the splitter and of GSO in eager torch, on the text GPT on a CPU.

    python benchmarks/compile_step.py            # writes benchmarks/results/compile_step.json; about two minutes

Processor time of one thread, the median of 40 steps after three; the first three hold the compilation.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import gradsplit as gs
from gradsplit.lab import evidence, workload

PLACE = Path(__file__).parent / "results" / "compile_step.json"
MAKE = {
    "GradientSplitter": lambda model: gs.GradientSplitter(model, budget=gs.Relative(0.2), backend="eager").step,
    "GSO": lambda model: gs.GSO(model, backend="eager").step,
}


def row(name: str, *, compiled: bool) -> dict[str, Any]:
    """Seconds of the first three steps, and milliseconds of the others."""
    task = workload("gpt").build(0)
    task.loss(task.model, task.batch(0)).backward()
    step = MAKE[name](task.model)
    step = torch.compile(step) if compiled else step
    began, times = time.perf_counter(), []
    for _ in range(3):
        step()
    first = time.perf_counter() - began
    for _ in range(40):
        began = time.process_time()
        step()
        times.append(1e3 * (time.process_time() - began))
    return {
        "what": name,
        "compiled": compiled,
        "first_three_s": first,
        "median_ms": statistics.median(times),
        "ms": times,
    }


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    rows = [row(name, compiled=compiled) for name in MAKE for compiled in (False, True)]
    for one in rows:
        how = "compiled" if one["compiled"] else "eager"
        print(f"{one['what']}, {how}: {one['median_ms']:.2f} ms, first three steps {one['first_three_s']:.1f} s")
    PLACE.write_text(json.dumps({**evidence.conditions(), "rows": rows}, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
