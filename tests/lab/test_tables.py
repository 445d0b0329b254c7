"""A table loses no column and cuts no cell, however narrow the window is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gradsplit.cli.demo import scene_table
from gradsplit.lab.pages.tables import Columns, best_table, curve_table

RATES = (0.01, 0.03, 0.1, 0.3001, 0.3002, 1.0)


def _entry(method, *, ours, strength, worst_bin):
    spread = {"median": 0.8512, "min": 0.8311, "max": 0.8712, "n": 3, "lost": 0}
    return {
        "method": method, "ours": ours, "strength": strength, "lr": 0.0333333, "choosing": spread, "fresh": None,
        "diverged": 1, "steps_to_target": 512.0, "cpu_ms_a_step": 12.34, "state_per_weight": 2.1, "scaled_share": 0.338,
        "worst_bin": worst_bin,
        "curve": [{"lr": lr, "median": 0.5 + lr, "strength": strength} for lr in RATES],
    }  # fmt: skip


RESULTS = {
    "workload": {"metric": "accuracy", "higher_is_better": True},
    "grid": {"seeds": 3, "fresh_seeds": 0},
    "summary": [
        _entry("adamw+clip+warmup", ours=False, strength=0.1, worst_bin="all"),
        _entry("tree_sp[odd]", ours=True, strength=0.02, worst_bin="encoder.layers.11.self_attn.in_proj_weight[7]"),
    ],
}


def _printed(renderable, width):
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(renderable)
    return file.getvalue()


@pytest.mark.parametrize("width", [48, 60, 80, 120, 200])
def test_the_best_settings_keep_every_column(width):
    shown = _printed(best_table(RESULTS), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    headings = ("strength", "lr", "accuracy", "range", "to target", "ms/step", "memory", "scaled", "worst bin")
    tops = [line for line in shown.splitlines() if line.startswith(" method ")]
    for heading in headings:
        assert sum(heading in line for line in tops) == 1, shown
    for cell in ("0.0333", "0.851", "0.831 to 0.871, 1 lost", "512", "12.3", "2.1", "33.8 %", "all"):
        assert f" {cell} " in shown, cell
    lines = [line.split() for line in shown.splitlines()]
    assert sum(line[:1] == ["tree_sp[odd]"] for line in lines) == len(tops), "each part repeats the methods"
    ends = "".join(line[-1] for line in lines if line)
    assert "encoder.layers.11.self_attn.in_proj_weight[7]" in ends, "broken over lines, not cut"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_curve_keeps_every_rate(width):
    shown = _printed(curve_table(RESULTS), width)
    assert max(map(len, shown.splitlines())) <= width
    tops = " ".join(line for line in shown.splitlines() if line.startswith(" method ")).split()
    assert [one for one in tops if one != "method"] == ["0.01", "0.03", "0.1", "0.3001", "0.3002", "1"]
    assert shown.count("1.500") == 2


@pytest.mark.parametrize("width", [50, 80])
def test_the_table_of_the_demo_keeps_every_column(width):
    row = {"label": "SGD, global clip, tuned", "score": 0.3, "steps_to_target": None, "diverged": False, "ours": False,
           "ends_above_start": True, "steps_run": 400, "cpu_ms_a_step": 9.87, "state_per_weight": 1.0}  # fmt: skip
    scene = {"workload": "gpt", "metric": "val_loss", "steps": 400, "expect": "", "higher_is_better": False}
    shown = _printed(scene_table({**scene, "rows": [row]}), width)
    assert max(map(len, shown.splitlines())) <= width
    for cell in ("val_loss", "0.300", "to target", "never", "worse", "start", "ms/step", "9.9", "memory", "1.0"):
        assert cell in shown, shown


def test_columns_that_fit_stand_in_one_table():
    table = Columns("name", ["a"], {"one": ["1"], "two": ["22"]}, [True])
    assert _printed(table, 80).count("name") == 1
    assert _printed(table, 14).count("name") == 2


def test_the_page_of_a_comparison_shows_scores_before_words():
    from gradsplit.lab.pages.comparison import comparison_page

    entry = {**RESULTS["summary"][0], "summary": "AdamW, clip and warm-up", "runs": 3, "seconds": 1.0}
    about = {**RESULTS["workload"], "name": "plain-stack", "title": "a stack", "data_note": "Digits."}
    run = {"method": entry["method"], "strength": 0.1, "lr": entry["lr"], "losses": [2.0, 1.0], "steps_run": 2}
    curve = [{**point, "min": 0.5, "max": 2.0} for point in entry["curve"]]
    results = {**RESULTS, "workload": about, "conditions": {}, "cells": [run], "summary": [{**entry, "curve": curve}]}
    shown = comparison_page(results)
    shown = shown[shown.index("<table>") :]
    order = [shown.index(word) for word in ("adamw+clip+warmup", "0.851 [0.831", ">0.0333<", "33.8 %", "AdamW, clip")]
    assert shown.index("</table>") < order[-1], "words stand below the table"
    assert order == sorted(order), "a narrow screen shows the first columns"
