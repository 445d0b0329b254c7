"""The table in the documentation is the one in the raw results, and follows from the runs kept there."""

from __future__ import annotations

import json
import math
import statistics

from benchmarks.account import table
from benchmarks.sample_naming import summary
from benchmarks.sample_naming import table as naming_table
from tests.architecture.sources import ROOT


def _results():
    return json.loads((ROOT / "benchmarks" / "results" / "account.json").read_text(encoding="utf8"))


def test_the_page_shows_the_table_of_the_raw_results():
    results = _results()
    page = (ROOT / "docs/results/watching.md").read_text(encoding="utf8")
    assert "\n".join(results["table"]) in page
    assert results["about"]["date"] in page
    assert results["about"]["machine"] in page


def test_the_table_follows_from_the_runs():
    results = _results()
    runs = [{**run, "factor": math.nan} if run.get("factor") == "nan" else run for run in results["runs"]]
    assert table(runs).splitlines() == results["table"]
    injected = [run for run in runs if "tensor" in run]
    assert (len(injected), len(runs) - len(injected)) == (100, 40)
    assert sum(run["right"] for run in injected) >= 98
    assert all(run["right"] for run in runs if "tensor" not in run)


def test_the_cost_of_watching_is_the_one_measured():
    results = json.loads((ROOT / "benchmarks" / "results" / "run_overhead.json").read_text(encoding="utf8"))
    share, tiny = results["gpt"]["inside_share"], results["tiny"]["median_inside"] * 1e3
    page = (ROOT / "docs/results/watching.md").read_text(encoding="utf8")
    assert f"Watching costs {share:.1%} of a step's processor time" in page
    assert f"and {tiny:.2f} ms of a" in page
    assert share <= 0.02 and tiny <= 0.5


def test_the_cost_of_samples_is_the_one_measured():
    results = json.loads((ROOT / "benchmarks" / "results" / "run_samples.json").read_text(encoding="utf8"))
    page = (ROOT / "docs/results/watching.md").read_text(encoding="utf8")
    ways = ("alone", "watched", "samples")
    for net, digits in (("gpt", 0), ("tiny", 2)):
        alone, watched, samples = (f"{results[net][f'median_{way}'] * 1e3:.{digits}f}" for way in ways)
        assert f"{alone} ms alone, {watched} ms watched and {samples} ms with samples" in page
    ratio = statistics.median(a / b for a, b in zip(results["gpt"]["samples"], results["gpt"]["watched"], strict=True))
    assert f"{ratio - 1:.1%} more than the watched step before it" in page


def test_the_table_of_named_samples_follows_from_the_runs():
    results = json.loads((ROOT / "benchmarks" / "results" / "sample_naming.json").read_text(encoding="utf8"))
    page = (ROOT / "docs/results/watching.md").read_text(encoding="utf8")
    assert "\n".join(naming_table(results["runs"])) in page
    whole = summary([one for one in results["runs"] if one["planted"]])
    assert whole["precision"] >= 0.95 and whole["recall"] >= 0.95
