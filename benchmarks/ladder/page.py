"""Writes the tables of docs/results/ladder.md and diagnose.md from the raw results, so that they say nothing else."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import filled, table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/results/ladder.md"
PAGES = (PAGE, ROOT / "docs/results/diagnose.md")
RESULTS = ROOT / "benchmarks" / "results"
RECIPE_STEPS = (*range(1, 15), 20, 50, 54, 90, 119, 120, 200, 292)


def recipe(raw: dict[str, Any]) -> str:
    """Some steps of the recipe on the first bin, and the steps at which other arithmetic died on all bins."""
    rows = raw["rows_of_first_bin"]
    shown = table(rows[0], (map(str.strip, rows[step - 1].values()) for step in RECIPE_STEPS))
    died = [f"- `{name}`: {b['float32_dies_at']} and {b['float64_dies_at']}" for name, b in raw["bins"].items()]
    steps = "\n".join(died)
    known = [v for b in raw["bins"].values() for v in b["log10_true_derivative_of_said_order"] if v is not None]
    return (
        f"{shown}\nThe step after which float32 and float64 hold nothing but 0:\n\n{steps}\n\n"
        f"The true derivatives of the said orders stay between 10^{min(known):.0f} and 10^{max(known):.0f}."
    )


def safe_step(raw: dict[str, Any]) -> str:
    """One row per family of networks."""
    rows = [
        [
            row["family"],
            str(row["n"]),
            f"{100 * row['within']:.1f} %",
            f"{row['median_error']:.0e}",
            f"{row['worst_error']:.0e}",
            f"{100 * row['safe']:.1f} %",
        ]
        for row in raw["table"]
    ]
    head = ["network", "n", "within 1 %", "median error", "worst", "true loss at the safe step not above the start"]
    order = raw["order"]
    return f"{table(head, rows)}\n{_source(raw, f'Order {order}')}"


def cost(raw: dict[str, Any]) -> str:
    """Order by order: the ladder beside nested autograd."""
    ladder = {row["order"]: row for row in raw["ladder"]}
    nested = {row["order"]: row for row in raw["nested"]}
    rows = [
        [str(k), *(cell for found in (ladder.get(k), nested.get(k)) for cell in _cost_cells(found))]
        for k in sorted(ladder.keys() | nested.keys())
    ]
    head = ["order", "ladder: s of CPU", "s on the clock", "GB", "nested autograd: s of CPU", "s on the clock", "GB"]
    text = f"{table(head, rows)}\n{_source(raw, raw['model'])}"
    if nested:
        limits = raw["nested_limits"]
        worst = max(raw["relative_difference_to_nested"].values(), default=0.0)
        text += (
            f" Nested autograd got to order {max(nested)} within {limits['seconds']} s of CPU and {limits['gb']} GB; "
            f"the derivatives agree to {worst:.0e}."
        )
    return text


def jet(raw: dict[str, Any]) -> str:
    """jax.experimental.jet, order by order, and where each way of running it was stopped."""
    rows = []
    for row in raw["rows"]:
        ended = "stopped" in row
        cells = [row["stopped"], f"{row['seconds']:.1f}", ""] if ended else _cost_cells(row)
        difference = "" if ended else f"{max(row['relative_difference']):.0e}"
        rows.append([{"jit": "compiled"}.get(row["way"], row["way"]), str(row["order"]), *cells, difference])
    head = ["jet", "order", "s of CPU", "s on the clock", "GB", "largest difference to the ladder"]
    limits, dates = raw["limits"], sorted({row["date"] for row in raw["rows"]})
    asked = f"An order may take {limits['cpu_seconds']} s of CPU and {limits['gigabytes']:g} GB"
    cores = " and ".join(str(cores) for cores in sorted({row["cores"] for row in raw["rows"]}))
    how = f"JAX {raw['jax']}, {', '.join(dates)}, {cores} core(s), one run; compiling counts"
    return f"{table(head, rows)}\n{how}. {asked}."


def long_step(raw: dict[str, Any]) -> str:
    """The finding "long step" beside what ten steps do, and what it costs."""
    rows = []
    for row in raw["table"]:
        found, silent = row["found"], row["silent"]
        rows.append(
            [row["optimizer"], f"{row['rate']:g}", str(row["n"]), str(found["n"]), str(found["up"]), str(silent["up"])]
        )
    head = ["optimizer", "rate", "nets", "with a long step", "of these, loss up after ten steps", "of the others"]
    costs = "\n".join(f"- {name}: {before:.2g} and {after:.2g}" for name, (before, after) in raw["cpu_seconds"].items())
    spent = f"Seconds of CPU of `diagnose` with `optimizer=` alone and with `ladder=True`:\n\n{costs}"
    return f"{table(head, rows)}\n{spent}\n\n{_source(raw, 'Random data')}"


TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "recipe": (recipe, "python benchmarks/ladder.py recipe"),
    "safe-step-order-30": (safe_step, "python benchmarks/ladder.py safe-step"),
    "cost-1-threads": (cost, "python benchmarks/ladder.py cost --threads 1"),
    "cost-2-threads": (cost, "python benchmarks/ladder.py cost --threads 2"),
    "long-step": (long_step, "python benchmarks/ladder.py long-step"),
    "jet": (jet, "python benchmarks/ladder_jet.py weights.npz"),
}


def with_tables(text: str) -> str:
    """The page with every table between its markers written anew; a table without raw results says so."""
    made = {}
    for name, (render, command) in TABLES.items():
        path = RESULTS / f"ladder-{name}.json"
        made[name] = f"Not measured yet: `{command}`."
        if path.is_file():
            evidence = f"<!-- evidence: {path.relative_to(ROOT).as_posix()} -->"
            made[name] = f"{evidence}\n\n{render(json.loads(path.read_text(encoding='utf8')))}"
    return filled(text, made)


def main(arguments: list[str]) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf8")), encoding="utf8")
        print(page)


def _cost_cells(row: dict[str, Any] | None) -> list[str]:
    return [f"{row['cpu_seconds']:.1f}", f"{row['seconds']:.1f}", f"{row['peak_gb']:.1f}"] if row else ["", "", ""]


def _source(raw: dict[str, Any], what: str) -> str:
    at = raw["conditions"]
    hardware = at.get("hardware", "")
    return f"{what}. {hardware}, {raw['threads']} thread(s), one run, {at.get('date', '')}; `{raw['command']}`."
