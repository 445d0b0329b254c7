"""Tables of a comparison for the terminal, from what `results.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["best_table", "curve_table", "number", "share", "verdict"]


def number(value: float | None, digits: int = 3) -> str:
    """A score in a table; what was not finite is a dash.

    >>> number(0.28512), number(None)
    ('0.285', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}"


def verdict(row: Mapping[str, Any]) -> str:
    """Whether a run was lost: not finite to the end, or finite and no better than untrained.

    >>> verdict({"diverged": False, "ends_above_start": True, "steps_run": 500})
    'worse than at start'
    """
    if row["diverged"]:
        return f"at step {row['steps_run']}"
    return "worse than at start" if row["ends_above_start"] else "no"


def share(value: float | None) -> str:
    """A share of bins in percent, "" where nothing counts them.

    >>> share(0.1234), share(0.0), share(0.00001)
    ('12.3 %', '0 %', '<0.1 %')
    """
    if value is None:
        return ""
    return "0 %" if value == 0 else "<0.1 %" if value < 0.001 else f"{100 * value:.1f} %"


def _range(scores: Mapping[str, Any], diverged: int) -> str:
    lost = f"{diverged} lost" if diverged else ""
    if scores["min"] is None or scores["min"] == scores["max"]:  # of one run the score itself stands beside it
        return lost
    return f"{number(scores['min'])} to {number(scores['max'])}" + (f", {lost}" if lost else "")


def best_table(results: Mapping[str, Any]) -> Group:
    """One line per method: its best cell and what came of it; a column that is empty for all methods is left out."""
    about, summary = results["workload"], results["summary"]
    way = "higher is better" if about["higher_is_better"] else "lower is better"
    fresh = any(entry["fresh"] for entry in summary)
    seeds = results["grid"]["fresh_seeds"] if fresh else results["grid"]["seeds"]
    kind = f"{seeds} fresh seed{'s' * (seeds > 1)}" if fresh else f"seeds that chose the cell: {seeds}"
    title = f"Best cell of each method: median {about['metric']} ({way}), {kind}"
    columns = {
        "strength": ["" if entry["strength"] is None else f"{entry['strength']:g}" for entry in summary],
        "lr": [f"{entry['lr']:.3g}" for entry in summary],
        about["metric"]: [number((entry["fresh"] or entry["choosing"])["median"]) for entry in summary],
        "range": [_range(entry["fresh"] or entry["choosing"], entry["diverged"]) for entry in summary],
        "to target": [_steps(entry["steps_to_target"]) for entry in summary],
        "ms/step": [number(entry.get("cpu_ms_a_step"), 1) for entry in summary],
        "state": [number(entry.get("state_per_weight"), 1) for entry in summary],
        "scaled": [share(entry["scaled_share"]) for entry in summary],
        "worst bin": [escape(entry["worst_bin"] or "") for entry in summary],
    }
    if not set(columns["worst bin"]) - {"", "all"}:  # a clip of the whole model has one bin
        columns.pop("worst bin")
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True, min_width=max(len(entry["method"]) for entry in summary))
    for heading, cells in shown.items():
        if heading == "worst bin":
            table.add_column(heading, overflow="fold", min_width=len(heading))
        else:
            width = max(map(len, (heading, *cells)))
            table.add_column(heading, justify="left" if heading == "range" else "right", no_wrap=True, min_width=width)
    for entry, *cells in zip(summary, *shown.values(), strict=True):
        table.add_row(entry["method"], *cells, style="bold" if entry["ours"] else None)
    legend = {
        "to target": f"steps until the training loss is where {results.get('target_method', 'clip')} ends",
        "ms/step": "processor time",
        "state": "bytes of the optimizer per byte of weights",
        "scaled": "share of bins",
    }
    caption = "; ".join(f"{heading}: {words}" for heading, words in legend.items() if heading in shown)
    return Group(Text(title, "bold"), table, Text(caption, "dim"))


def _steps(found: float | None) -> str:
    return "never" if found is None else f"{found:.0f}"


def curve_table(results: Mapping[str, Any]) -> Group:
    """One line per method, one column per learning rate: the median score of the best strength there."""
    summary = results["summary"]
    lrs = sorted({point["lr"] for entry in summary for point in entry["curve"]})
    title = f"Median {results['workload']['metric']} over the learning rate, best strength at each"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for lr in lrs:
        table.add_column(f"{lr:.3g}", justify="right", no_wrap=True)
    for entry in summary:
        at = {point["lr"]: point for point in entry["curve"]}
        cells = [number(at[lr]["median"]) if lr in at else "" for lr in lrs]
        table.add_row(entry["method"], *cells, style="bold" if entry["ours"] else None)
    return Group(Text(title, "bold"), table)
