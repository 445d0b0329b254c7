"""The table of docs/results/speed.md, written from the raw results, so that page and results cannot differ."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

__all__ = ["write_page"]

HEADING = "## Figures as measured"


def write_page(raw: Path, page: Path) -> None:
    """Put the figures of a file of raw results into a page, in place of its section of that heading."""
    results = json.loads(raw.read_text(encoding="utf8"))
    text = page.read_text(encoding="utf8")
    section = re.compile(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if len(section.findall(text)) != 1:
        raise ValueError(f"write_page(page={page}): expected one section {HEADING!r}.")
    opening = re.compile(r"(<!-- table: in short -->\n).*?(<!-- end: in short -->)", re.DOTALL)
    text = opening.sub(lambda found: f"{found[1]}\n{_in_short(results)}\n\n{found[2]}", text)
    page.write_text(section.sub(lambda _: _section(results, raw, page), text).rstrip() + "\n", encoding="utf8")


def _in_short(results: dict[str, Any]) -> str:
    """What was asked and what came out, in one paragraph."""
    figures = results["figures"]

    def span(start: str) -> str:
        found = [f["value"] for f in figures if f["name"].startswith(start) and "small" not in f["layout"]]
        return f"{min(found):.2f} to {max(found):.2f}"

    held = [figure for figure in figures if figure["bar"] is not None]
    missed = [figure for figure in held if figure["verdict"] != "met"]
    worst = max(missed, key=lambda figure: figure["value"] / figure["bar"], default=None)
    farthest = f" The farthest: {worst['name']}, {worst['value']:.2f}, bar {worst['bar']:g}." if worst else ""
    return (
        "What does a step cost on a CPU? On layouts of two GPTs and a ResNet-50, a step of `GradientSplitter` takes "
        f"{span('GradientSplitter, rows, nothing')} times as long as `clip_grad_norm_`. "
        '`GSO(direction="adam")` takes '
        f"{span('GSO, default budget, second moment per element')} times as long as a clip with a fused AdamW. "
        f"{len(held) - len(missed)} of {len(held)} bars are met, and {len(missed)} are not.{farthest} "
        "The step of `GSO` by shares has its times in [Results](README.md#time-and-memory). Its programs for graphics "
        "cards have not been timed here."
    )


def _section(results: dict[str, Any], raw: Path, page: Path) -> str:
    about, figures = results["conditions"], results["figures"]
    held = [figure for figure in figures if figure["bar"] is not None]
    met = sum(figure["verdict"] == "met" for figure in held)
    when = about["date"][:16].replace("T", " ")
    load = results["load_average_before"][0]
    busy = (
        f"load average {load:.0f} before it began: other programs ran, so expect a quiet machine to differ"
        if load > about["cores"]
        else "no other load"
    )
    settings = "".join(f", {name}={value}" for name, value in about["environment"].items())
    link = f"[{raw.name}](../../{raw.resolve().relative_to(page.resolve().parents[2])})"
    lines = [
        HEADING,
        "",
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, {when} UTC, {busy}; torch "
        f"{about['versions']['torch']}, numba {about['versions'].get('numba', 'absent')}{settings}. n: turns per pair. "
        f"{met} of {len(held)} bars are met. Raw results: {link}.",
        "",
        "Floor: the ratio if our side moved its bytes as fast as torch's own sum, or as its multiplication in place, "
        "in the same run. A figure below it had help from caches.",
        "",
        f"<!-- evidence: {raw.resolve().relative_to(page.resolve().parents[2])} -->",
        "",
        "| figure | layout | measured | quartiles | n | floor | bar | |",
        "|---|---|---|---|---|---|---|---|",
        *map(_row, figures),
    ]
    missing = results.get("peers_not_measured", {})
    if missing:
        lines += ["", "Not measured: " + "; ".join(f"{name} ({_short(why)})" for name, why in missing.items()) + "."]
    return "\n".join(line if line.startswith(("|", "<", "#")) else textwrap.fill(line, 130) for line in lines) + "\n\n"


def _row(figure: dict[str, Any]) -> str:
    detail = figure["detail"]
    unit = "" if figure["unit"] in ("ratio", "bytes ratio", "times the limit") else f" {figure['unit']}"
    quartiles = " – ".join(f"{value:.3g}" for value in detail.get("ratio_quartiles", ()))
    floor = "" if "floor" not in detail else f"{detail['floor']:.3g}"
    bar = "" if figure["bar"] is None else f"{figure['bar']:g}"
    cells = (figure["name"], figure["layout"], f"{figure['value']:.3g}{unit}", quartiles, detail.get("turns", ""))
    return "| " + " | ".join(map(str, (*cells, floor, bar, figure["verdict"]))) + " |"


def _short(why: str) -> str:
    return why.splitlines()[0][:120].rstrip(". ")
