"""Pictures of a page, drawn by hand: courses over steps as SVG, and a heat map as one small PNG.

Nothing is loaded and little is stored. A course is drawn twice, wide and narrow, and the page shows the one that fits.
Where a value is not finite, a course has a bar along its top and the heat map is black. Colours come from the variables
of the page's style, see `gradsplit.watch.report.html`.
"""

from __future__ import annotations

import base64
import html
import json
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["PICTURE_CSS", "Line", "courses", "heat", "ticks_of"]

_LEVELS = 24  # colours of the heat map between 1/1000 and 1000
_LOST = _LEVELS  # not finite
_NONE = _LEVELS + 1  # no gradient at all


class Line(NamedTuple):
    """A course: its name, colour, places and values; what is not finite is left out of the line and marked."""

    name: str
    colour: str
    x: np.ndarray
    y: np.ndarray


def ticks_of(low: float, high: float, *, logarithmic: bool) -> list[float]:
    """Return at most seven round values between two, powers of ten on a logarithmic axis.

    >>> ticks_of(0.5, 200.0, logarithmic=True), ticks_of(0.0, 10.0, logarithmic=False)
    ([1.0, 10.0, 100.0], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0])
    """
    if logarithmic:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / 6))
        return [10.0**power for power in range(first, last + 1, step)]
    size = 10.0 ** math.floor(math.log10(max(high - low, 1e-300) / 5))
    unit = next(size * k for k in (1, 2, 5, 10) if (high - low) / (size * k) <= 6)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [k * unit for k in range(first, last + 1)]


def courses(title: str, lines: Sequence[Line], *, marked: float | None = None, logarithmic: bool | None = None) -> str:
    """Lines over steps as HTML: one picture for wide screens and one for narrow ones.

    Args:
        title: of the vertical axis.
        lines: in the order of the legend.
        marked: a step that gets a dashed line; None: none.
        logarithmic: the vertical axis; None: where all values are above 0 and span more than a factor of 30.
    """
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines] or [np.zeros(0)])
    positive = values[values > 0]
    if logarithmic is None:
        logarithmic = len(values) > 0 and len(positive) == len(values) and values.max() > 30 * values.min()
    shown = positive if logarithmic else values
    if not len(shown):
        return f"<p>{html.escape(title)}: no finite value.</p>"
    low, high = float(shown.min()), float(shown.max())
    if logarithmic:
        low, high = low / 1.3, high * 1.3
    elif high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    keys = "".join(
        f'<span><span class="key" style="background:{line.colour}"></span>{html.escape(line.name)}</span>'
        for line in lines
    )
    pictures = "".join(
        f'<div class="{kind}">{_picture(lines, width, 260, low, high, marked, logarithmic=logarithmic)}</div>'
        for kind, width in (("broad", 1100), ("narrow", 380))
    )
    return f'<div class="course"><p class="axis">{html.escape(title)}</p>{pictures}<p class="keys">{keys}</p></div>'


def _picture(
    lines: Sequence[Line], width: int, height: int, low: float, high: float, marked: float | None, *, logarithmic: bool
) -> str:
    left, right, top, bottom = 62, 10, 14, 24
    first = min(float(line.x[0]) for line in lines if len(line.x))
    last = max(float(line.x[-1]) for line in lines if len(line.x))
    span = max(last - first, 1.0)

    def across(x: np.ndarray | float) -> np.ndarray:
        return np.asarray(left + (np.asarray(x, dtype=np.float64) - first) / span * (width - left - right))

    def down(y: np.ndarray | float) -> np.ndarray:
        value = np.asarray(y, dtype=np.float64)
        share = np.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return np.asarray(height - bottom - share * (height - top - bottom))

    made = [f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">']
    for value in ticks_of(low, high, logarithmic=logarithmic):
        at = float(down(value))
        made.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        made.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks_of(first, last, logarithmic=False) if last > first else [first]:
        if value == int(value) and float(across(value)) < width - right - 40:  # leaves room for the word "step"
            made.append(
                f'<text x="{float(across(value)):.1f}" y="{height - 6}" text-anchor="middle">{value:.6g}</text>'
            )
    made.append(f'<text x="{width - right}" y="{height - 6}" text-anchor="end">step</text>')
    if marked is not None:
        at = float(across(marked))
        made.append(
            f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - bottom}" stroke-dasharray="5 4"/>'
        )
    most = width  # no more points than can be seen
    for line in lines:
        x, y = _thinned(line.x, line.y, most)
        drawn = np.isfinite(y) & ((y > 0) | (not logarithmic))
        for a, b in _stretches(drawn):
            points = " ".join(f"{u:.1f},{v:.1f}" for u, v in zip(across(x[a:b]), down(y[a:b]), strict=True))
            made.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="1.4"/>')
        for a, b in _stretches(~np.isfinite(y)):
            ends = float(across(x[a])), float(across(x[b - 1])) + 2
            made.append(
                f'<line class="lost" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="5" y2="5" '
                'stroke-width="6"><title>not finite</title></line>'
            )
    return "".join(made) + "</svg>"


def _thinned(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest value of each of at most so many runs; a run with a value that is not finite is not finite."""
    if len(x) <= most:
        return x, y
    starts = np.unique(np.arange(most) * len(x) // most)
    return x[starts], np.maximum.reduceat(y, starts)


def _stretches(there: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (begin, end) of the runs of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def heat(z_CL: np.ndarray, lost_CL: np.ndarray, step_C: np.ndarray, names: Sequence[str], identity: str) -> str:
    """The heat map as HTML: one pixel per column and leaf, and a line of text that tells what is under the pointer.

    Args:
        z_CL: log10 of norm over own median; nan where there is none.
        lost_CL: whether a norm was not finite.
        step_C: first step of each column.
        names: one per leaf.
        identity: of this picture within the page.
    """
    level = np.clip((np.nan_to_num(z_CL) + 3) / 6 * (_LEVELS - 1) + 0.5, 0, _LEVELS - 1).astype(np.uint8)
    level = np.where(np.isnan(z_CL), _NONE, level)
    level = np.where(lost_CL, _LOST, level).T.astype(np.uint8)
    picture = base64.b64encode(_png(level, _palette())).decode()
    height = int(min(700, max(160, 10 * len(names))))
    facts = json.dumps({"names": list(names), "steps": step_C.tolist()})
    return (
        f'<div class="heat" id="{identity}" data-facts="{html.escape(facts)}">'
        f'<div class="map" style="height:{height}px;'
        f'background-image:url(data:image/png;base64,{picture})"></div>'
        f'<p class="ends"><span>step {int(step_C[0])}</span>'
        f"<span>step {int(step_C[-1])}</span></p>"
        '<p class="told">blue 1/1000, white 1, red 1000 times its own median; black: not finite; grey: none.</p>'
        f'<script>/** what is under the pointer */({_HOVER})("{identity}")</script></div>'
    )


def _palette() -> bytes:
    """Blue over white to red, then black and grey."""
    stops = np.array([[33, 102, 172], [247, 247, 247], [244, 165, 130], [103, 0, 31]], dtype=np.float64)
    at = np.linspace(0, 1, _LEVELS)
    colours = np.stack([np.interp(at, [0, 0.5, 0.75, 1], stops[:, k]) for k in range(3)], axis=1)
    whole = np.vstack([np.round(colours), [[28, 28, 28], [224, 224, 224]]])
    return bytes(whole.astype(np.uint8).tobytes())


def _png(index: np.ndarray, palette: bytes) -> bytes:
    """A picture of palette indices (height, width) as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    tall, wide = index.shape
    lines = np.concatenate([np.zeros((tall, 1), dtype=np.uint8), index], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", wide, tall, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", palette)
        + chunk(b"IDAT", zlib.compress(lines, 9))
        + chunk(b"IEND", b"")
    )


_HOVER = """id => {
 const box = document.getElementById(id), image = box.querySelector('.map'), told = box.querySelector('.told');
 const sheet = new Image();
 sheet.src = image.style.backgroundImage.slice(5, -2);
 const facts = JSON.parse(box.dataset.facts);
 let pen = null;
 image.addEventListener('mousemove', event => {
  const frame = image.getBoundingClientRect(), wide = facts.steps.length, tall = facts.names.length;
  const c = Math.min(wide - 1, Math.max(0, Math.floor((event.clientX - frame.left) / frame.width * wide)));
  const l = Math.min(tall - 1, Math.max(0, Math.floor((event.clientY - frame.top) / frame.height * tall)));
  if (!pen) {
   const copy = document.createElement('canvas');
   copy.width = wide; copy.height = tall;
   pen = copy.getContext('2d', {willReadFrequently: true}); pen.drawImage(sheet, 0, 0);
  }
  const [r, g, b] = pen.getImageData(c, l, 1, 1).data;
  const what = r === 28 && g === 28 ? 'not finite' : r === 224 && g === 224 && b === 224 ? 'no gradient'
   : r >= 244 && b < 240 || g < 100 && r > b ? 'above its median' : b > r ? 'below its median' : 'near its median';
  told.textContent = facts.names[l] + ', step ' + facts.steps[c] + ': ' + what;
 });
}"""

PICTURE_CSS = """
.course svg{width:100%;height:auto;display:block}.course text{font:12px system-ui,sans-serif;fill:var(--soft)}
.course .grid{stroke:var(--rule)}.course .lost{stroke:var(--ink)}.course .mark{stroke:var(--alarm)}
.course .axis{margin:.6em 0 0;font-weight:600;font-size:.9rem}.course .narrow{display:none}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.85rem;overflow-wrap:anywhere}
.keys .key{display:inline-block;width:14px;height:4px;margin-right:6px;vertical-align:middle}
.heat .map{width:100%;background-size:100% 100%;image-rendering:pixelated}
.heat .ends{display:flex;justify-content:space-between;font-size:.85rem;color:var(--soft);margin:.2em 0;max-width:none}
.heat .told{font-size:.9rem;min-height:1.5em;overflow-wrap:anywhere}
@media(max-width:640px){.course .broad{display:none}.course .narrow{display:block}}
"""
