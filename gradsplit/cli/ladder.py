"""`gradsplit ladder`: derivatives of high order along each bin, and how far each may step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import problem_from

__all__ = ["run"]


def run(
    problem: Annotated[str, typer.Argument(help="A workload, or module:factory for (model, loss_fn, batch).")],
    order: Annotated[int, typer.Option(help="Highest order of the derivatives.")] = 10,
    strategy: Annotated[str, typer.Option(help="Bins: per_tensor, xsp, …; whole: all weights as one.")] = "per_tensor",
    count: Annotated[int, typer.Option(help="Bins shown at the most, smallest step first.")] = 20,
    page: Annotated[Path | None, typer.Option(help="Write the figure to this HTML file.")] = None,
) -> None:
    """Show, per bin, the derivatives along minus its gradient, the radius of the series and the step it foretells.

    Steps are learning rates of plain gradient descent on that bin alone.

    Example: gradsplit ladder temporal-order --order 10
    """
    from ..ladder import ladder_figure, ladder_of_model, ladder_table
    from ..plan import layout_of, make_plan

    model, loss_fn, batch = problem_from(problem)
    plan = make_plan(strategy, layout_of(model), call="ladder")
    ladder = ladder_of_model(model, loss_fn, batch, bins=plan, order=order)
    typer.echo(ladder_table(ladder, count))
    if page is not None:
        from plotly.io import to_html

        page.write_text(to_html(ladder_figure(ladder), include_plotlyjs=True, full_html=True), encoding="utf8")
        typer.echo(f"the figure: {page}")
