"""`gradsplit compare`: a grid of runs, its best cells, and the score over the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..lab.pages.tables import best_table, curve_table
from .app import option, page_if_possible
from .arguments import names, numbers, options

if TYPE_CHECKING:
    from ..lab.cells import Grid
    from ..lab.task import Workload

__all__ = ["run"]

_SGD_METHODS = "none,clip,zclip,xsp,xsp-fixed,per_tensor,lbf,tree_sp,default,gso"
_ADAM_METHODS = "none,clip,xsp,lbf,tree_sp,default,gso,adamw+clip+warmup,muon"


_TRAINED, _TUNED, _SHOWN = "What is trained", "What is compared", "Results"  # groups of options


def run(
    workload: Annotated[
        str, typer.Argument(metavar="WORKLOAD", help="What is trained: detection, gpt, lstm, residual-stack, …")
    ],
    methods: Annotated[
        str,
        option(
            "NAME,…", "Methods, for example clip,xsp,gso,adamw,muon,soap; all is every one.", _TUNED, "the usual ones"
        ),
    ] = "",
    strategies: Annotated[
        str, option("NAME,…", "Add every method that splits by these: xsp, per_tensor, lbf, tree_sp.", _TUNED, "none")
    ] = "",
    lr: Annotated[
        str,
        option(
            "RATE,…",
            "Learning rates for all methods; usual: the rate that each method brings.",
            _TUNED,
            "the workload's own, a third and three times of it",
        ),
    ] = "",
    strengths: Annotated[
        str, option("NUMBER,…", "Limits to try, in the unit of each method.", _TUNED, "seven that each method brings")
    ] = "",
    seeds: Annotated[int, option("COUNT", "How many seeds choose the best setting.", _TUNED)] = 3,
    fresh_seeds: Annotated[int, option("COUNT", "On how many other seeds each best setting runs again.", _TUNED)] = 0,
    steps: Annotated[int, option("STEPS", "How long a run is.", _TRAINED, "the workload's own")] = 0,
    optimizer: Annotated[
        str, option("NAME", "Of the methods that bring none: sgd, sgdm, adam or adamw.", _TRAINED, "the workload's own")
    ] = "",
    schedule: Annotated[
        str, option("NAME", "Of the rate: constant, cosine to 1 %, or linear to zero.", _TRAINED)
    ] = "constant",
    warmup: Annotated[
        int, option("STEPS", "Warm-up of the methods that warm up.", _TRAINED, "a tenth of the run")
    ] = -1,
    beta2: Annotated[
        float, option("NUMBER", "Adam's beta2, from 0 to 1, for all methods that have one.", _TRAINED)
    ] = 0.99,
    option: Annotated[
        list[str] | None,
        option("KEY=VALUE", "An option of the workload, for example batch=8. May be repeated.", _TRAINED),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "FOLDER",
            "For raw results and the page. Runs that it holds already are not run again.",
            _SHOWN,
            "runs/compare/WORKLOAD",
        ),
    ] = None,
    jobs: Annotated[int, option("PROCESSES", "Runs at a time, each in one thread; 0: in this process.", _SHOWN)] = 2,
) -> None:
    """Train one workload by several methods, at several learning rates and seeds, and keep the raw results.

    Example: gradsplit compare residual-stack --methods none,clip,gso --seeds 2
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
    runs, long = (
        f"{num_runs} run{'' if num_runs == 1 else 's'}",
        f"about {minutes:.0f}" if minutes >= 2 else "at most a few",
    )
    console.print(
        f"[bold]{grid.workload}[/]: {row.title}\n{runs} of {grid.settings.steps} steps, {max(jobs, 1)} at a time: "
        f"{long} minutes; raw results in {folder}"
    )
    with Progress(
        TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        shown = bar.add_task("starting", total=num_runs)

        def on_cell(cell: Any, result: dict[str, Any], done: int, total: int) -> None:
            bar.update(shown, description=f"{cell.method} lr {cell.lr:.3g}", completed=done, total=total)

        try:
            return compare(grid, folder, jobs=jobs, on_cell=on_cell)
        except KeyboardInterrupt:
            kept = f"finished runs are kept in {folder}, and the same command goes on from there"
            raise KeyboardInterrupt(kept) from None


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
