"""`gradsplit watch`: a run while it goes on, in the terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import at_least, flag, option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..watch.record import RunFile, Series

__all__ = ["run", "view"]

_ROWS = 400  # of the recording that one picture looks back on
_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 40


def run(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A run file. Left out: the newest one here.")
    ] = None,
    seconds: Annotated[float, option("SECONDS", "How long to wait between two looks.")] = 1.0,
    once: Annotated[bool, flag("--once", "Look once, and end.")] = False,
    module: Annotated[str, option("NAME", "Show only what lies below a module, such as h.1.attn.", default="all")] = "",
    depth: Annotated[int, option("LEVELS", "How many levels of modules and tensors to show; 0: all.")] = 1,
) -> None:
    """Show a run in the terminal while it goes on: the loss, the rate, norms of modules and the last events.

    Example: gradsplit watch run.db
    """
    from rich.console import Console
    from rich.live import Live

    from ..watch.record import RunFile, RunFileError
    from .report import newest

    at_least(0.1, seconds, "gradsplit watch --seconds")
    file = newest() if file is None else file
    if depth < 0:
        raise ValueError(f"gradsplit watch --depth {depth}: expected 0 (all of them), 1, 2 and so on.")

    def look() -> tuple[RenderableType, bool]:
        try:
            with RunFile(file) as opened:
                return view(opened, module=module, depth=depth), "ended" in opened.meta
        except RunFileError as error:
            if once or not file.exists():
                raise ValueError(str(error)) from error
            return str(error), False

    picture, ended = look()
    if once:
        Console().print(picture)
        return
    with Live(picture, refresh_per_second=4) as live:
        while not ended:
            time.sleep(seconds)
            picture, ended = look()
            live.update(picture)


def view(opened: RunFile, *, module: str = "", depth: int = 1) -> RenderableType:
    """Return the picture of a run as it is now.

    Args:
        opened: the run file.
        module: show only what lies below it; empty: everything.
        depth: levels of modules and tensors; 0: all of them.

    Raises:
        ValueError: no optimizer's parameters lie below such a module.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..watch.report.text import printable

    parts: list[Any] = []
    for stream in opened.streams:
        series = opened.series(stream, last=_ROWS)
        table = Table(box=None, pad_edge=False)
        for heading, justify in (("module", "left"), ("norm", "right"), ("usual", "right"), ("course", "left")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        outline = stream.outline
        if module and module not in outline.names_N:
            continue
        top = outline.names_N.index(module) if module else 0
        for node in [top, *_below(outline, top, depth)[: None if module or depth != 1 else 20]]:
            table.add_row(*(Text(printable(cell)) for cell in _line(outline.names_N[node], series.node_peak(node))))
        if (series.loss_R == series.loss_R).any():
            table.add_row(*(Text(cell) for cell in _line("loss", series.loss_R, logarithmic=False)))
        parts += [Text(printable(_title(opened, series)), "bold"), table]
    if module and not parts:
        raise ValueError(
            f"gradsplit watch --module {module}: expected a recorded module or tensor, got another name. Leave it out, "
            "or add --depth 0, to see the names."
        )
    parts.append(Text("usual: the median of the last steps; course: their norms, on a logarithmic scale", "dim"))
    names = {stream.index: stream.outline.leaf_names for stream in opened.streams}
    events = [
        f"step {event.step}: {event.kind} {names[event.stream][event.leaf] if event.leaf is not None else 'step'}"
        for event in opened.events(last=6)
    ]
    parts.append(Text(printable("\n".join(["", "last events:", *(events or ["none"])]))))
    return Group(*parts)


def _below(outline: Any, top: int, depth: int) -> list[int]:
    """Nodes below a node, down to a depth; a chain of only children counts as one level."""
    nodes = outline.children(top)
    while len(nodes) == 1 and outline.children(nodes[0]):
        nodes = outline.children(nodes[0])
    found: list[int] = []
    level = 0
    while nodes and (not depth or level < depth):
        found += nodes
        nodes = [below for node in nodes for below in outline.children(node)]
        level += 1
    return sorted(found)


def _title(opened: RunFile, series: Series) -> str:
    span = float(series.time_R[-1] - series.time_R[0])
    rate = f", {(series.num_rows - 1) / span:.3g} steps/s" if span > 0 and series.num_rows > 1 else ""
    ended = " (ended)" if "ended" in opened.meta else ""
    lr = f", learning rate {series.lr_R[-1]:.3g}" if series.lr_R[-1] == series.lr_R[-1] else ""
    own = f", scaled by the script to {series.own_scale_R[-1]:.3g}" if series.own_scale_R[-1] < 1 else ""
    return f"{series.stream.optimizer} step {int(series.step_R[-1])}{ended}{rate}{lr}{own}"


def _line(name: str, values: Any, *, logarithmic: bool = True) -> tuple[str, str, str, str]:
    """Return name, last value, median and a row of bars; a cross where a value was not finite."""
    import numpy as np

    recent = np.asarray(values[-_WIDTH * 10 :], dtype=np.float64)
    pieces = np.array_split(recent, min(_WIDTH, len(recent)))
    with np.errstate(all="ignore"):
        levels = np.array([piece.max() if np.isfinite(piece).all() else np.nan for piece in pieces])
        shown = np.log10(levels) if logarithmic else levels
        finite = shown[np.isfinite(shown)]
        usual = float(np.median(recent[np.isfinite(recent)])) if np.isfinite(recent).any() else float("nan")
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    bars = "".join(
        _BARS[1 + int((value - low) / max(high - low, 1e-9) * (len(_BARS) - 2))] if np.isfinite(value) else
        ("×" if np.isnan(level) else " ")
        for value, level in zip(shown, levels, strict=True)
    )  # fmt: skip
    return name, f"{recent[-1]:.3g}", f"{usual:.3g}", bars
