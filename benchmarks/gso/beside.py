"""The finished runs, which cell of a method is its best, and the tables that set the methods beside each other."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.gso.words import NAMES
from benchmarks.tables import with_range as shown

__all__ = ["DECAYS", "ENOUGH", "FRESH", "RESULTS", "SHARE", "Runs", "beside", "rates", "setting", "table"]

RESULTS = Path(__file__).parents[1] / "results" / "gso"
EVIDENCE = "benchmarks/results/gso/proof.json"
CHOOSING, FRESH, SHARE = 0, range(10, 100), 0.03
ENOUGH = 6
"""Fresh seeds with which a cell stands in a table though it was not chosen."""
DECAYS = (0.01, 0.3, 1.0)
"""Decays of GSO that were tried."""


Kind = Callable[[dict[str, Any]], bool]


class Runs:
    """The finished runs, and all numbers that a table has taken from them."""

    def __init__(self, path: Path = RESULTS / "runs.jsonl") -> None:
        self.rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
        self.cells: dict[str, dict[str, Any]] = {}
        self.derived: dict[str, float] = {}

    def find(self, task: str, steps: int, method: str, **wanted: Any) -> list[dict[str, Any]]:
        """The runs of a cell by seed; `options`, `method_options` and `fault` are empty unless they are given."""
        want = {"task": task, "steps": steps, "method": method, "schedule": "linear"}
        want |= {"options": {}, "fault": {}} | ({"method_options": {}} if method in ("gso", "reference") else {})
        want |= wanted
        found = {r["seed"]: r for r in self.rows if all(r[name] == value for name, value in want.items())}
        return [found[seed] for seed in sorted(found)]

    def scores(self, seeds: str, task: str, steps: int, method: str, **wanted: Any) -> list[float]:
        """Scores of "choosing", "fresh" or "all" seeds; kept as evidence."""
        rows = self.find(task, steps, method, **wanted)
        chosen = [r for r in rows if seeds == "all" or (r["seed"] == CHOOSING) == (seeds == "choosing")]
        chosen = [r for r in chosen if seeds != "fresh" or r["seed"] in FRESH]
        if chosen:
            name = chosen[0]["key"].rsplit(" seed=", 1)[0]
            kept = {"seeds": [r["seed"] for r in chosen], "scores": [r["score"] for r in chosen]}
            self.cells.setdefault(name, {})[seeds] = kept | {"lost": sum(r["diverged"] for r in chosen)}
        return [r["score"] for r in chosen]

    def cell_of(self, task: str, steps: int, method: str, more: bool, **wanted: Any) -> tuple[dict[str, Any], int]:
        """The best cell on the choosing seeds as settings, and how many cells were tried on them."""
        tried = self.tried(task, steps, method, **wanted)
        if not tried:
            return {}, 0
        best = (max if more else min)(tried, key=lambda rows: statistics.fmean(row["score"] for row in rows))
        return {"lr": best[0]["lr"], "method_options": best[0]["method_options"]}, len(tried)

    def tried(
        self, task: str, steps: int, method: str, kind: Kind = lambda options: True, **wanted: Any
    ) -> list[list[dict[str, Any]]]:
        """Each cell's runs on the choosing seeds: those below 10 on which all cells have run, among them 0.

        `kind` says of a cell's options whether it takes part.
        """
        cells: dict[str, dict[int, dict[str, Any]]] = {}
        for row in self.find_all(task, steps, method, **wanted):
            if row["seed"] < FRESH[0] and kind(row["method_options"]):
                cells.setdefault(row["key"].rsplit(" seed=", 1)[0], {})[row["seed"]] = row
        held = [cell for cell in cells.values() if CHOOSING in cell]
        seeds = sorted(set.intersection(*(set(cell) for cell in held))) if held else []
        return [[cell[seed] for seed in seeds] for cell in held]

    def find_all(self, task: str, steps: int, method: str, **wanted: Any) -> list[dict[str, Any]]:
        """The runs of all cells of a method."""
        want = {"task": task, "steps": steps, "method": method, "schedule": "linear", "options": {}, "fault": {}}
        want |= wanted
        return [r for r in self.rows if all(r[name] == value for name, value in want.items())]

    def ahead(
        self,
        task: str,
        steps: int,
        method: str,
        cell: dict[str, Any],
        mine: dict[str, Any],
        more: bool,
        **wanted: Any,
    ) -> str:
        """On how many of the shared fresh seeds GSO is better than a cell."""
        ours = {r["seed"]: r["score"] for r in self.find(task, steps, "gso", lr=SHARE, method_options=mine, **wanted)}
        theirs = {r["seed"]: r["score"] for r in self.find(task, steps, method, **cell, **wanted)}
        shared = [seed for seed in ours if seed in theirs and seed in FRESH]
        better = sum(ours[seed] > theirs[seed] if more else ours[seed] < theirs[seed] for seed in shared)
        return f"{better} of {len(shared)} seeds" if shared else ""

    def keep(self, name: str, value: float) -> float:
        """Keep a derived number as evidence."""
        if math.isfinite(value):
            self.derived[name] = value
        return value


def setting(method: str, found: dict[str, Any]) -> str:
    """A cell in words."""
    text = f"{'share' if method == 'gso' else 'rate'} {found['lr']:g}"
    names = {
        "weight_decay": "decay {:g}",
        "adam": "AdamW's {:g}",
        "clip": "clip {:g}",
        "decay": "decay {:g}",
        "wide": "clip in float64",
    }
    return ", ".join([text, *(names[name].format(value) for name, value in found["method_options"].items())])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table with its evidence."""
    return tables.table(head, rows, EVIDENCE) + "\n"


def beside(
    runs: Runs,
    title: str,
    task: str,
    steps: int,
    methods: list[str],
    more: bool = False,
    mine: dict[str, Any] | None = None,
    kind: Kind = lambda options: True,
    **wanted: Any,
) -> tuple[str, dict[str, list[float]]]:
    """The table of one task: each method at its best cell on fresh seeds, and at others that ran on enough of them.

    `mine` are options of GSO, `kind` says of a cell of the others whether it takes part.
    """
    ours = runs.scores("fresh", task, steps, "gso", lr=SHARE, method_options=mine or {}, **wanted)
    rows, all_scores = [], {"gso": ours}
    for method in methods:
        if method == "gso":
            name = "GSO" if mine else NAMES["gso"]
            tried = str(len(DECAYS)) if mine else "1"
            rows.append(
                [
                    name,
                    setting("gso", {"lr": SHARE, "method_options": mine or {}}),
                    tried,
                    shown(ours),
                    str(len(ours)),
                    "",
                    "",
                ]
            )
            continue
        tried = runs.tried(task, steps, method, kind=kind, **wanted)
        if not tried:
            continue
        cell, _ = runs.cell_of(task, steps, method, more, kind=kind, **wanted)
        cells = [{name: rows[0][name] for name in ("lr", "method_options")} for rows in tried]
        for one in [cell, *(other for other in cells if other != cell)]:
            fresh = runs.scores("fresh", task, steps, method, **one, **wanted)
            if one != cell and len(fresh) < ENOUGH:
                continue
            scores = fresh or runs.scores("choosing", task, steps, method, **one, **wanted)
            all_scores[method if one == cell else f"{method}, {one}"] = scores
            remark = at_edge(one, tried) if one == cell else " (not the chosen one)"
            by = compared(runs, f"{title}: GSO beside {method} {one}", ours, scores)
            ahead = runs.ahead(task, steps, method, one, mine or {}, more, **wanted)
            for name, value in ({"lr": one["lr"]} | one["method_options"]).items():
                runs.keep(f"{name} {value}", float(value))
            count = str(len(fresh)) if fresh else "seed 0"
            number = str(len(tried)) if one == cell else ""
            rows.append([NAMES[method], setting(method, one) + remark, number, shown(scores), count, by, ahead])
    heads = ["method", "setting", "cells tried", title, "fresh seeds", "GSO is", "GSO is ahead on"]
    return table(heads, rows), all_scores


def compared(runs: Runs, name: str, ours: list[float], theirs: list[float]) -> str:
    """By how much GSO's median is higher or lower."""
    if not ours:
        return ""
    gain = statistics.median(ours) / statistics.median(theirs) - 1
    size = runs.keep(name, abs(gain))
    return f"{100 * size:.1f} % {'higher' if gain > 0 else 'lower'}" if size >= 0.0005 else "level"


def at_edge(cell: dict[str, Any], tried: list[list[dict[str, Any]]]) -> str:
    """A remark where a cell has the largest or the smallest rate of those that differ in this rate alone."""

    def place(rows: list[dict[str, Any]], without: str) -> dict[str, Any]:
        return {"clip": 1.0, "lr": rows[0]["lr"]} | rows[0]["method_options"] | {without: None}

    own, words = {"lr": cell["lr"]} | cell["method_options"], []
    here = next(rows for rows in tried if {"lr": rows[0]["lr"]} | rows[0]["method_options"] == own)
    for name, title in (("lr", "rate"), ("adam", "rate for AdamW")):
        if name in own:
            near = [rows[0] for rows in tried if place(rows, name) == place(here, name)]
            values = {row["lr"] if name == "lr" else row["method_options"][name] for row in near}
            if len(values) > 1 and own[name] in (max(values), min(values)):
                words.append(f"the {'largest' if own[name] == max(values) else 'smallest'} {title}")
    if len(tried) == 1:
        words.append("no other cell")
    return f" ({', '.join(words)})" if words else ""


def rates(runs: Runs, task: str, steps: int, methods: list[str], **wanted: Any) -> str:
    """All cells on the choosing seeds, one line per method."""
    rows, both = [], False
    for method in methods:
        tried = runs.tried(task, steps, method, **wanted)
        tried.sort(key=lambda cell: (cell[0]["method_options"].get("adam", 0), cell[0]["lr"]))
        texts = []
        for cell in tried:
            kept = {"seeds": [row["seed"] for row in cell], "scores": [row["score"] for row in cell]}
            runs.cells.setdefault(cell[0]["key"].rsplit(" seed=", 1)[0], {})["choosing"] = kept
            both = both or len(cell) > 1
            scores = ", ".join(f"{row['score']:.3f}" for row in cell)
            texts.append(f"`{setting(method, cell[0]).removeprefix('rate ')}`: {scores}")
        if texts:
            rows.append([NAMES[method], "; ".join(texts)])
    head = "every cell, on seed 0 and on as many more as there are scores" if both else "seed 0, every cell"
    return table(["method", head], rows) if rows else ""
