"""`gradsplit demo`: detection and text with and without gradient splitting, a table and a page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..lab.pages.tables import Columns, number, verdict
from .app import at_least, check_place, flag, option, page_if_possible, write_file

__all__ = ["run"]


def run(
    out: Annotated[Path, option("FOLDER", "For the page and the raw results.")] = Path("runs/demo"),
    quick: Annotated[bool, flag("--quick", "Train tiny models for 20 steps, to see that all works.")] = False,
    jobs: Annotated[int, option("PROCESSES", "Runs at a time, each in one thread.")] = 2,
    seed: Annotated[int, option("NUMBER", "The seed of weights and batches, the same for every row.")] = 0,
) -> None:
    """Train a detector and a language model on real data, with the usual methods and with gradient splitting.

    It takes about two minutes on two cores. It ends with two tables and one HTML page that needs no network.

    Example: gradsplit demo --out runs/demo
    """
    from ..lab.demo import collect, run_demo
    from ..lab.demo import quick as smaller
    from ..lab.demo import scenes as shown_here
    from ..lab.evidence import conditions

    at_least(1, jobs, "gradsplit demo --jobs")
    try:  # before anything is trained
        out.mkdir(parents=True, exist_ok=True)
        check_place(out / "demo.html", "gradsplit demo --out")
    except OSError as error:
        raise ValueError(
            f"gradsplit demo --out {out}: expected a folder that can be written, got {error.strerror}. Choose another."
        ) from error
    console, start = Console(), time.perf_counter()
    scenes = smaller(shown_here()) if quick else shown_here()
    total = sum(len(scene.rows) for scene in scenes)
    console.print(f"{total} runs, {jobs} at a time, each in one thread\n", highlight=False)
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        ids = {
            (at, row_at): bar.add_task(
                f"{scene.workload:<9} {row.label:<21}", total=scene.settings.steps, note="waiting", start=False
            )
            for at, scene in enumerate(scenes)
            for row_at, row in enumerate(scene.rows)
        }

        def on_progress(at: int, row_at: int, step: int, loss: float) -> None:
            bar.start_task(ids[at, row_at])
            bar.update(ids[at, row_at], completed=step, note=f"loss {loss:.3g}" if step else "building")

        def on_result(at: int, row_at: int, result: Any) -> None:
            from ..lab import workload

            metric = workload(scenes[at].workload).metric
            note = "diverged" if result.diverged else f"{metric} {number(_finite(result.metrics[metric]))}"
            bar.update(ids[at, row_at], note=note)
            bar.stop_task(ids[at, row_at])

        results = run_demo(scenes, jobs=jobs, seed=seed, on_progress=on_progress, on_result=on_result)
    collected = [collect(scene, rows) for scene, rows in zip(scenes, results, strict=True)]
    for scene in collected:
        console.print()
        console.print(scene_table(scene))
    evidence = {**conditions(), "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
    for path in _write(collected, evidence, out):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def scene_table(scene: dict[str, Any]) -> Group:
    """One line per row: score, steps to target, whether it diverged, processor time and memory."""
    way = "higher is better" if scene["higher_is_better"] else "lower is better"
    title = f"{scene['workload']}: {scene['metric']} after {scene['steps']} steps ({way})"
    rows = scene["rows"]
    steps = [row["steps_to_target"] for row in rows]
    cells = {
        scene["metric"]: [number(row["score"]) for row in rows],
        "to target": ["never" if one is None else str(one) for one in steps],
        "diverged": [verdict(row) for row in rows],
        "ms/step": [number(row["cpu_ms_a_step"], 1) for row in rows],
        "memory": [number(row["state_per_weight"], 1) for row in rows],
    }
    table = Columns(
        "method", [row["label"] for row in rows], cells, [row["ours"] for row in rows], folded=("diverged",)
    )
    legend = (
        "To target: steps until the training loss is where the global clip ends. ms/step: processor time. Memory: "
        "bytes of the optimizer per byte of weights."
    )
    return Group(Text(title, "bold"), Text(scene["expect"]), table, Text(legend, "dim"))


def _without_pictures(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its norms and without the photograph; the boxes in it stay."""
    example = row["example"] and {key: value for key, value in row["example"].items() if key != "jpeg"}
    return {**row, "norms": None, "example": example}


def _write(scenes: list[dict[str, Any]], evidence: dict[str, Any], out: Path) -> list[Path]:
    raw = out / "demo.json"
    plain = [{**scene, "rows": [_without_pictures(row) for row in scene["rows"]]} for scene in scenes]
    write_file(raw, json.dumps({"conditions": evidence, "scenes": plain}, indent=1) + "\n")
    paths = [raw]
    with page_if_possible():  # the shell of all pages needs plotly, though this page has none of its pictures
        from ..lab.pages.demo import demo_page

        paths.append(out / "demo.html")
        write_file(paths[-1], demo_page(scenes, evidence))
    return paths
