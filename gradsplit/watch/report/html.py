"""The shell of every page: one HTML file that needs no network, with its style inside, for light and dark screens.

page(title, lead, [Section("heading", "one sentence", [html, figure])], evidence)

Plotly's script is part of the page only where a part of the page is a plotly figure.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

__all__ = ["Section", "figure_html", "html_table", "page", "text"]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: plain text.
        lead: a sentence or two below it, plain text.
        parts: HTML from `html_table`, `text`, `figure_html` or `gradsplit.watch.report.pictures`, or plotly figures.
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
_NUMBER = re.compile(rf"{_ONE}(( to | – | of |, |, limit | -> ){_ONE})*")


def _is_number(cell: str) -> bool:
    return cell in ("–", "", "never") or _NUMBER.fullmatch(cell) is not None


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_flat(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


_CSS = """
:root{color-scheme:light dark;
--page:#fafafa;--card:#fff;--ink:#1c1c1c;--soft:#555;--rule:#e3e3e3;--link:#0059a3;--alarm:#b2182b}
@media(prefers-color-scheme:dark){
:root{--page:#15171a;--card:#1e2125;--ink:#e8e8e8;--soft:#a9adb3;--rule:#3a3e44;--link:#7db8f0;--alarm:#ff7b72}
.figure{background:#fff;border-radius:6px}}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.7rem;margin:.2em 0}h2{font-size:1.2rem;margin:0 0 .3em}
h1,p,li,pre{overflow-wrap:anywhere}p{max-width:75ch;margin:.3em 0 .8em}a{color:var(--link)}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:12px 0}nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:18px 20px;margin:18px 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{padding:5px 10px;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600;color:var(--soft);white-space:nowrap}
td.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.ours td:first-child{font-weight:600}thead~tbody td:first-child{white-space:nowrap}
td{overflow-wrap:anywhere;min-width:2.2em}tbody:first-child td:first-child{white-space:nowrap}
td:nth-child(2):not(.num){min-width:13em}
.figure{margin:8px -6px}
@media(max-width:640px){main{padding:12px 8px 32px}section{padding:12px 10px}h1{font-size:1.3rem}}
@media print{section{break-inside:avoid;border:0}nav{display:none}}
"""
