"""Tables of a comparison for the terminal, from what `results.json` holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["Columns", "best_table", "curve_table", "number", "share", "verdict"]


@dataclass(frozen=True)
class Columns:
    """A table that loses no column: what does not fit into the window's width stands in a further table below.

    Attributes:
        heading: of the first column, which every part repeats.
        names: the cells of the first column.
        cells: heading -> the column's cells.
        bold: by row.
        left: headings whose cells begin at the left; a number ends at the right.
        folded: headings whose cells may be broken over lines.
    """

    heading: str
    names: Sequence[str]
    cells: Mapping[str, Sequence[str]]
    bold: Sequence[bool]
    left: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield one table, or several of the first column and as many others as fit."""
        part: list[str] = []
        for heading in self.cells:
            if part and self._least_width([*part, heading]) > options.max_width:
                yield self._table(part)
                part = []
            part.append(heading)
        yield self._table(part)

    def _width(self, heading: str) -> int:
        whole = max(map(len, (heading, *self.cells[heading])))
        return min(whole, max(12, len(heading))) if heading in self.folded else whole

    def _least_width(self, headings: Sequence[str]) -> int:
        """The first column and these, with the space before, between and after them."""
        first = max(map(len, (self.heading, *self.names)))
        return 1 + first + sum(2 + self._width(heading) for heading in headings) + 1

    def _table(self, headings: Sequence[str]) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(self.heading, no_wrap=True)
        for heading in headings:
            folded = heading in self.folded
            table.add_column(
                heading,
                justify="left" if folded or heading in self.left else "right",
                no_wrap=not folded,
                overflow="fold" if folded else "ellipsis",
                min_width=self._width(heading),
            )
        for at, (name, bold) in enumerate(zip(self.names, self.bold, strict=True)):
            cells = (escape(self.cells[heading][at]) for heading in headings)
            table.add_row(escape(name), *cells, style="bold" if bold else None)
        return table


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
    """One line per method: its best setting and what came of it; a column that is empty for all methods is left out."""
    about, summary = results["workload"], results["summary"]
    way = "higher is better" if about["higher_is_better"] else "lower is better"
    fresh = any(entry["fresh"] for entry in summary)
    seeds = results["grid"]["fresh_seeds"] if fresh else results["grid"]["seeds"]
    kind = f"{seeds} fresh seed{'s' * (seeds > 1)}" if fresh else f"the {seeds} seed{'s' * (seeds > 1)} that chose it"
    title = f"Best setting of each method: median {about['metric']} ({way}) over {kind}"
    columns = {
        "strength": ["" if entry["strength"] is None else f"{entry['strength']:g}" for entry in summary],
        "lr": [f"{entry['lr']:.3g}" for entry in summary],
        about["metric"]: [number((entry["fresh"] or entry["choosing"])["median"]) for entry in summary],
        "range": [_range(entry["fresh"] or entry["choosing"], entry["diverged"]) for entry in summary],
        "to target": [_steps(entry["steps_to_target"]) for entry in summary],
        "ms/step": [number(entry.get("cpu_ms_a_step"), 1) for entry in summary],
        "memory": [number(entry.get("state_per_weight"), 1) for entry in summary],
        "scaled": [share(entry["scaled_share"]) for entry in summary],
        "worst bin": [entry["worst_bin"] or "" for entry in summary],
    }
    if not set(columns["worst bin"]) - {"", "all"}:  # a clip of the whole model has one bin
        columns.pop("worst bin")
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    names, ours = [entry["method"] for entry in summary], [entry["ours"] for entry in summary]
    table = Columns("method", names, shown, ours, left=("range",), folded=("worst bin",))
    legend = {
        "to target": f"steps until the training loss is where {results.get('target_method', 'clip')} ends",
        "ms/step": "processor time",
        "memory": "bytes of the optimizer per byte of weights",
        "scaled": "share of bins, over all steps",
        "worst bin": "the one that is scaled down most",
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
    curves = [{point["lr"]: number(point["median"]) for point in entry["curve"]} for entry in summary]
    digits = next((n for n in range(3, 17) if len({f"{lr:.{n}g}" for lr in lrs}) == len(lrs)), 17)
    cells = {f"{lr:.{digits}g}": [curve.get(lr, "") for curve in curves] for lr in lrs}
    names, ours = [entry["method"] for entry in summary], [entry["ours"] for entry in summary]
    return Group(Text(title, "bold"), Columns("method", names, cells, ours))
