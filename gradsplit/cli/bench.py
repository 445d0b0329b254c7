"""`gradsplit bench`: what a step costs here, against a global clip and a fused AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run"]


def run(
    layouts: Annotated[
        str, typer.Option(help="Which sets of tensors, separated by commas; all is every one.")
    ] = "gpt-23m,small-tensors",
    seconds: Annotated[float, typer.Option(help="How long to measure each figure.")] = 5.0,
    threads: Annotated[int, typer.Option(help="How many threads torch uses. 0 leaves them as they are.")] = 0,
    start: Annotated[bool, typer.Option(help="Also measure import, first call and memory.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the raw results to this JSON file.")] = None,
) -> None:
    """Time a step of gradsplit beside a global clip and a fused AdamW, and print each figure beside its aim.

    A figure is a ratio of two programs that take turns in one process, so it also holds on a busy machine.

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
