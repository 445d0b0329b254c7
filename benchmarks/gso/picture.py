"""The picture of the README: GSO beside SOAP, Muon, schedule-free and AdamW on the small GPT, from finished runs.

    python benchmarks/gso.py picture      # draws benchmarks/results/gso/beside-light.svg and beside-dark.svg

Above: the training loss of the fresh seeds, each method at its best rate, over steps and over CPU seconds. The seconds
are the steps times the CPU time per step that `seconds --part methods` measured in turns. Below: the validation loss at
the end of these runs, and after 500 steps on seed 0 over a factor of 100 in each method's own rate. All letters are
large enough to be read where the picture is 420 pixels wide.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.gso.page import CENTRES, FRESH, RESULTS, Runs

STEPS, SHORT = 1000, 500


@dataclass(frozen=True)
class Drawn:
    """A method: its name, its best rate at 1,000 steps, its options, and how its line looks."""

    label: str
    method: str
    best: float
    options: dict[str, Any]
    dash: str
    colours: tuple[str, str]  # on a light and on a dark page


DRAWN = (
    Drawn("GSO", "gso", 0.03, {}, "", ("#0072B2", "#56B4E9")),
    Drawn("SOAP", "soap", 0.01, {}, "10 4", ("#A0459A", "#DD8FD8")),
    Drawn("Muon", "muon", 0.03, {"adam": 0.01}, "", ("#D55E00", "#F08A3C")),
    Drawn("schedule-free", "schedulefree", 0.01, {}, "2 4", ("#00805C", "#2FC79A")),
    Drawn("AdamW", "adamw", 0.01, {}, "7 5", ("#555555", "#a0a8b2")),
)
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#222222", "faint": "#dddddd"},
    "dark": {"paper": "#0d1117", "ink": "#d8dee6", "faint": "#2b323b"},
}
WIDTH, HEIGHT, LETTERS = 720, 700, 18
LOWEST, HIGHEST = 1.0, 2.6
LOSSES = [1.0, 1.5, 2.0, 2.5]


class Panel:
    """One pair of axes: from values to places on the page."""

    def __init__(self, box: tuple[int, int, int, int], x: tuple[float, float], y: tuple[float, float]) -> None:
        self.left, self.top, self.right, self.bottom = box
        self.x, self.y = x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point; a value beyond the scale is drawn at its edge."""
        part = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        along = (x - self.x[0]) / (self.x[1] - self.x[0])
        return self.left + along * (self.right - self.left), self.bottom - part * (self.bottom - self.top)

    def axes(self, title: str, below: str, xs: dict[float, str], ys: list[float], faint: str) -> list[str]:
        """Return the title, the grid and the numbers."""
        parts = [f'<text x="{self.left}" y="{self.top - 12}" class="title">{escape(title)}</text>']
        for y in ys:
            _, py = self.at(self.x[0], y)
            parts.append(f'<line x1="{self.left}" x2="{self.right}" y1="{py:.1f}" y2="{py:.1f}" stroke="{faint}"/>')
            parts.append(f'<text x="{self.left - 8}" y="{py + 6:.1f}" text-anchor="end">{y:.1f}</text>')
        for x, label in xs.items():
            px, _ = self.at(x, self.y[0])
            parts.append(f'<text x="{px:.1f}" y="{self.bottom + 22}" text-anchor="middle">{label}</text>')
        middle = (self.left + self.right) / 2
        return [*parts, f'<text x="{middle}" y="{self.bottom + 46}" text-anchor="middle">{escape(below)}</text>']


def _line(panel: Panel, points: list[tuple[float, float]], colour: str, dash: str) -> str:
    places = " ".join("{:.1f},{:.1f}".format(*panel.at(*point)) for point in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2.6"{dashes}/>'


def _dots(panel: Panel, points: list[tuple[float, float]], colour: str) -> list[str]:
    at = [panel.at(*point) for point in points]
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>' for x, y in at]


def fresh(runs: Runs, drawn: Drawn) -> list[dict[str, Any]]:
    """Return the whole runs of a method on fresh seeds."""
    found = runs.find("gpt", STEPS, drawn.method, lr=drawn.best, method_options=drawn.options)
    return [row for row in found if row["seed"] in FRESH]


def curve(runs: Runs, drawn: Drawn) -> list[tuple[float, float]]:
    """Return the validation loss of seed 0 over log10 of the rate relative to the middle of the five."""
    centre = CENTRES[drawn.method]
    found = runs.find_all("gpt", SHORT, drawn.method, method_options=drawn.options)
    kept = {row["lr"]: row["score"] for row in found if row["seed"] == 0}
    points = [(math.log10(lr / centre), score) for lr, score in sorted(kept.items())]
    return [(x, score) for x, score in points if abs(x) < 1.05]


def _key() -> list[tuple[int, Drawn]]:
    """Where each method's name begins in the first line."""
    places, x = [], 12
    for drawn in DRAWN:
        places.append((x, drawn))
        x += 44 + round(9.4 * len(drawn.label)) + 26
    return places


def draw(runs: Runs, per_step: dict[str, float], theme: str) -> str:
    """Return the picture as SVG, for a light or a dark page; `per_step` is in milliseconds."""
    colour, which = THEMES[theme], list(THEMES).index(theme)
    faint, limits = colour["faint"], (LOWEST, HIGHEST)
    longest = STEPS * max(per_step[drawn.method] for drawn in DRAWN) / 1000
    steps, seconds = Panel((46, 84, 346, 300), (0, STEPS), limits), Panel((408, 84, 708, 300), (0, longest), limits)
    rates = Panel((46, 420, 346, 636), (-1.05, 1.05), limits)
    ends = Panel((408, 420, 708, 636), (1.1, 1.5), (0, len(DRAWN)))
    body = steps.axes("training loss over steps", "step", {0.0: "0", 500.0: "500", 1000.0: "1,000"}, LOSSES, faint)
    times = {float(t): str(t) for t in range(0, int(longest) + 1, 10)}
    body += seconds.axes("the same over seconds", "CPU seconds, one thread", times, LOSSES, faint)
    factors = {-1.0: "÷ 10", -0.5: "÷ 3", 0.0: "1", 0.5: "× 3", 1.0: "× 10"}
    body += rates.axes("validation loss, 500 steps", "the method's own rate", factors, LOSSES, faint)
    body += ends.axes("validation loss, 1,000 steps", "median and range over seeds", {}, [], faint)
    for loss in (1.1, 1.2, 1.3, 1.4, 1.5):
        x, _ = ends.at(loss, 0)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends.top}" y2="{ends.bottom}" stroke="{faint}"/>')
        body.append(f'<text x="{x:.1f}" y="{ends.bottom + 22}" text-anchor="middle">{loss:.1f}</text>')
    for place, drawn in reversed(list(enumerate(DRAWN))):  # ours is drawn last, on top
        line, rows = drawn.colours[which], fresh(runs, drawn)
        medians = [statistics.median(values) for values in zip(*(row["losses"] for row in rows), strict=True)]
        width, pace = STEPS / len(medians), per_step[drawn.method] / 1000
        points = [(width * (j + 0.5), value) for j, value in enumerate(medians) if value <= HIGHEST]
        body.append(_line(steps, points, line, drawn.dash))
        body.append(_line(seconds, [(pace * x, y) for x, y in points], line, drawn.dash))
        found = curve(runs, drawn)
        body += [_line(rates, found, line, drawn.dash), *_dots(rates, found, line)]
        scores, y = [row["score"] for row in rows], len(DRAWN) - place - 0.75
        middle = statistics.median(scores)
        body += [_line(ends, [(min(scores), y), (max(scores), y)], line, ""), *_dots(ends, [(middle, y)], line)]
        (px, py), end = ends.at(middle, y), "end" if middle > 1.35 else "start"
        body.append(f'<text x="{px:.1f}" y="{py - 9:.1f}" text-anchor="{end}">{drawn.label} {middle:.3f}</text>')
    for x, drawn in _key():
        line, dashes = drawn.colours[which], f' stroke-dasharray="{drawn.dash}"' if drawn.dash else ""
        body.append(f'<line x1="{x}" x2="{x + 36}" y1="22" y2="22" stroke="{line}" stroke-width="5"{dashes}/>')
        body.append(f'<text x="{x + 44}" y="28">{drawn.label}</text>')
    style = f"text{{font-family:system-ui,sans-serif;font-size:{LETTERS}px;fill:{colour['ink']}}}"
    style += ".title{font-weight:600}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img"'
    about = "loss of a small GPT over steps, over seconds and over the rate: GSO ends lowest, SOAP next"
    page = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{colour["paper"]}"/>'
    return "\n".join([f'{head} aria-label="{about}">', f"<style>{style}</style>", page, *body, "</svg>"]) + "\n"


def paces() -> dict[str, float]:
    """Return the CPU milliseconds per step of each method on the GPT."""
    rows = json.loads((RESULTS / "equal.json").read_text(encoding="utf8"))["rows"]
    return {row["method"]: row["ms"] for row in rows if row["task"] == "GPT"}


def main(asked: Sequence[str]) -> None:
    """Draw both."""
    argparse.ArgumentParser(prog="gso.py picture", description=__doc__.splitlines()[0]).parse_args(asked)
    for theme in THEMES:
        (RESULTS / f"beside-{theme}.svg").write_text(draw(Runs(), paces(), theme), encoding="utf8")
