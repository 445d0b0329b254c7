"""`gradsplit bench`: what a step costs here, against a global clip and a fused AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run"]


def run(
    layouts: Annotated[str, typer.Option(help="Layouts, comma-separated; all: every one.")] = "gpt-23m,small-tensors",
    seconds: Annotated[float, typer.Option(help="Time for each figure.")] = 5.0,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0: as it is.")] = 0,
    start: Annotated[bool, typer.Option(help="Measure import, first call and memory too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the raw results to this JSON file.")] = None,
) -> None:
    """Time a step against a global clip and a fused AdamW, in turn, and print each figure beside its bar.

    Figures are ratios of programs that ran in turn in one process, so they hold on a machine that is busy; seconds do
    not.

    Example: gradsplit bench --layouts gpt-23m --seconds 5
    """
    import torch

    from ..lab.speed.session import measure, show, write

    if threads:
        torch.set_num_threads(threads)
    figures = measure(layouts, seconds, start=start)
    show(figures)
    if out is not None:
        write(figures, out)
