"""`gradsplit ladder`: derivatives of high order along each bin, and how far each may step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import at_least, check_place, option, page_if_possible, write_file
from .arguments import problem_from

__all__ = ["run"]


def run(
    problem: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function here, without arguments, that returns (model, loss_fn, batch); or the name of a workload "
            "of gradsplit compare.",
        ),
    ],
    order: Annotated[int, option("ORDER", "The highest order of the derivatives, from 2.")] = 10,
    strategy: Annotated[
        str, option("NAME", "What is one part: per_tensor, xsp (rows), tree_sp, or whole (all weights).")
    ] = "per_tensor",
    count: Annotated[int, option("COUNT", "How many parts to show at most, the smallest step first.")] = 20,
    page: Annotated[Path | None, option("FILE", "Also write the figure, as HTML.", default="none")] = None,
) -> None:
    """Show how far each part of a model may step along minus its gradient before the loss goes up.

    The answer comes from derivatives of high order. A step is a learning rate of plain gradient descent on that part
    alone.

    Example: gradsplit ladder temporal-order --order 10
    """
    at_least(1, count, "gradsplit ladder --count")
    check_place(page, "gradsplit ladder --page")
    from ..ladder import ladder_figure, ladder_of_model, ladder_table
    from ..plan import layout_of, make_plan
    from ..plan.registry import strategy_named

    strategy_named(strategy, call=f"gradsplit ladder --strategy {strategy}")
    model, loss_fn, batch = problem_from(problem, "gradsplit ladder")
    plan = make_plan(strategy, layout_of(model), call="gradsplit ladder")
    ladder = ladder_of_model(model, loss_fn, batch, bins=plan, order=order)
    typer.echo(ladder_table(ladder, count))
    if page is not None:
        with page_if_possible():
            from plotly.io import to_html

            write_file(page, to_html(ladder_figure(ladder), include_plotlyjs=True, full_html=True))
            typer.echo(f"the figure: {page}")
