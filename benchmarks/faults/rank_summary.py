"""From rows of the ranks' raw file to cells, losses against those of clean runs on as many ranks."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.faults.rank_trial import STEPS, RankTrial
from benchmarks.faults.ranks import RANKS_RAW, done_on_ranks
from benchmarks.faults.summary import change_percent, digits
from benchmarks.faults.trial import CLEAN
from gradsplit.lab.evidence import conditions

__all__ = ["RANKS_SUMMARY", "summarise_ranks", "write_rank_summary"]

RANKS_SUMMARY = RANKS_RAW.with_suffix(".json")


def clean_of(trial: RankTrial) -> RankTrial:
    """The run without faults that a run is compared with; copies of the weights need but one."""
    place = "before" if trial.place == "after" else trial.place
    return replace(trial, place=place, fault=CLEAN, rate=0.0)


def summarise_ranks(rows: dict[RankTrial, dict[str, str]]) -> dict[str, Any]:
    """Return cells, one a trial but for its seed; a run without its clean run is left out.

    "apart": of every seed, the largest relative distance of a rank's weights from the first rank's at the end.
    """
    by_cell: dict[RankTrial, list[RankTrial]] = defaultdict(list)
    for trial in sorted(rows, key=lambda trial: trial.seed):
        if trial.fault != CLEAN and clean_of(trial) in rows:
            by_cell[replace(trial, seed=0)].append(trial)
    cells = []
    for cell, trials in by_cell.items():
        changes = [change_percent(rows[trial], rows[clean_of(trial)]) for trial in trials]
        about = {key: value for key, value in asdict(cell).items() if key != "seed"}
        cells.append(
            {
                **about,
                "seeds": len(trials),
                "dead": sum(change is None for change in changes),
                "stopped": sum(rows[trial]["stopped"] == "1" for trial in trials),
                "change_percent": [change for change in changes if change is not None],
                "steps_lost": [int(rows[trial]["steps_lost"]) for trial in trials],
                "apart": [
                    digits(float(rows[trial]["apart"]))
                    for trial, change in zip(trials, changes, strict=True)
                    if change is not None
                ],
            }
        )
    dates = sorted(row["date"] for row in rows.values())
    return {
        "command": "python benchmarks/faults.py ranks",
        "conditions": conditions(),
        "first_run": dates[0],
        "last_run": dates[-1],
        "num_runs": len(rows),
        "steps": STEPS,
        "cells": cells,
    }


def write_rank_summary(raw: Path = RANKS_RAW, place: Path = RANKS_SUMMARY) -> dict[str, Any]:
    """Sum up the raw file and keep the sums beside it."""
    made = summarise_ranks(done_on_ranks(raw))
    place.write_text(json.dumps(made, indent=1) + "\n", encoding="utf8")
    return made
