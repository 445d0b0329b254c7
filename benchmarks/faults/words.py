"""How a cell reads in a table, and what stands above one."""

from __future__ import annotations

import statistics
from typing import Any

__all__ = ["short", "signed", "source", "spread"]


def spread(cell: dict[str, Any] | None) -> str:
    """Median and range of the change, or how many runs have died."""
    if cell is None:
        return "–"
    if cell["dead"]:
        return f"**{cell['dead']} of {cell['seeds']} dead**"
    changes = cell["change_percent"]
    return f"{signed(statistics.median(changes))} % [{signed(min(changes))} to {signed(max(changes))}]"


def short(cell: dict[str, Any] | None) -> str:
    """The median change, or how many runs have died, or were stopped by a guard."""
    if cell is None:
        return "–"
    if cell["dead"]:
        return "dead" if cell["dead"] == cell["seeds"] else f"{cell['dead']} of {cell['seeds']} dead"
    stopped = f", {cell['stopped']} of {cell['seeds']} stopped" if cell["stopped"] else ""
    return f"{signed(statistics.median(cell['change_percent']))} %{stopped}"


def signed(value: float) -> str:
    """A percentage with two digits, none from a hundred on."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}".replace("-0.00", "0.00")


def source(raw: dict[str, Any], **which: Any) -> str:
    """Hardware, days, seeds of the cells in question, runs of the whole campaign and the command.

    Args:
        raw: the sums.
        which: values, or tuples of values, of the cells' entries.
    """
    at = raw["conditions"]
    asked = {key: value if isinstance(value, tuple) else (value,) for key, value in which.items()}
    seeds = [cell["seeds"] for cell in raw["cells"] if all(cell[key] in value for key, value in asked.items())]
    days = " to ".join(dict.fromkeys((raw["first_run"][:10], raw["last_run"][:10])))
    span = " to ".join(str(number) for number in sorted({min(seeds), max(seeds)}))
    span += " seed" if span == "1" else " seeds"
    return (
        f"{at['hardware']}, one thread per run, {days}, {span} per cell, {raw['num_runs']:,} runs in all; "
        f"`{raw['command']}`."
    )
