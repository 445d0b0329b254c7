"""`gradsplit plan`: what each strategy makes of a model, with counts and bytes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import at_least, option
from .arguments import layout_from

__all__ = ["run"]


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function here, without arguments, that returns a model; or the name of a workload of gradsplit "
            "compare.",
        ),
    ],
    strategy: Annotated[
        str, option("NAME", "The strategy whose tensors are listed: xsp (rows), per_tensor, tree_sp or whole.")
    ] = "xsp",
    lines: Annotated[int, option("COUNT", "How many tensors to list at most; 0: none.")] = 20,
) -> None:
    """Show how each strategy splits a model into bins, and how much memory that takes.

    Nothing is trained. Weights are not allocated where the function allows it.

    Example: gradsplit plan train:make_model --strategy xsp
    """
    from ..plan import STRATEGIES
    from ..plan.registry import strategy_named

    at_least(0, lines, "gradsplit plan --lines")
    strategy_named(strategy, call=f"gradsplit plan --strategy {strategy}")
    layout = layout_from(model, "gradsplit plan")
    console = Console(highlight=False, emoji=False)
    console.print(
        f"[bold]{escape(model)}[/]: {len(layout)} tensors, {layout.num_elements:,} elements, "
        f"{_bytes(4 * layout.num_elements)} in float32"
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for heading in ("bins", "nodes", "limits"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it does")
    plans: dict[str, Any] = {}
    for row in STRATEGIES.values():
        if row.needs_energy:
            table.add_row(row.name, "up to 256", "", _bytes(8 * 256), f"{row.summary}; needs a calibration")
            continue
        plan = plans[row.name] = row.make(layout)
        table.add_row(row.name, f"{plan.num_bins:,}", f"{plan.num_nodes:,}", _bytes(8 * plan.num_bins), row.summary)
    console.print(table)
    console.print(
        "Limits: the memory for one float64 per bin. For comparison, Adam's second moments take "
        f"{_bytes(4 * layout.num_elements)} in float32.\n"
    )
    if lines > 0:
        shown = plans.get(strategy)
        text = "needs a calibration: GradientSplitter.calibrate" if shown is None else shown.describe(max_lines=lines)
        console.print(f"[bold]{strategy}[/]: ", end="")
        console.print(text, markup=False, soft_wrap=True)


def _bytes(count: int) -> str:
    """Bytes in the largest unit that keeps at least one digit before the point.

    >>> _bytes(8), _bytes(4 * 10**6), _bytes(4 * 10**27)
    ('8 B', '4.0 MB', '4.0e+27 B')
    """
    if count >= 10**18:
        return f"{float(count):.1e} B"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
