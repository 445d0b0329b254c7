"""The picture of the README: GSO beside Muon, AdamW and schedule-free on the small GPT, from finished runs.

The runs are those of benchmarks/gso.py.

    python benchmarks/gso_picture.py --collect     # copies the runs it needs into results/gso/beside.json
    python benchmarks/gso_picture.py               # draws them as results/gso/beside-light.svg and beside-dark.svg

Left and middle: the training loss of the fresh seeds, each method at its best rate, over steps and over CPU seconds.
The seconds are the steps times the CPU time per step that benchmarks/gso_equal.py measured in turns. Right: the
validation loss after 500 steps on seed 0, over a factor of 100 in each method's own rate.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

RESULTS = Path(__file__).parent / "results" / "gso"
OURS = {"median": "tensors", "free_outputs": True}
SETTINGS: list[tuple[str, int, dict[str, Any], str, list[float], dict[str, Any]]] = [
    ("gpt", 1000, {}, "gso", [0.03], {}),
    ("gpt", 1000, {}, "schedulefree", [0.003, 0.01, 0.02, 0.03], {}),
    ("gpt", 1000, {}, "reference", [0.03], OURS),
    ("gpt", 1000, {}, "adamw", [1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 1e-1], {}),
    ("gpt", 1000, {}, "muon", [0.01, 0.02, 0.03, 0.1], {"adam": 0.01}),
    ("gpt", 1000, {}, "muon", [0.01, 0.02, 0.03], {"adam": 0.003}),
    ("gpt", 1000, {}, "muon", [0.01, 0.02, 0.03], {"adam": 0.03}),
    ("gpt", 500, {}, "gso", [0.003, 0.01, 0.03, 0.1, 0.3], {}),
    ("gpt", 500, {}, "muon", [0.003, 0.01, 0.03, 0.1, 0.3], {"adam": 0.01}),
    ("gpt", 500, {}, "adamw", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], {}),
    ("gpt", 500, {}, "schedulefree", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], {}),
    ("gpt", 500, {}, "reference", [0.03], {"median": "tensors"}),
    ("gpt", 500, {"zero": True}, "adamw", [3e-3, 1e-2], {}),
    ("lstm", 500, {}, "reference", [0.03], {}),
    ("lstm", 500, {}, "adamw", [1e-3, 3e-3, 1e-2, 3e-2, 6e-2, 1e-1], {}),
    ("detection", 500, {}, "reference", [0.03], OURS),
    ("detection", 500, {}, "adamw", [1e-3, 3e-3, 1e-2, 3e-2], {}),
    ("detection", 500, {"healthy": True}, "reference", [0.03], OURS),
    ("detection", 500, {"healthy": True}, "adamw", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], {}),
    ("residual-stack", 900, {}, "reference", [0.03], OURS),
    ("residual-stack", 900, {}, "adamw", [1e-3, 3e-3, 1e-2, 3e-2], {}),
    ("plain-stack", 350, {}, "reference", [0.03], OURS),
    ("plain-stack", 350, {}, "adamw", [1e-3, 3e-3, 1e-2, 3e-2], {}),
    ("mixer", 600, {}, "reference", [0.03, 0.01], OURS),
    ("mixer", 600, {}, "adamw", [1e-3, 3e-3, 1e-2], {}),
    ("lora", 400, {}, "reference", [0.03], {"floor": 0.1}),
    ("lora", 400, {}, "adamw", [3e-3, 1e-2, 3e-2], {}),
]
"""Task, steps, its options, method, rates, the method's options: the cells of docs/results/gso.md."""

DRAWN = (
    ("GSO, nothing chosen", "gso", 0.03, {}),
    ("Muon + AdamW", "muon", 0.03, {"adam": 0.01}),
    ("AdamW", "adamw", 0.01, {}),
    ("schedule-free AdamW", "schedulefree", 0.01, {}),
)
"""Label, method, its best rate, its options."""

COLOURS = {
    "light": {
        "paper": "#ffffff",
        "ink": "#222222",
        "faint": "#e2e2e2",
        "lines": ("#0072B2", "#D55E00", "#555555", "#009E73"),
    },
    "dark": {
        "paper": "#0d1117",
        "ink": "#d8dee6",
        "faint": "#2b323b",
        "lines": ("#56B4E9", "#F08A3C", "#a0a8b2", "#2FC79A"),
    },
}
DASHES = ("", "", "6 4", "2 3")
WIDTH, HEIGHT, TOP, BOTTOM = 960, 370, 74, 50
LOWEST, HIGHEST = 1.0, 2.6
STEPS, SHORT = 1000, 500


def collect(runs: Path) -> dict[str, Any]:
    """Return the finished runs of SETTINGS, one entry per cell, with the scores of choosing and of fresh seeds."""
    lines = [json.loads(line) for line in runs.read_text(encoding="utf8").splitlines()]
    cells = []
    for task, steps, options, method, rates, method_options in SETTINGS:
        for lr in rates:
            wanted = [task, steps, options, method, lr, method_options, {}, "linear"]
            names = ("task", "steps", "options", "method", "lr", "method_options", "fault", "schedule")
            found = sorted((r for r in lines if [r[n] for n in names] == wanted), key=lambda r: r["seed"])
            if not found:
                continue
            cell = dict(zip(names, wanted, strict=True))
            for kind, seeds in (("choosing", (0, 1)), ("fresh", range(10, 100))):
                some = [r for r in found if r["seed"] in seeds]
                cell[kind] = {"seeds": [r["seed"] for r in some], "scores": [r["score"] for r in some]}
                cell[kind]["cpu_seconds"] = [r["cpu_seconds"] for r in some]
                cell[kind]["losses"] = [r["losses"] for r in some] if (task, steps) == ("gpt", 1000) else []
            cell |= {name: sorted({r[name] for r in found}) for name in ("metric", "date", "hardware", "torch")}
            cells.append(cell)
    times = json.loads((RESULTS / "equal.json").read_text(encoding="utf8"))["rows"]
    per_step = {row["method"]: row["ms"] for row in times if row["task"] == "GPT"}
    return {"source": "benchmarks/gso.py", "cpu_ms_per_step": per_step, "cells": cells}


def cell_of(beside: dict[str, Any], method: str, lr: float, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return the GPT's cell of a method at a rate."""
    wanted = ["gpt", steps, method, lr, options]
    names = ("task", "steps", "method", "lr", "method_options")
    return next(cell for cell in beside["cells"] if [cell[name] for name in names] == wanted)


class Panel:
    """One pair of axes: from values to places on the page."""

    def __init__(self, left: int, right: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.left, self.right, self.x, self.y = left, right, x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point; a value beyond the scale is drawn at its edge."""
        part = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        along = (x - self.x[0]) / (self.x[1] - self.x[0])
        return self.left + along * (self.right - self.left), HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)

    def axes(self, title: str, below: str, xs: dict[float, str], ys: list[float], colour: dict[str, Any]) -> list[str]:
        """Return the title, the grid and the numbers."""
        parts = [f'<text x="{self.left}" y="{TOP - 14}" class="title">{escape(title)}</text>']
        for y in ys:
            _, py = self.at(self.x[0], y)
            faint = colour["faint"]
            parts.append(f'<line x1="{self.left}" x2="{self.right}" y1="{py:.1f}" y2="{py:.1f}" stroke="{faint}"/>')
            parts.append(f'<text x="{self.left - 8}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
        for x, label in xs.items():
            px, _ = self.at(x, self.y[0])
            parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
        middle = (self.left + self.right) / 2
        return [*parts, f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(below)}</text>']


def _line(panel: Panel, points: list[tuple[float, float]], colour: str, dash: str) -> str:
    places = " ".join("{:.1f},{:.1f}".format(*panel.at(*point)) for point in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2.2"{dashes}/>'


def _dots(panel: Panel, points: list[tuple[float, float]], colour: str, radius: float = 4) -> list[str]:
    at = [panel.at(*point) for point in points]
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>' for x, y in at]


def curve(beside: dict[str, Any], method: str, best: float, options: dict[str, Any]) -> list[tuple[float, float]]:
    """Return the validation loss of seed 0 over log10 of the rate relative to the method's best."""
    wanted = ["gpt", SHORT, {}, method, options]
    names = ("task", "steps", "options", "method", "method_options")
    cells = [cell for cell in beside["cells"] if [cell[name] for name in names] == wanted]
    return sorted((math.log10(cell["lr"] / best), cell["choosing"]["scores"][0]) for cell in cells)


def draw(beside: dict[str, Any], theme: str) -> str:
    """Return the picture as SVG, for a light or a dark page."""
    colour = COLOURS[theme]
    longest = STEPS * max(beside["cpu_ms_per_step"][method] for _, method, _, _ in DRAWN) / 1000
    limits = (LOWEST, HIGHEST)
    steps, seconds = Panel(40, 316, (0, STEPS), limits), Panel(366, 642, (0, longest), limits)
    rates = Panel(692, 944, (-1.05, 1.05), limits)
    ys = [1.0, 1.5, 2.0, 2.5]
    marks = {0.0: "0", 250.0: "250", 500.0: "500", 750.0: "750", 1000.0: "1,000"}
    body = steps.axes("training loss over steps", "step", marks, ys, colour)
    times = {float(t): str(t) for t in range(0, int(longest) + 1, 5)}
    body += seconds.axes("the same over CPU seconds", "seconds, one thread", times, ys, colour)
    factors = {-1.0: "÷ 10", -0.5: "÷ 3", 0.0: "1", 0.5: "× 3", 1.0: "× 10"}
    body += rates.axes("validation loss over the rate", "rate, relative to the one on the left", factors, ys, colour)
    lefts = (40, 250, 430, 560)
    for i in reversed(range(len(DRAWN))):  # ours is drawn last, on top
        label, method, best, options = DRAWN[i]
        line, dash = colour["lines"][i], DASHES[i]
        losses = cell_of(beside, method, best, options, STEPS)["fresh"]["losses"]
        medians = [statistics.median(values) for values in zip(*losses, strict=True)]
        width, pace = STEPS / len(medians), beside["cpu_ms_per_step"][method] / 1000
        points = [(width * (j + 0.5), value) for j, value in enumerate(medians) if value <= HIGHEST]
        body.append(_line(steps, points, line, dash))
        body.append(_line(seconds, [(pace * x, y) for x, y in points], line, dash))
        found = curve(beside, method, best, options)
        body += [_line(rates, found, line, dash), *_dots(rates, found, line)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        x = lefts[i]
        body.append(f'<line x1="{x}" x2="{x + 26}" y1="18" y2="18" stroke="{line}" stroke-width="4"{dashes}/>')
        body.append(f'<text x="{x + 33}" y="22">{escape(label)}</text>')
    style = f"text{{font-family:system-ui,sans-serif;font-size:12.5px;fill:{colour['ink']}}}.title{{font-weight:600}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img"'
    about = "loss of a small GPT over steps, over seconds and over the rate: GSO ends lowest"
    page = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{colour["paper"]}"/>'
    return "\n".join([f'{head} aria-label="{about}">', f"<style>{style}</style>", page, *body, "</svg>"]) + "\n"


def main() -> None:
    """Collect, where asked, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="copy the runs first")
    parser.add_argument("--runs", type=Path, default=RESULTS / "runs.jsonl")
    args = parser.parse_args()
    kept = RESULTS / "beside.json"
    if args.collect:
        kept.write_text(json.dumps(collect(args.runs), indent=1) + "\n", encoding="utf8")
    beside = json.loads(kept.read_text(encoding="utf8"))
    for theme in COLOURS:
        (RESULTS / f"beside-{theme}.svg").write_text(draw(beside, theme), encoding="utf8")


if __name__ == "__main__":
    main()
