"""The picture of docs/results/README.md: in what share of the rows each method is how far behind the best.

It is a performance profile (Dolan and Moré 2002), drawn from the rows of tables.json by page.py. Left: the rows
that the four strongest methods have all run. Right: the rows that all eight have run, where there are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["behind", "draw", "profile"]

WIDTH, HEIGHT, TOP, BOTTOM, PANEL = 976, 360, 60, 56, 400
FEWEST = 3  # rows of which a panel is drawn
FARTHEST = 0.25  # behind the best: the right end of the picture
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555", "#8C564B", "#E69F00", "#7F7F7F")
DASHES = ("", "6 3", "2 3", "9 3 2 3", "4 4", "1 4", "8 5", "3 6")
FIRST, SECOND = 68, 548  # left edges of the panels
LEFTS = (68, 152, 248, 332, 420, 568, 648, 756)

Row = Mapping[str, Any]


def behind(row: Row, methods: list[str]) -> dict[str, float] | None:
    """How far each method is behind the best of them, as a share of the best score; None: not all of them have run.

    >>> entry = lambda score: {"fresh": None, "choosing": score}
    >>> row = {"higher_is_better": True, "methods": {"a": entry(0.8), "b": entry(1.0), "c": entry(None)}}
    >>> {name: round(value, 2) for name, value in behind(row, ["a", "b", "c"]).items()}
    {'a': 0.2, 'b': 0.0, 'c': inf}
    """
    if any(name not in row["methods"] for name in methods):
        return None
    entries = {name: row["methods"][name] for name in methods}
    scores = {name: e["fresh"]["median"] if e["fresh"] else e["choosing"] for name, e in entries.items()}
    scores = {name: None if entries[name].get("lost") else score for name, score in scores.items()}
    held = [score for score in scores.values() if score is not None]
    if not held:
        return None
    best = max(held) if row["higher_is_better"] else min(held)
    return {name: float("inf") if score is None else abs(best - score) / abs(best) for name, score in scores.items()}


def profile(rows: list[Row], methods: list[str]) -> tuple[dict[str, list[float]], int]:
    """Each method's distances in rising order, over the rows that all of them have run; and how many rows these are."""
    made = [found for row in rows if (found := behind(row, methods)) is not None]
    return {name: sorted(found[name] for found in made) for name in methods}, len(made)


def _panel(left: int, title: str, rows: list[Row], names: Mapping[str, str], colours: Mapping[str, int]) -> list[str]:
    distances, count = profile(rows, list(names))
    bottom, right = HEIGHT - BOTTOM, left + PANEL

    def x(distance: float) -> float:
        return left + min(distance, FARTHEST) / FARTHEST * PANEL

    def y(share: float) -> float:
        return bottom - share * (bottom - TOP)

    parts = [f'<text x="{left}" y="{TOP - 14}" class="title">{escape(title)}, {count} task{"s" * (count != 1)}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#e2e2e2"/>')
        parts.append(f'<text x="{left - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    for distance in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25):
        place = f'x="{x(distance):.1f}" y="{bottom + 18}"'
        parts.append(f'<text {place} text-anchor="middle">{100 * distance:.0f} %</text>')
    below = (
        f'<text x="{left + PANEL / 2}" y="{HEIGHT - 14}" text-anchor="middle">behind the best of them, at most</text>'
    )
    parts.append(below)
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 {left - 52} {middle:.1f})" text-anchor="middle"'
    parts.append(f'<text x="{left - 52}" y="{middle:.1f}" {turned}>share of the tasks</text>')
    for name in reversed(names):  # the first is drawn last, on top
        path, done = [f"{x(0):.1f},{y(0):.1f}"], 0
        for distance in distances[name]:
            if distance > FARTHEST:
                break
            path.append(f"{x(distance):.1f},{y(done / count):.1f}")
            done += 1
            path.append(f"{x(distance):.1f},{y(done / count):.1f}")
        path.append(f"{right:.1f},{y(done / max(count, 1)):.1f}")
        at, width = colours[name], 3 if name == "gso" else 2.2
        dashes = f' stroke-dasharray="{DASHES[at]}"' if DASHES[at] else ""
        line = f'fill="none" stroke="{COLOURS[at]}" stroke-width="{width}"{dashes}'
        parts.append(f'<polyline points="{" ".join(path)}" {line}/>')
    return parts


def draw(rows: list[Row], names: Mapping[str, str]) -> str:
    """The picture as SVG.

    Args:
        rows: those of tables.json.
        names: method -> the word for it, GSO first, then the strongest.
    """
    colours = {name: at for at, name in enumerate(names)}
    four = dict(list(names.items())[:4])
    body = _panel(FIRST, "the four strongest", rows, four, colours)
    both = profile(rows, list(names))[1] >= FEWEST
    if both:
        body += _panel(SECOND, "all eight", rows, names, colours)
    for at, (name, title) in enumerate(names.items() if both else four.items()):
        left = LEFTS[at]
        dashes = f' stroke-dasharray="{DASHES[colours[name]]}"' if DASHES[colours[name]] else ""
        line = f'stroke="{COLOURS[colours[name]]}" stroke-width="3"{dashes}'
        body.append(f'<line x1="{left}" x2="{left + 24}" y1="18" y2="18" {line}/>')
        body.append(f'<text x="{left + 29}" y="22">{escape(title)}</text>')
    about = "share of the workloads in which each optimizer is at most so far behind the best"
    wide = WIDTH if both else SECOND - 52
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {HEIGHT}" width="{wide}" role="img"'
    style = "text{font-family:system-ui,sans-serif;font-size:12.5px;fill:#222}.title{font-weight:600}"
    page = f'<rect width="{wide}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([f'{head} aria-label="{about}">', f"<style>{style}</style>", page, *body, "</svg>"]) + "\n"
