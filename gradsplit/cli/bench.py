"""`gradsplit bench`: what a step costs here, against a global clip and a fused AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .app import at_least, check_place, flag, option

__all__ = ["run"]


def run(
    layouts: Annotated[str, option("NAME,…", "Which sets of tensors; all is every one.")] = "gpt-23m,small-tensors",
    seconds: Annotated[float, option("SECONDS", "How long to measure each figure.")] = 5.0,
    threads: Annotated[int, option("COUNT", "How many threads torch uses.", default="as they are")] = 0,
    start: Annotated[bool, flag("--start", "Also measure import, first call and memory.")] = False,
    out: Annotated[Path | None, option("FILE", "Also write the raw results, as JSON.", default="none")] = None,
) -> None:
    """Time a step of gradsplit beside a global clip and a fused AdamW, and print each figure beside its aim.

    A figure is a ratio of two programs that take turns in one process, so it also holds on a busy machine.

    Example: gradsplit bench --layouts gpt-23m --seconds 5
    """
    at_least(0.1, seconds, "gradsplit bench --seconds")
    at_least(0, threads, "gradsplit bench --threads")
    check_place(out, "gradsplit bench --out")
    import torch

    from ..lab.speed.session import measure, show, write

    if threads:
        torch.set_num_threads(threads)
    figures = measure(layouts, seconds, start=start)
    show(figures)
    if out is not None:
        write(figures, out)
