"""The tables of docs/results/faults.md and docs/results/fuzzing.md, from the raw results."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.faults.events import FAULTS
from benchmarks.faults.grid import HEADLINE, LARGE, SUDDEN
from benchmarks.faults.methods import METHODS, WITH_HISTORY
from benchmarks.faults.rank_summary import RANKS_SUMMARY, write_rank_summary
from benchmarks.faults.rank_trial import PLACES, RANK_FAULTS, RANK_METHODS
from benchmarks.faults.summary import SUMMARY, write_summary
from benchmarks.faults.words import short, source, spread
from benchmarks.faults.workloads import WORKLOADS
from benchmarks.tables import filled, table

__all__ = ["PAGES", "main", "with_tables"]

ROOT = Path(__file__).resolve().parents[2]
FUZZ = SUMMARY.with_name("fuzz.json")
MAIN = tuple(name for name in WORKLOADS if name != SUDDEN)
USUAL = (0.05, 2)  # share of the steps, ranks
IN_SHORT = "in short"
"""The part of a page that is a paragraph and no table."""

Cells = dict[tuple[str, str, str, float], dict[str, Any]]


def _cells(raw: dict[str, Any]) -> Cells:
    return {(cell["workload"], cell["method"], cell["fault"], cell["rate"]): cell for cell in raw["cells"]}


def headline(raw: dict[str, Any]) -> str:
    """The headline, workload by workload: median and range over the seeds."""
    cells = _cells(raw)
    rows = []
    for method in METHODS:
        found = [cells.get((workload, method, HEADLINE, 0.05)) for workload in WORKLOADS]
        lost = [step for cell in found if cell and not cell["dead"] for step in cell["steps_lost"]]
        rows.append(
            [f"`{method}`", *(spread(cell) for cell in found), str(max(lost)) if lost else "all after the first fault"]
        )
    return f"{table(['method', *WORKLOADS, 'steps lost of 500'], rows)}\n{source(raw, fault=HEADLINE, rate=0.05)}"


def in_short(raw: dict[str, Any]) -> str:
    """What was asked and what came out, in one paragraph."""
    cells = _cells(raw)

    def medians(method: str, faults: Iterable[str]) -> list[float]:
        found = [cells[workload, method, fault, 0.05] for workload, fault in itertools.product(MAIN, faults)]
        return [statistics.median(cell["change_percent"]) for cell in found if cell["change_percent"]]

    skipped, split = medians("skip", [HEADLINE]), medians("splitter", [HEADLINE])
    dead = [m for m in METHODS if all(c["dead"] == c["seeds"] for w in MAIN for c in [cells[w, m, HEADLINE, 0.05]])]
    return (
        f"What does one bad value cost? {len(MAIN)} small tasks were trained with {len(FAULTS)} faults, each in 5 % of "
        f"the steps. With one NaN in one element every run with {' or '.join(f'`{name}`' for name in dead)} died. "
        f"Skipping the step cost {min(skipped):.1f} to {max(skipped):.1f} % of the final loss, and "
        f"`GradientSplitter` at most {max(split):.2f} % (medians). Not met: after huge finite values in a whole tensor "
        f"or batch the splitter ends up to {max(medians('splitter', LARGE)):.1f} % higher, where a global clip ends at "
        f"most {max(medians('clip 1', LARGE)):.1f} % higher. After flipped bits in the optimizer's state only `Guard` "
        "saves the detector. After a fault in one rank's copy of the gradient, no bound keeps the copies equal.\n"
    )


def every_fault(workload: str) -> Callable[[dict[str, Any]], str]:
    """Every fault in 5 % of the steps of one workload, a column a method."""

    def render(raw: dict[str, Any]) -> str:
        cells = _cells(raw)
        names = [name for name in FAULTS if any((workload, method, name, 0.05) in cells for method in METHODS)]
        rows = [[name, *(short(cells.get((workload, method, name, 0.05))) for method in METHODS)] for name in names]
        made = table(["fault", *(f"`{method}`" for method in METHODS)], rows)
        return f"{made}\n{source(raw, workload=workload, rate=0.05)}"

    return render


def rates(raw: dict[str, Any]) -> str:
    """The headline's fault at every rate, medians."""
    cells = _cells(raw)
    columns = [(workload, rate) for workload in MAIN for rate in (0.01, 0.05, 0.2)]
    rows = [
        [f"`{method}`", *(short(cells.get((workload, method, HEADLINE, rate))) for workload, rate in columns)]
        for method in METHODS
    ]
    head = ["method", *(f"{workload} {rate:.0%}" for workload, rate in columns)]
    return f"{table(head, rows)}\n{source(raw, fault=HEADLINE)}"


def large(raw: dict[str, Any]) -> str:
    """Large finite values, with and without a history beside the splitter's bounds: median and range."""
    cells = _cells(raw)
    methods = ("none", "clip 1", "splitter", *WITH_HISTORY)
    rows = [
        [workload, fault, *(spread(cells.get((workload, method, fault, 0.05))) for method in methods)]
        for workload, fault in itertools.product(MAIN, LARGE)
    ]
    return f"{table(['workload', 'fault', *(f'`{m}`' for m in methods)], rows)}\n{source(raw, fault=LARGE, rate=0.05)}"


def clean(raw: dict[str, Any]) -> str:
    """Final held-out loss without any fault, median over the seeds."""
    held = raw["clean_loss"]
    rows = [
        [f"`{m}`", *(f"{statistics.median(held[w][m]):.4g}" if m in held[w] else "–" for w in WORKLOADS)]
        for m in (*METHODS, *WITH_HISTORY)
    ]
    return f"{table(['method', *WORKLOADS], rows)}\n{source(raw, fault=HEADLINE)}"


def on_ranks(place: str) -> Callable[[dict[str, Any]], str]:
    """Every fault of one rank at one place: medians, and whether the ranks end with other weights than one another."""

    def render(raw: dict[str, Any]) -> str:
        held = {
            (cell["workload"], cell["fault"], cell["rate"], cell["ranks"], cell["method"]): cell
            for cell in raw["cells"]
            if cell["place"] == place
        }
        methods = [name for name in RANK_METHODS if any(key[-1] == name for key in held)]
        rows = []
        for workload, fault in itertools.product(MAIN, RANK_FAULTS):
            for rate, ranks in sorted({key[2:4] for key in held if key[:2] == (workload, fault)}, key=_usual):
                also = ("" if rate == USUAL[0] else f", {rate:.0%}") + ("" if ranks == USUAL[1] else f", {ranks} ranks")
                cells = (held.get((workload, fault, rate, ranks, method)) for method in methods)
                rows.append([workload, f"{fault}{also}", *(_on_ranks(cell) for cell in cells)])
        made = table(["workload", "fault", *(f"`{name}`" for name in methods)], rows)
        return f"{made}\n{source(raw, place=place)}"

    return render


def _usual(share: tuple[float, int]) -> tuple[bool, float, int]:
    return (share != USUAL, *share)


def _on_ranks(cell: dict[str, Any] | None) -> str:
    apart = max(cell["apart"], default=0.0) if cell is not None else 0.0
    return f"{short(cell)}, apart {apart:.0e}" if apart else short(cell)


def fuzzing(raw: dict[str, Any]) -> str:
    """Cases by target."""
    rows = [
        [f"`{name}`", *(f"{target[key]:,}" for key in ("cases", "answered", "refused")), str(len(target["failures"]))]
        for name, target in raw["targets"].items()
    ]
    total = raw["total"]
    rows.append(["all", *(f"{total[key]:,}" for key in ("cases", "answered", "refused")), str(total["failures"])])
    at = raw["conditions"]
    seconds = sum(target["seconds"] for target in raw["targets"].values())
    about = f"{at['hardware']}, one thread, {seconds / 60:.0f} minutes; {at['date']}; `python benchmarks/fuzz.py`."
    return f"{table(['target', 'cases', 'answered', 'refused in our words', 'failures'], rows)}\n{about}"


PAGES: dict[str, dict[str, tuple[Callable[[dict[str, Any]], str], Path]]] = {
    "docs/results/faults.md": {
        IN_SHORT: (in_short, SUMMARY),
        "headline": (headline, SUMMARY),
        **{f"faults-{workload}": (every_fault(workload), SUMMARY) for workload in MAIN},
        "rates": (rates, SUMMARY),
        "large": (large, SUMMARY),
        "clean": (clean, SUMMARY),
        **{f"ranks-{place}": (on_ranks(place), RANKS_SUMMARY) for place in PLACES},
    },
    "docs/results/fuzzing.md": {"fuzzing": (fuzzing, FUZZ)},
}
"""Page -> name of a table -> what renders it, and the raw results."""


def with_tables(page: str, text: str) -> str:
    """The page with every table that it has markers for written anew between them."""
    made = {}
    for name, (render, path) in PAGES[page].items():
        if f"<!-- table: {name} -->" in text:
            text_of = render(json.loads(path.read_text(encoding="utf8")))
            if name == IN_SHORT:
                made[name] = text_of
                continue
            rows, _, about = text_of.partition("\n\n")
            made[name] = f"{about}\n\n<!-- evidence: {path.relative_to(ROOT).as_posix()} -->\n\n{rows}"
    return filled(text, made)


def main(arguments: list[str]) -> None:
    """Sum up the raw results and write the tables."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(arguments)
    write_summary()
    write_rank_summary()
    for page in PAGES:
        place = ROOT / page
        place.write_text(with_tables(page, place.read_text(encoding="utf8")), encoding="utf8")
        print(place)
