"""The page of benchmarks/gpu.py: what was right, what waited, what it cost, and where the training runs ended."""

from __future__ import annotations

import itertools
from typing import Any


def page(found: dict[str, Any]) -> str:
    """Return the page, in Markdown, of what `gpu.py` wrote."""
    about, jobs = found["about"], found["jobs"]
    where = about.get("card", "no card: the tiny setting on a CPU, which says nothing of speed")
    lines = [
        "# On a graphics card",
        "",
        f"{where}, {found['date']}, torch {about['torch']}, Triton {about['triton']}.",
        "Made by `python benchmarks/gpu.py`.",
        "",
        *_failures(jobs),
        *_kernels(jobs),
        *_waits(jobs),
        *_cost(jobs),
        *_training(jobs),
    ]
    return "\n".join(lines) + "\n"


def _of(jobs: dict[str, Any], part: str) -> dict[str, Any]:
    return {name[len(part) :]: value for name, value in jobs.items() if name.startswith(part)}


def _said(value: dict[str, Any]) -> str:
    return f"failed: {value['failed'][:80]}" if "failed" in value else f"skipped: {value['skipped']}"


def _failures(jobs: dict[str, Any]) -> list[str]:
    failed = [f"- `{name}`: {value['failed']}" for name, value in jobs.items() if "failed" in value]
    return [f"**{len(failed)} of {len(jobs)} jobs failed:**", "", *failed, ""] if failed else []


def _kernels(jobs: dict[str, Any]) -> list[str]:
    rows = ["## Equal to the definition", "", "Deviations in units of the last place.", ""]
    rows += ["| kernel, dtype, memory layout | squares | scaled |", "|---|---|---|"]
    for name, value in _of(jobs, "a/").items():
        if "squares_ulp" in value:
            rows.append(f"| {name} | {value['squares_ulp']} | {value['scaled_ulp']} |")
        elif "failed" in value or "skipped" in value:
            rows.append(f"| {name} | {_said(value)} | |")
    rows += ["", "| several steps | largest relative difference | what the self-check found |", "|---|---|---|"]
    for name, value in _of(jobs, "a/").items():
        apart = value.get("worst_relative", max(value.get("relative_distance", {"": None}).values()))
        if apart is not None:
            rows.append(f"| {name} | {apart:.2g} | {'; '.join(value['self_check']) or 'nothing'} |")
    return [*rows, ""]


def _waits(jobs: dict[str, Any]) -> list[str]:
    rows = ["## Nothing waits", "", "| step | |", "|---|---|"]
    for name, value in _of(jobs, "b/").items():
        done = "no wait, and a CUDA graph replays it" if value.get("replayed") else "no wait"
        rows.append(f"| {name} | {done if 'waits' in value else _said(value)} |")
    return [*rows, ""]


def _cost(jobs: dict[str, Any]) -> list[str]:
    rows = ["## What a step costs", "", "Medians, with quartiles in the raw file.", ""]
    rows += ["| layout | step | device, ms | host, ms | peak above, MB | kernels |", "|---|---|---|---|---|---|"]
    for name, value in _of(jobs, "c/").items():
        layout, _, step = name.partition("/")
        if "host_ms" not in value:
            rows.append(f"| {layout} | {step} | {_said(value)} | | | |")
            continue
        device = f"{value['device_ms'][1]:.3f}" if "device_ms" in value else ""
        launched = value.get("kernels", f"{value.get('operations', '')} operations")
        numbers = f"{device} | {value['host_ms'][1]:.3f} | {value.get('peak_above_mb', '')} | {launched}"
        rows.append(f"| {layout} | {step} | {numbers} |")
    return [*rows, ""]


def _training(jobs: dict[str, Any]) -> list[str]:
    curves = {name: value["curve"] for name, value in _of(jobs, "d/").items() if "curve" in value}
    if not curves:
        return []
    steps = min(curve[-1][0] for curve in curves.values())
    seconds = min(curve[-1][1] for curve in curves.values())
    rows = ["## Training: a GPT on bytes of Python's standard library", ""]
    rows += [f"| run | steps | loss at step {steps} | loss at {seconds:.0f} s | last loss |", "|---|---|---|---|---|"]
    for name, curve in curves.items():
        losses = (_at(curve, 0, steps), _at(curve, 1, seconds), curve[-1][2])
        rows.append(f"| {name} | {curve[-1][0]} | {' | '.join(f'{loss:.4f}' for loss in losses)} |")
    return [*rows, ""]


def _at(curve: list[list[float]], column: int, place: float) -> float:
    """The loss between the two looks around a step or a second."""
    for before, after in itertools.pairwise(curve):
        if after[column] >= place:
            share = (place - before[column]) / max(after[column] - before[column], 1e-12)
            return before[2] + share * (after[2] - before[2])
    return curve[-1][2]
