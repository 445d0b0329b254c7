"""From rows of the raw file to cells: one a workload, method, fault and rate, losses against those of clean runs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.faults.grid import RAW, done
from benchmarks.faults.trial import CLEAN, Trial
from benchmarks.faults.workloads import WORKLOADS
from gradsplit.lab.evidence import conditions

__all__ = ["SUMMARY", "change_percent", "digits", "summarise", "write_summary"]

SUMMARY = RAW.with_name("faults.json")


def summarise(rows: dict[Trial, dict[str, str]]) -> dict[str, Any]:
    """Return clean losses, and cells whose "change_percent" compares each seed with the same seed's clean run.

    A run that died, and one whose clean run is missing, has no change; dead runs are counted.
    """
    by_cell: dict[tuple[str, str, str, float], list[Trial]] = defaultdict(list)
    clean: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial, row in sorted(rows.items(), key=lambda item: item[0].seed):
        if trial.fault == CLEAN:
            clean[trial.workload][trial.method].append(digits(float(row["final_loss"])))
        elif replace(trial, fault=CLEAN, rate=0.0) in rows:
            by_cell[trial.workload, trial.method, trial.fault, trial.rate].append(trial)
    cells = []
    for (workload, method, fault, rate), trials in by_cell.items():
        changes = [change_percent(rows[trial], rows[replace(trial, fault=CLEAN, rate=0.0)]) for trial in trials]
        cells.append(
            {
                "workload": workload,
                "method": method,
                "fault": fault,
                "rate": rate,
                "seeds": len(trials),
                "dead": sum(change is None for change in changes),
                "stopped": sum(rows[trial]["stopped"] == "1" for trial in trials),
                "change_percent": [change for change in changes if change is not None],
                "steps_lost": [int(rows[trial]["steps_lost"]) for trial in trials],
                "zeroed_percent": [
                    digits(100 * float(rows[trial]["zeroed_share"]))
                    for trial in trials
                    if rows[trial]["zeroed_share"] != "nan"
                ],
            }
        )
    dates = sorted(row["date"] for row in rows.values())
    return {
        "command": "python benchmarks/faults.py runs",
        "conditions": conditions(),
        "first_run": dates[0],
        "last_run": dates[-1],
        "num_runs": len(rows),
        "hours_of_one_core": round(sum(float(row["seconds"]) for row in rows.values()) / 3600, 2),
        "workloads": {name: row.about for name, row in WORKLOADS.items()},
        "clean_loss": clean,
        "cells": cells,
    }


def change_percent(row: dict[str, str], clean: dict[str, str]) -> float | None:
    """Percent by which the final loss is above the same seed's without faults; None where the run is dead.

    A run is dead if its weights or its loss are not finite, or if it ends worse than it began.
    """
    if row["dead"] == "1" or not float(row["final_loss"]) <= float(row["first_loss"]):
        return None
    return digits(100 * (float(row["final_loss"]) / float(clean["final_loss"]) - 1))


def digits(value: float) -> float:
    """Five significant digits, as plain JSON."""
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0


def write_summary(raw: Path = RAW, place: Path = SUMMARY) -> dict[str, Any]:
    """Sum up the raw file and keep the sums beside it."""
    made = summarise(done(raw))
    place.write_text(json.dumps(made, indent=1) + "\n", encoding="utf8")
    return made
