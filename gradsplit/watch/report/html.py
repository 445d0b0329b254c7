"""The shell of every page: one HTML file that needs no network, its style inside, plotly's script where it is needed.

page(title, lead, [Section("heading", "one sentence", [html, figure])], evidence)

`courses` and `heat` are pictures drawn by hand, as SVG and as one small PNG: nothing is loaded, little is stored. A
course is drawn twice, wide and narrow, and the page shows the one that fits. What is not finite is a bar along the top.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

__all__ = ["HEAT_CSS", "Line", "Section", "courses", "figure_html", "heat", "html_table", "page", "text", "ticks_of"]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: plain text.
        lead: a sentence or two below it, plain text.
        parts: HTML from `html_table`, `text` or `figure_html`, or plotly figures.
    """

    heading: str
    lead: str = ""
    parts: Sequence[str | go.Figure] = field(default_factory=list)


def page(title: str, lead: str, sections: Iterable[Section], evidence: Mapping[str, Any]) -> str:
    """One page as text.

    Args:
        title: plain text.
        lead: what the page shows, plain text.
        sections: in order.
        evidence: where the numbers come from: name -> value, shown at the end.
    """
    numbered = list(enumerate(sections, 1))
    drawn = any(not isinstance(part, str) or "plotly" in part for _, s in numbered for part in s.parts)
    plotly = f"<script>{get_plotlyjs()}</script>" if drawn else ""
    contents = "".join(f'<a href="#s{n}">{html.escape(s.heading)}</a>' for n, s in numbered)
    body = "".join(
        f'<section id="s{n}"><h2>{html.escape(s.heading)}</h2>{text(s.lead) if s.lead else ""}'
        + "".join(part if isinstance(part, str) else figure_html(part) for part in s.parts)
        + "</section>"
        for n, s in numbered
    )
    proof = html_table(["", ""], [[name, _flat(value)] for name, value in evidence.items()], head=False)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style>'
        f"{plotly}</head><body><main><h1>{html.escape(title)}</h1>{text(lead)}"
        f"<nav>{contents}</nav>{body}<section><h2>Where the numbers come from</h2>{proof}</section>"
        "</main></body></html>\n"
    )


def text(sentence: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(sentence)}</p>"


def html_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, bold: Iterable[int] = (), head: bool = True
) -> str:
    """A table of plain text; cells that look like numbers are aligned to the right.

    Args:
        headings: one per column.
        rows: cells, escaped here.
        bold: indices of rows set in bold.
        head: show the headings.

    >>> html_table(["a"], [["<b>"]], head=False)
    '<div class="wide"><table><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table></div>'
    >>> html_table(["a"], [["0.1.0"], ["70.4 %"]], head=False).count("class=num")
    1
    """
    strong = set(bold)
    top = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    lines = "".join(
        f"<tr{' class=ours' if at in strong else ''}>"
        + "".join(f"<td{' class=num' if _is_number(cell) else ''}>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for at, row in enumerate(rows)
    )
    start = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{start}<tbody>{lines}</tbody></table></div>'


def figure_html(figure: go.Figure) -> str:
    """A plotly figure as HTML that uses the page's own script."""
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 20, "t": 50, "b": 50},
        hoverlabel={"namelength": -1},
    )
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    made: str = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    return f'<div class="figure">{made}</div>'


_ONE = r"[<–-]*\d[\d,]*(\.\d+)?(e[+-]?\d+)?( ?%| [a-zA-Z]{1,5})?"  # with a unit, if any
_NUMBER = re.compile(rf"{_ONE}(( to | – | of |, | -> ){_ONE})*")


def _is_number(cell: str) -> bool:
    return cell in ("–", "", "never") or _NUMBER.fullmatch(cell) is not None


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_flat(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


_CSS = """
:root{color-scheme:light}
body{margin:0;background:#fafafa;color:#1c1c1c;font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.7rem;margin:.2em 0}h2{font-size:1.2rem;margin:0 0 .3em}
p{max-width:75ch;margin:.3em 0 .8em}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:12px 0}nav a{color:#0059a3;text-decoration:none}
nav a:hover{text-decoration:underline}
section{background:#fff;border:1px solid #e3e3e3;border-radius:8px;padding:18px 20px;margin:18px 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{padding:5px 10px;text-align:left;border-bottom:1px solid #ececec;vertical-align:top}
th{font-weight:600;color:#444;white-space:nowrap}td.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.ours td:first-child{font-weight:600}thead~tbody td:first-child{white-space:nowrap}
td{overflow-wrap:anywhere;min-width:2.2em}tbody:first-child td:first-child{white-space:nowrap}
td:nth-child(2):not(.num){min-width:13em}
.figure{margin:8px -6px}
@media print{section{break-inside:avoid;border:0}nav{display:none}}
"""


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
        made.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e6e6e6"/>')
        made.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks_of(first, last, logarithmic=False) if last > first else [first]:
        if value == int(value):
            made.append(
                f'<text x="{float(across(value)):.1f}" y="{height - 6}" text-anchor="middle">{value:.6g}</text>'
            )
    if marked is not None:
        at = float(across(marked))
        made.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - bottom}" stroke="#B2182B" '
            'stroke-dasharray="5 4"/>'
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
                f'<line class="lost" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="5" y2="5" stroke="#1c1c1c" '
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

HEAT_CSS = """
.course svg{width:100%;height:auto;display:block}.course text{font:12px system-ui,sans-serif;fill:#555}
.course .axis{margin:.6em 0 0;font-weight:600;font-size:.9rem}.course .narrow{display:none}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.85rem;overflow-wrap:anywhere}
.keys .key{display:inline-block;width:14px;height:4px;margin-right:6px;vertical-align:middle}
.heat .map{width:100%;background-size:100% 100%;image-rendering:pixelated}
.heat .ends{display:flex;justify-content:space-between;font-size:.85rem;color:#555;margin:.2em 0;max-width:none}
.heat .told{font-size:.9rem;min-height:1.5em;overflow-wrap:anywhere}
.words span{font-weight:600}
@media(max-width:640px){main{padding:12px 8px 32px}section{padding:12px 10px}h1{font-size:1.3rem}
.course .broad{display:none}.course .narrow{display:block}.tree details,.tree .leaf{margin-left:8px}}
h1,p,li,pre{overflow-wrap:anywhere}
"""
