"""The tables of docs/faults.md and docs/security.md, from the raw results."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.events import FAULTS
from benchmarks.faults.grid import HEADLINE, SUDDEN
from benchmarks.faults.methods import METHODS
from benchmarks.faults.summary import SUMMARY, write_summary
from benchmarks.faults.workloads import WORKLOADS

__all__ = ["PAGES", "main", "with_tables"]

ROOT = Path(__file__).resolve().parents[2]
FUZZ = SUMMARY.with_name("fuzz.json")
MAIN = tuple(name for name in WORKLOADS if name != SUDDEN)

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
            [f"`{method}`", *(_spread(cell) for cell in found), str(max(lost)) if lost else "all from there on"]
        )
    return f"{_table(['method', *WORKLOADS, 'steps lost of 500'], rows)}\n\n{_source(raw)}"


def every_fault(workload: str) -> Callable[[dict[str, Any]], str]:
    """Every fault in 5 % of the steps of one workload, a column a method."""

    def render(raw: dict[str, Any]) -> str:
        cells = _cells(raw)
        names = [name for name in FAULTS if any((workload, method, name, 0.05) in cells for method in METHODS)]
        rows = [[name, *(_short(cells.get((workload, method, name, 0.05))) for method in METHODS)] for name in names]
        return f"{_table(['fault', *(f'`{method}`' for method in METHODS)], rows)}\n\n{_source(raw)}"

    return render


def rates(raw: dict[str, Any]) -> str:
    """The headline's fault at every rate, medians."""
    cells = _cells(raw)
    columns = [(workload, rate) for workload in MAIN for rate in (0.01, 0.05, 0.2)]
    rows = [
        [f"`{method}`", *(_short(cells.get((workload, method, HEADLINE, rate))) for workload, rate in columns)]
        for method in METHODS
    ]
    head = ["method", *(f"{workload} {rate:.0%}" for workload, rate in columns)]
    return f"{_table(head, rows)}\n\n{_source(raw)}"


def clean(raw: dict[str, Any]) -> str:
    """Final held-out loss without any fault, median over the seeds."""
    held = raw["clean_loss"]
    rows = [
        [f"`{m}`", *(f"{statistics.median(held[w][m]):.4g}" if m in held[w] else "–" for w in WORKLOADS)]
        for m in METHODS
    ]
    return f"{_table(['method', *WORKLOADS], rows)}\n\n{_source(raw)}"


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
    source = f"{at['hardware']}, one thread, {seconds / 60:.0f} minutes; {at['date']}; `python benchmarks/fuzz.py`."
    return f"{_table(['target', 'cases', 'answered', 'refused in our words', 'failures'], rows)}\n\n{source}"


PAGES: dict[str, dict[str, tuple[Callable[[dict[str, Any]], str], Path]]] = {
    "docs/faults.md": {
        "headline": (headline, SUMMARY),
        **{f"faults-{workload}": (every_fault(workload), SUMMARY) for workload in MAIN},
        "rates": (rates, SUMMARY),
        "clean": (clean, SUMMARY),
    },
    "docs/security.md": {"fuzzing": (fuzzing, FUZZ)},
}
"""Page -> name of a table -> what renders it, and the raw results."""


def with_tables(page: str, text: str) -> str:
    """The page with every table between its markers written anew."""
    for name, (render, path) in PAGES[page].items():
        body = render(json.loads(path.read_text(encoding="utf8")))
        table, _, source = body.partition("\n\n")
        made = f"{source}\n\n<!-- evidence: {path.relative_to(ROOT).as_posix()} -->\n\n{table}"
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
    return text


def main(arguments: list[str]) -> None:
    """Sum up the raw results and write the tables."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(arguments)
    write_summary()
    for page in PAGES:
        place = ROOT / page
        place.write_text(with_tables(page, place.read_text(encoding="utf8")), encoding="utf8")
        print(place)


def _spread(cell: dict[str, Any] | None) -> str:
    """Median and range of the change, or how many runs have died."""
    if cell is None:
        return "–"
    if cell["dead"]:
        return f"**{cell['dead']} of {cell['seeds']} dead**"
    changes = cell["change_percent"]
    return f"{_signed(statistics.median(changes))} % [{_signed(min(changes))} to {_signed(max(changes))}]"


def _short(cell: dict[str, Any] | None) -> str:
    """The median change, or how many runs have died, or were stopped by a guard."""
    if cell is None:
        return "–"
    if cell["dead"]:
        return "dead" if cell["dead"] == cell["seeds"] else f"{cell['dead']} of {cell['seeds']} dead"
    stopped = f", {cell['stopped']} of {cell['seeds']} stopped" if cell["stopped"] else ""
    return f"{_signed(statistics.median(cell['change_percent']))} %{stopped}"


def _signed(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}".replace("-0.00", "0.00")


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def _source(raw: dict[str, Any]) -> str:
    at = raw["conditions"]
    seeds = [cell["seeds"] for cell in raw["cells"]]
    days = " to ".join(dict.fromkeys((raw["first_run"][:10], raw["last_run"][:10])))
    return (
        f"{at['hardware']}, one thread a run, {days}, {min(seeds)} to "
        f"{max(seeds)} seeds a cell, {raw['num_runs']:,} runs in all; `{raw['command']}`."
    )
