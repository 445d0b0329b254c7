"""One measuring session: all figures, printed with their verdicts, written with hardware and versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import gradsplit as gs

from ...budget import Ledger
from .figures import LAYOUTS, Figure, step_figures
from .start import start_figures

__all__ = ["decide_figure", "conditions", "measure", "show", "write"]


def decide_figure(num_bins: int = 100_000, turns: int = 40) -> Figure:
    """Return the time of one decision by Ema with the bottom-up rule over a module tree."""
    shapes = {f"h.{i}.{name}.weight": (1_000, 4) for i in range(num_bins // 5_000) for name in "abcde"}
    plan = gs.tree_sp(gs.Layout.from_shapes(shapes), inner=gs.xsp)
    budgets = [("bin", gs.Ema(1.5, warmup=1)), ("module", gs.Fixed(30.0)), ("root", gs.Fixed(100.0))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ledger = Ledger(plan, budgets, torch.zeros(plan.num_bins, dtype=torch.float64))
        generator = torch.Generator().manual_seed(0)
        times = []
        for turn in range(turns + 5):
            squares = torch.rand(plan.num_bins, dtype=torch.float64, generator=generator)
            start = time.perf_counter()
            ledger.decide(squares)
            if turn >= 5:
                times.append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    name = "decide: Ema per bin, limits of modules and root, bottom-up, one core"
    detail = {"ms": times, "nodes": plan.num_nodes}
    return Figure(name, f"{plan.num_bins:,} bins", statistics.median(times), 10.0, "ms", detail)


def measure(layouts: str, seconds: float, *, start: bool) -> list[Figure]:
    """Measure layouts by name, a decision, and on request what is paid once; a line to standard error after each.

    Raises:
        ValueError: an unknown layout.
    """
    names = list(LAYOUTS) if layouts == "all" else [name.strip() for name in layouts.split(",") if name.strip()]
    for name in names:
        if name not in LAYOUTS:
            raise ValueError(f"bench(layouts={name!r}): expected 'all' or names among {', '.join(LAYOUTS)}.")
    figures: list[Figure] = []

    def keep(more: Iterable[Figure]) -> None:
        for figure in more:
            print(f"{figure.value:8.3f} {figure.name} [{figure.layout}]", file=sys.stderr, flush=True)
            figures.append(figure)

    for name in names:
        keep(step_figures(name, seconds))
    keep([decide_figure()])
    if start:
        keep(start_figures())
    return figures


def show(figures: list[Figure]) -> None:
    """Print each figure beside its bar."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("figure", "layout"):
        table.add_column(heading)
    for heading in ("measured", "quartiles", "bar", "", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        low_high = figure.detail.get("ratio_quartiles")
        table.add_row(
            figure.name,
            figure.layout,
            f"{figure.value:.3g}" + ("" if figure.unit == "ratio" else f" {figure.unit}"),
            "" if low_high is None else f"{low_high[0]:.3g} – {low_high[1]:.3g}",
            "" if figure.bar is None else f"{figure.bar:g}",
            figure.verdict,
            str(figure.detail.get("turns", "")),
        )
    Console(highlight=False).print(table)
    held = [figure for figure in figures if figure.bar is not None]
    print(f"{sum(figure.verdict == 'met' for figure in held)} of {len(held)} bars met")


def conditions() -> dict[str, Any]:
    """Return hardware and versions."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    packages = ("torch", "numpy", "numba", "gradsplit")
    found = {package: metadata.version(package) for package in packages if _installed(package)}
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(load),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "KMP_", "MKL_", "NUMBA_"))},
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def write(figures: list[Figure], path: Path, **more: Any) -> None:
    """Write the raw results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"conditions": conditions(), "figures": [figure.to_dict() for figure in figures], **more}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
