"""The trials of the campaign in the order in which they are run, and the raw file they are appended to.

A run that is cut short is even over methods and workloads; started again, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.events import EXPONENT_BITS, FAULTS
from benchmarks.faults.methods import METHODS, WITH_HISTORY
from benchmarks.faults.trial import CLEAN, Trial, run
from benchmarks.faults.workloads import WORKLOADS
from gradsplit.lab.evidence import commit

__all__ = ["HEADLINE", "LARGE", "RATES", "RAW", "done", "trials"]

RAW = Path(__file__).resolve().parents[1] / "results" / "faults-runs.csv"
RATES = (0.05, 0.01, 0.2)
HEADLINE = "nan in one element"
HEADLINE_SEEDS = 5
SEEDS = 3
SUDDEN = "sudden"
LOW_BITS = tuple(f"gradient bit {bit} flips" for bit in EXPONENT_BITS if bit != EXPONENT_BITS[-1])
# Finite values that stay within some powers of ten of their size: the methods that look for more are not all run.
OF_LOW_BITS = ("none", "splitter")
BEHIND_ADAM = ("text", "recurrence")  # where large values cost the splitter most
LARGE = ("3e38 in one tensor", "batch x 1e3", "batch x 1e4", "batch x 1e5", "batch x 1e6")


def trials() -> Iterator[Trial]:
    """The headline with its clean runs over five seeds, every fault at 5 %, then at 20 % and 1 %, three seeds each.

    `WITH_HISTORY` is for large values only.
    """
    for seed in range(HEADLINE_SEEDS):
        for workload in WORKLOADS:
            for method in METHODS:
                yield Trial(workload, method, CLEAN, 0.0, seed)
                yield Trial(workload, method, HEADLINE, 0.05, seed)
    workloads = [name for name in WORKLOADS if name != SUDDEN]
    faults = [name for name in FAULTS if name not in LOW_BITS]
    yield from _large_values(BEHIND_ADAM)
    parts = ((0.05, faults), (0.2, [HEADLINE]), (0.01, [HEADLINE]), (0.05, LOW_BITS), (0.2, faults), (0.01, faults))
    for (rate, names), seed in itertools.product(parts, range(SEEDS)):
        for fault, workload, method in itertools.product(names, workloads, METHODS):
            if fault not in LOW_BITS or method in OF_LOW_BITS:
                yield Trial(workload, method, fault, rate, seed)
    yield from _large_values(workloads)


def _large_values(workloads: Sequence[str]) -> Iterator[Trial]:
    faults, methods = (CLEAN, HEADLINE, *LARGE), (*WITH_HISTORY, "splitter", "clip 1")
    for seed, fault, workload, method in itertools.product(range(SEEDS), faults, workloads, methods):
        yield Trial(workload, method, fault, 0.0 if fault == CLEAN else 0.05, seed)


def done(path: Path = RAW) -> dict[Trial, dict[str, str]]:
    """The rows of the raw file by their trial."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {Trial(r["workload"], r["method"], r["fault"], float(r["rate"]), int(r["seed"])): r for r in rows}


def main(arguments: list[str]) -> None:
    """Run what is missing; ctrl-C loses the run at hand only."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    known = [*METHODS, *WITH_HISTORY]
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--raw", type=Path, default=RAW, help="where the rows go")
    parser.add_argument("--most", type=int, default=None, help="runs, at most")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    held = set(done(asked.raw))
    missing = [trial for trial in dict.fromkeys(trials()) if trial not in held and trial.method in asked.methods]
    wanted = missing[: asked.most]
    print(f"{len(held)} runs done, {len(wanted)} to go")
    code = commit()
    for trial in wanted:
        append(run(trial) | {"commit": code}, asked.raw)


def append(row: dict[str, Any], path: Path) -> None:
    """Add one row, with the moment it was measured at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = row | {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")}
    fresh = not path.is_file()
    with path.open("a", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
