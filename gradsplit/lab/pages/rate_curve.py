"""The score over the learning rate, one line per method, as an SVG of our own that needs no package, script or font."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

__all__ = ["line_style", "rate_curve_svg", "style_of"]

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 210, 56, 56

# Distinct for most colour-blind readers (after Okabe and Ito). Ours are drawn solid, other people's dashed.
OURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#1B7837", "#A6761D", "#08306B")
OTHERS = ("#333333", "#B2182B", "#8C8C8C", "#8C564B", "#5E4FA2", "#B8860B", "#4D9221", "#C51B7D", "#01665E", "#666666")


def line_style(names: Sequence[tuple[str, bool]]) -> dict[str, tuple[str, str]]:
    """Name -> (colour, "solid" or "dash"), the same in every picture of a page.

    Args:
        names: (name, whether it is ours), in the order of the table.

    >>> line_style([("clip", False), ("xsp", True)])
    {'clip': ('#333333', 'dash'), 'xsp': ('#0072B2', 'solid')}
    """
    counts, style = {True: 0, False: 0}, {}
    for name, ours in names:
        palette = OURS if ours else OTHERS
        style[name] = (palette[counts[ours] % len(palette)], "solid" if ours else "dash")
        counts[ours] += 1
    return style


def style_of(summary: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """`line_style` of a comparison's methods."""
    return line_style([(entry["method"], entry["ours"]) for entry in summary])


def rate_curve_svg(results: Mapping[str, Any]) -> str:
    """Draw medians as lines and ranges as bands over a logarithmic axis of learning rates.

    A median that is not finite ends its line at a cross on the axis: the method was lost there. One beyond the scale is
    drawn at its edge, with its value.

    Args:
        results: what a comparison's `results.json` holds.
    """
    about, summary, grid = results["workload"], results["summary"], results["grid"]
    higher = about["higher_is_better"]
    lrs = sorted({point["lr"] for entry in summary for point in entry["curve"]})
    low, high = _score_range(summary, higher=higher)
    x_of = _scale([math.log10(lr) for lr in lrs], LEFT, WIDTH - RIGHT)
    y_of = _scale([low, high], HEIGHT - BOTTOM, TOP)
    parts = [*_frame(results, lrs, (low, high), x_of, y_of)]
    style, ends = style_of(summary), []
    for entry in summary:
        colour, dash = style[entry["method"]]
        points = [(x_of(math.log10(p["lr"])), p) for p in entry["curve"]]
        held = [(x, p) for x, p in points if p["median"] is not None]
        y = [min(max(y_of(p["median"]), TOP), HEIGHT - BOTTOM) for _, p in held]
        if len(held) > 1:
            band = [f"{x:.1f},{_clamped(y_of, p['max'])}" for x, p in held]
            band += [f"{x:.1f},{_clamped(y_of, p['min'])}" for x, p in reversed(held)]
            parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.08"/>')
        line = " ".join(f"{x:.1f},{at:.1f}" for (x, _), at in zip(held, y, strict=True))
        dashes = ' stroke-dasharray="6 4"' if dash == "dash" else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.2"{dashes}/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{at:.1f}" r="3" fill="{colour}"/>' for (x, _), at in zip(held, y, strict=True)
        ]
        parts += [_beyond(x, y_of(p["median"]), p["median"], colour) for x, p in held]
        bottom = HEIGHT - BOTTOM if higher else TOP
        parts += [_cross(x, bottom, colour) for x, p in points if p["median"] is None]
        if held:
            ends.append((y[-1], held[-1][0], entry["method"], colour))
        else:
            ends.append((float(bottom), float(WIDTH - RIGHT), f"{entry['method']} (lost)", colour))
    parts += _labels(ends)
    seeds = f"median and range of {grid['seeds']} seeds, {grid['steps']} steps, {grid['schedule']} schedule"
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}" class="small">{escape(seeds)}; dashed: methods of others</text>')
    body = "\n".join(parts)
    label = escape(f"{about['metric']} over the learning rate", {'"': "&quot;"})  # it stands in an attribute
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{label}">\n{_CSS}\n{body}\n</svg>\n'
    )


_CSS = (
    "<style>text{font-family:system-ui,sans-serif;font-size:13px;fill:#222}"
    ".small{font-size:11px;fill:#666}.title{font-size:15px;font-weight:600}</style>"
)


def _score_range(summary: Sequence[Mapping[str, Any]], *, higher: bool) -> tuple[float, float]:
    """The scores to show: all of them, unless the worst are so far off that the rest would be one line."""
    medians = sorted(p["median"] for entry in summary for p in entry["curve"] if p["median"] is not None) or [0.0, 1.0]
    best, middle = (medians[-1], medians[len(medians) // 2]) if higher else (medians[0], medians[len(medians) // 2])
    reach = max(abs(middle - best) * 4, abs(best) * 0.02, 1e-9)
    low, high = (max(medians[0], best - reach), best) if higher else (best, min(medians[-1], best + reach))
    pad = 0.06 * max(high - low, abs(best) * 0.02, 1e-9)
    return low - pad, high + pad


def _scale(values: Sequence[float], start: float, stop: float) -> Any:
    """A linear map from the range of the values to pixels; one value goes to the middle."""
    low, high = min(values), max(values)
    if high == low:
        return lambda value: (start + stop) / 2
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _clamped(y_of: Any, value: float) -> str:
    return f"{min(max(y_of(value), TOP), HEIGHT - BOTTOM):.1f}"


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers within the range.

    >>> _ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / 5
    step = min((factor * 10 ** math.floor(math.log10(raw)) for factor in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    return [round(n * step, 10) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _frame(
    results: Mapping[str, Any], lrs: list[float], scores: tuple[float, float], x_of: Any, y_of: Any
) -> list[str]:
    about = results["workload"]
    way = "higher is better" if about["higher_is_better"] else "lower is better"
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" class="title">{escape(about["title"])}</text>',
        f'<text x="{LEFT}" y="42">{escape(about["metric"])} ({way}) over the learning rate</text>',
    ]
    for tick in _ticks(*scores):
        y = y_of(tick)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for lr in lrs:
        x = x_of(math.log10(lr))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{lr:.3g}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#888"/>')
    return parts


def _cross(x: float, y: float, colour: str) -> str:
    return f'<path d="M{x - 4:.1f} {y - 4:.1f} l8 8 m-8 0 l8 -8" stroke="{colour}" stroke-width="2"/>'


def _beyond(x: float, y: float, value: float, colour: str) -> str:
    """The value in figures where a point lies beyond the scale and is drawn at its edge; else nothing."""
    if TOP <= y <= HEIGHT - BOTTOM:
        return ""
    place, arrow = (TOP + 18, "↑") if y < TOP else (HEIGHT - BOTTOM - 8, "↓")
    return f'<text x="{x:.1f}" y="{place}" text-anchor="middle" style="fill:{colour}">{value:.3g} {arrow}</text>'


def _labels(ends: list[tuple[float, float, str, str]]) -> list[str]:
    """Names beside the ends of their lines, moved apart where they would overlap."""
    parts, free = [], float(TOP - 14)
    ordered = sorted(ends)
    for at, (y, x, name, colour) in enumerate(ordered):
        room = HEIGHT - BOTTOM - 15 * (len(ordered) - 1 - at)
        place = min(max(y, free + 15), room)
        free = place
        left = WIDTH - RIGHT + 18
        parts.append(
            f'<line x1="{x + 5:.1f}" y1="{y:.1f}" x2="{left - 4}" y2="{place:.1f}" stroke="{colour}" opacity="0.35"/>'
        )
        parts.append(f'<text x="{left}" y="{place + 4:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return parts
