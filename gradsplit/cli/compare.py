"""`gradsplit compare`: a grid of runs, its best cells, and the score over the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..lab.pages.tables import best_table, curve_table
from .app import page_if_possible
from .arguments import names, numbers, options

if TYPE_CHECKING:
    from ..lab.cells import Grid
    from ..lab.task import Workload

__all__ = ["run"]

_SGD_METHODS = "none,clip,zclip,xsp,xsp-fixed,per_tensor,lbf,tree_sp,default,gso"
_ADAM_METHODS = "none,clip,xsp,lbf,tree_sp,default,gso,adamw+clip+warmup,muon"


def run(
    workload: Annotated[str, typer.Argument(help="What is trained: detection, gpt, lstm, residual-stack, …")],
    methods: Annotated[
        str,
        typer.Option(
            help="Methods with commas: clip,xsp,gso,adamw,muon,soap, … Left out: the usual ones. 'all': every."
        ),
    ] = "",
    strategies: Annotated[str, typer.Option(help="Also every method that splits by these: xsp,per_tensor,lbf,…")] = "",
    lr: Annotated[
        str,
        typer.Option(help="Learning rates for all methods, with commas. 'usual': those that a method brings itself."),
    ] = "",
    strengths: Annotated[
        str, typer.Option(help="Limits to try, in place of the seven that a method brings itself.")
    ] = "",
    seeds: Annotated[int, typer.Option(help="How many seeds choose the best setting.")] = 3,
    fresh_seeds: Annotated[int, typer.Option(help="On how many other seeds each best setting runs again.")] = 0,
    steps: Annotated[int, typer.Option(help="How many training steps. 0 is the workload's usual number.")] = 0,
    optimizer: Annotated[str, typer.Option(help="sgd, sgdm, adam or adamw. Left out: the workload's own.")] = "",
    schedule: Annotated[str, typer.Option(help="constant, cosine to 1 %, or linear to zero.")] = "constant",
    warmup: Annotated[int, typer.Option(help="Warm-up steps of the methods that warm up. -1: a tenth of all.")] = -1,
    beta2: Annotated[float, typer.Option(help="The memory of Adam's second moment, for all methods.")] = 0.99,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the workload. May be repeated.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for raw results and page. If it holds a part of them, the rest is run.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="How many processes, of one thread each. 0 runs in this one.")] = 2,
) -> None:
    """Train one workload by several methods, at several learning rates and seeds, and keep the raw results.

    Example: gradsplit compare residual-stack --methods none,clip,xsp,default --lr 0.03,0.1,0.3 --seeds 2
    """
    from ..lab import workload as workload_named
    from ..lab.cells import Grid, methods_of_strategies
    from ..lab.methods import METHODS
    from ..lab.optimizers import Settings

    row = workload_named(workload)
    used = optimizer or row.optimizer
    own = "usual" in names(lr)
    rates = numbers(",".join(word for word in names(lr) if word != "usual"), "--lr")
    chosen = tuple(METHODS) if methods == "all" else names(methods)
    if strategies:
        chosen += tuple(name for name in _of(strategies, methods_of_strategies) if name not in chosen)
    if not chosen:
        chosen = names(_ADAM_METHODS if used in ("adam", "adamw") else _SGD_METHODS)
    grid = Grid(
        workload=workload,
        methods=chosen,
        lrs=rates or (() if own else (row.lr / 3, row.lr, row.lr * 3)),
        usual_lrs=own,
        settings=Settings(
            steps or row.steps, used, schedule=schedule, warmup=None if warmup < 0 else warmup, beta2=beta2
        ),
        seeds=seeds,
        fresh_seeds=fresh_seeds,
        strengths=numbers(strengths, "--strengths") or None,
        options=options(option or []),
    )
    folder, console = out or Path("runs") / "compare" / workload, Console(highlight=False)
    results = _train(grid, row, folder, jobs, console)
    console.print(best_table(results))
    console.print(curve_table(results))
    for path in write_pages(results, folder):
        console.print(f"wrote {path}", soft_wrap=True)
    if results["failed"]:
        _name_failures(results["failed"])
        raise typer.Exit(1)


def _train(grid: Grid, row: Workload, folder: Path, jobs: int, console: Console) -> dict[str, Any]:
    """Run all cells under a bar, after a line on how many they are and how long they take."""
    from ..lab.compare import compare

    num_runs = len(list(grid.cells())) + len(grid.methods) * grid.fresh_seeds
    minutes = num_runs * row.expected.seconds * grid.settings.steps / row.steps / max(jobs, 1) / 60
    runs, long = f"{num_runs} run{'' if num_runs == 1 else 's'}", f"about {minutes:.0f}" if minutes >= 2 else "some"
    console.print(
        f"[bold]{grid.workload}[/]: {row.title}\n{runs} of {grid.settings.steps} steps, {max(jobs, 1)} at a time: "
        f"{long} minutes; raw results in {folder}"
    )
    with Progress(
        TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console,
    ) as bar:  # fmt: skip
        shown = bar.add_task("starting", total=num_runs)

        def on_cell(cell: Any, result: dict[str, Any], done: int, total: int) -> None:
            bar.update(shown, description=f"{cell.method} lr {cell.lr:.3g}", completed=done, total=total)

        return compare(grid, folder, jobs=jobs, on_cell=on_cell)


def _name_failures(failed: list[dict[str, Any]]) -> None:
    """One line per method and reason, with the number of runs that did not end for it."""
    reasons: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in failed:
        reasons.setdefault((run["method"], run["why"]), []).append(run)
    for (method, why), runs in reasons.items():
        first = f"first at lr {runs[0]['lr']:g}, seed {runs[0]['seed']}"
        typer.secho(f"left out: {len(runs)} runs of {method} ({first}): {why}", fg="red", err=True)


def _of(strategies: str, methods_of: Any) -> tuple[str, ...]:
    from ..plan import STRATEGIES

    wanted = names(strategies)
    unknown = [name for name in wanted if name not in STRATEGIES]
    if unknown:
        raise ValueError(f"--strategies {strategies}: expected some of {', '.join(STRATEGIES)}, got {unknown[0]!r}.")
    made: tuple[str, ...] = methods_of(wanted)
    return made


def write_pages(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the picture of the curve and, where plotly is installed, the page; return all paths of the folder."""
    from ..lab.pages.rate_curve import rate_curve_svg
    from ..lab.sweep import write_whole

    picture = folder / "learning-rate.svg"
    write_whole(picture, rate_curve_svg(results))
    paths = [folder / "cells.csv", folder / "results.json", picture]
    with page_if_possible():
        from ..lab.pages.comparison import comparison_page

        paths.append(folder / "compare.html")
        write_whole(paths[-1], comparison_page(results))
    return paths
