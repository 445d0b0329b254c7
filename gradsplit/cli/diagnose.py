"""`gradsplit diagnose`: what is wrong with the gradient of a net, in words, worst first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gradsplit.cli.factory import problem_from

__all__ = ["run"]

DEMOS = {"deep-stack": "deep-stack", "detection": "detection", "recurrence": "temporal-order"}


def run(
    problem: Annotated[str, typer.Argument(help="module:factory that returns (model, loss_fn, batch).")] = "",
    demo: Annotated[str, typer.Option(help="deep-stack, detection or recurrence, in its place.")] = "",
    limit: Annotated[int, typer.Option(help="Findings shown at the most.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Write the findings to this JSON file.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the chain as a path to this HTML file.")] = None,
) -> None:
    """Factor the gradient layer by layer and say where it explodes, vanishes or breaks, and what to change.

    One forward and a few backward passes on one batch; nothing is trained.

    Example: gradsplit diagnose --demo deep-stack
    """
    if bool(problem) == bool(demo):
        raise ValueError("diagnose: expected either module:factory or --demo, got both or none. Try --demo detection.")
    if demo and demo not in DEMOS:
        raise ValueError(f"diagnose(--demo {demo}): expected one of {', '.join(DEMOS)}.")
    import gradsplit as gs

    model, loss_fn, batch = problem_from(DEMOS[demo] if demo else problem)
    diagnosis = gs.diagnose(model, loss_fn, batch)
    typer.echo(diagnosis.text(limit))
    if out is not None:
        out.write_text(json.dumps(diagnosis.to_dict(), indent=1) + "\n", encoding="utf8")
    if page is not None:
        from gradsplit.chain.figure import chain_figure

        figure = chain_figure(gs.gradient_chain(model, loss_fn, batch))
        page.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf8")
        typer.echo(f"the chain as a path: {page}")
