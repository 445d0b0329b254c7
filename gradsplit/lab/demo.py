"""The demonstration: trees in photographs and text, each trained by the usual methods and by ours, side by side.

Every row says what chose its learning rate and strength.
"""

from __future__ import annotations

import importlib.util
import queue
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from .cells import thinned
from .methods import METHODS
from .optimizers import Settings
from .registry import workload
from .sweep import finite_or_none, one_thread, worker_pool
from .train import Result, smoothed, steps_to, train

__all__ = ["COMPOSED", "PHOTOGRAPHS", "TEXT", "Row", "Scene", "collect", "quick", "run_demo", "scenes"]

LOSS_POINTS = 250  # of a loss curve, kept for the page


@dataclass(frozen=True)
class Row:
    """One run of the demonstration.

    Attributes:
        label: what the table calls it.
        method: a name of `METHODS`.
        lr: learning rate.
        strength: in the method's unit; None: nothing to tune.
        chosen_by: what chose learning rate and strength; a folder holds the sweep.
    """

    label: str
    method: str
    lr: float
    strength: float | None
    chosen_by: str


@dataclass(frozen=True)
class Scene:
    """One workload of the demonstration with its rows.

    Attributes:
        workload: a name of the registry.
        settings: the same for every row.
        rows: in the order of the table.
        options: passed to the workload's build.
        expect: what there is to see, in a sentence or two.
    """

    workload: str
    settings: Settings
    rows: tuple[Row, ...]
    expect: str
    options: tuple[tuple[str, Any], ...] = ()


_DETECTION = "benchmarks/results/detection-momentum"
_TRIALS = "the project's first trials"
_TRIED = "benchmarks/results/gso"
_USUAL = "the rate that its authors give"
_OF_SCENES = "the cell of the composed scenes, not tuned here"

_GSO = Row("GSO, defaults", "gso", 0.03, None, "the share that it takes by default")

PHOTOGRAPHS = Scene(
    "aerial",
    Settings(400, "sgdm", schedule="linear"),
    (
        Row("SGD, no control", "none", 0.1, None, _OF_SCENES),
        Row("SGD, global clip", "clip", 0.1, 1.0, _OF_SCENES),
        Row("SGD, rows (default)", "default", 0.1, None, "benchmarks/results/detection-default"),
        Row("AdamW, clip, warm-up", "adamw+clip1+warmup", 0.003, None, _TRIED),
        Row("Muon, usual rate", "muon", 0.02, None, _USUAL),
        _GSO,
    ),
    "Tree crowns in photographs from the air. The box loss in pixels explodes, and one limit for all starves the rest.",
)

COMPOSED = Scene(
    "detection",
    Settings(400, "sgdm", schedule="linear"),
    (
        Row("SGD, no control", "none", 0.03, None, _DETECTION),
        Row("SGD, global clip, tuned", "clip", 0.03, 3.0, _DETECTION),
        Row("SGD, rows, tuned", "xsp", 0.3, 0.02, _DETECTION),
        Row("SGD, rows (default)", "default", 0.3, None, "benchmarks/results/detection-default"),
        Row("AdamW, clip, warm-up", "adamw+clip1+warmup", 0.003, None, _TRIED),
        _GSO,
    ),
    "The box loss in pixels explodes and starves the class head: a hard case for one global limit.",
)

TEXT = Scene(
    "gpt",
    Settings(400, "adamw", schedule="linear"),
    (
        Row("AdamW, no control", "none", 0.003, None, _TRIALS),
        Row("AdamW, global clip", "clip", 0.003, 1.0, _TRIALS),
        Row("AdamW, clip, warm-up", "adamw+clip1+warmup", 0.01, None, _TRIED),
        Row("Muon, tuned", "muon", 0.03, None, _TRIED),
        Row("SOAP, tuned", "soap", 0.01, None, _TRIED),
        _GSO,
    ),
    "A healthy model: nothing explodes. What differs is what a method makes of 400 steps.",
)


_PACKAGES = {"soap": "pytorch_optimizer"}
"""Methods of the demo -> the package that only comparisons need."""


def scenes() -> tuple[Scene, ...]:
    """The scenes that can be shown here: photographs where they are installed, else composed scenes; and the text.

    A row whose package is not installed is left out, and the scene's words say so.
    """
    installed = all(importlib.util.find_spec(name) for name in ("deepforest", "PIL"))
    return tuple(_without_missing(scene) for scene in (PHOTOGRAPHS if installed else COMPOSED, TEXT))


def _without_missing(scene: Scene) -> Scene:
    missing = {method for method, package in _PACKAGES.items() if importlib.util.find_spec(package) is None}
    rows = tuple(row for row in scene.rows if row.method not in missing)
    left = [
        f"{row.label} is left out: pip install {_PACKAGES[row.method].replace('_', '-')}."
        for row in scene.rows
        if row.method in missing
    ]
    return replace(scene, rows=rows, expect=" ".join([scene.expect, *left]))


def quick(scenes: tuple[Scene, ...]) -> tuple[Scene, ...]:
    """Three rows a scene on tiny models for a few steps: shows that everything runs, and nothing about methods."""
    small = {
        "aerial": (("width", 4), ("batch", 4)),
        "detection": (("width", 4), ("batch", 8)),
        "gpt": (("layers", 1), ("width", 16), ("heads", 2), ("context", 16), ("batch", 4)),
    }
    return tuple(
        Scene(
            scene.workload,
            Settings(20, scene.settings.optimizer, schedule=scene.settings.schedule),
            tuple(row for row in scene.rows if row.method in ("clip", "default", "gso")),
            "A smoke test on tiny models for 20 steps: the numbers mean nothing.",
            small[scene.workload],
        )
        for scene in scenes
    )


Progress = Callable[[int, int, int, float], None]
"""(scene, row, steps done, last loss); 0 steps: its task is being built."""

_progress_queue: Any = None  # this worker's end of the queue


def _start_worker(progress: Any) -> None:
    global _progress_queue
    _progress_queue = progress
    one_thread()


def _train_row(scene: Scene, scene_at: int, row_at: int, seed: int) -> Result:
    row = scene.rows[row_at]
    _progress_queue.put((scene_at, row_at, 0, float("nan")))
    task = workload(scene.workload).build(seed=seed, **dict(scene.options))
    return train(
        task, row.method, lr=row.lr, strength=row.strength, settings=scene.settings, watch=True,
        on_progress=lambda step, loss: _progress_queue.put((scene_at, row_at, step, loss)),
    )  # fmt: skip


def run_demo(
    scenes: tuple[Scene, ...],
    *,
    jobs: int = 2,
    seed: int = 0,
    on_progress: Progress = lambda scene, row, step, loss: None,
    on_result: Callable[[int, int, Result], None] = lambda scene, row, result: None,
) -> list[list[Result]]:
    """Train every row, `jobs` at a time, each in one thread.

    Args:
        scenes: what to train.
        jobs: worker processes, >= 1.
        seed: of weights and batches, the same for all rows.
        on_progress: called in this process as runs advance.
        on_result: called in this process as runs end.

    Returns:
        Results by scene and row.
    """
    import multiprocessing

    progress = multiprocessing.get_context("spawn").Queue()
    with worker_pool(jobs, _start_worker, progress) as pool:
        waiting: dict[Future[Result], tuple[int, int]] = {
            pool.submit(_train_row, scene, at, row, seed): (at, row)
            for at, scene in enumerate(scenes)
            for row in range(len(scene.rows))
        }
        done: dict[tuple[int, int], Result] = {}
        try:
            while waiting:
                for message in _arrived(progress):
                    on_progress(*message)
                for future in [future for future in waiting if future.done()]:
                    place = waiting.pop(future)
                    done[place] = future.result()
                    on_result(*place, done[place])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [[done[at, row] for row in range(len(scene.rows))] for at, scene in enumerate(scenes)]


def _arrived(progress: Any) -> Iterator[tuple[int, int, int, float]]:
    """Wait a tenth of a second for the first message, then give all that are there."""
    try:
        yield progress.get(timeout=0.1)
        while True:
            yield progress.get_nowait()
    except queue.Empty:
        return


def collect(scene: Scene, results: list[Result]) -> dict[str, Any]:
    """What table and page show of one scene, as plain data; None stands for what was not finite.

    The target of "steps_to_target" is where the running mean of the global clip's training loss ends.
    """
    about = workload(scene.workload)
    ends = {
        row.method: smoothed(result.losses)[-1]
        for row, result in zip(scene.rows, results, strict=True)
        if not result.diverged
    }
    target = ends.get("clip")
    rows = [_described(row, result, about.metric, target) for row, result in zip(scene.rows, results, strict=True)]
    data: dict[str, Any] = finite_or_none({
        "workload": about.name,
        "title": about.title,
        "metric": about.metric,
        "higher_is_better": about.higher_is_better,
        "data_note": about.data_note,
        "steps": scene.settings.steps,
        "optimizer": scene.settings.optimizer,
        "expect": scene.expect,
        "target_loss": target,
        "rows": rows,
    })  # fmt: skip
    return data


def _described(row: Row, result: Result, metric: str, target: float | None) -> Mapping[str, Any]:
    norms = result.norms
    return {
        "label": row.label,
        "method": row.method,
        "summary": METHODS[row.method].summary,
        "ours": METHODS[row.method].ours,
        "lr": row.lr,
        "strength": row.strength,
        "chosen_by": row.chosen_by,
        "score": result.metrics[metric],
        "metrics": result.metrics,
        "diverged": result.diverged,
        "ends_above_start": not smoothed(result.losses)[-1] <= result.losses[0],
        "steps_run": len(result.losses),
        "steps_to_target": None if target is None else steps_to(result.losses, target),
        "final_loss": statistics.fmean(result.losses[-25:]),
        "seconds": result.seconds,
        "cpu_ms_a_step": result.cpu_ms_a_step,
        "state_per_weight": result.state_per_weight,
        "scaled_share": result.scaled_share,
        "zeroed_share": result.zeroed_share,
        "num_bins": result.num_bins,
        "worst": result.worst,
        "losses": thinned(result.losses, LOSS_POINTS),
        "norms": None if norms is None else vars(norms),
        "example": result.example,
    }
