"""The page of a comparison: best cells, score over the learning rate, training loss of the best cells."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ...watch.report.html import Section, html_table, page, text
from .rate_curve import style_of
from .tables import number

__all__ = ["comparison_page", "loss_figure", "rate_figure"]


_LEGEND = {"orientation": "h", "y": -0.2}  # below: beside the lines it would leave a narrow screen nothing for them


def comparison_page(results: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        results: what a comparison's `results.json` holds.
    """
    about, grid = results["workload"], results["grid"]
    way = "higher is better" if about["higher_is_better"] else "lower is better"
    fresh = grid["fresh_seeds"] > 0
    num, kind = (grid["fresh_seeds"], "fresh seeds") if fresh else (grid["seeds"], "seeds that chose the setting")
    sections = [
        Section(
            "The best setting of each method",
            f"{about['metric']} ({way}): the median and, in brackets, the range over {num} {kind}. The methods of "
            "gradsplit are bold. To target: steps until the training loss is where "
            f"{results.get('target_method', 'clip')} ends. Scaled: share of all bins over all steps. Memory: optimizer "
            "bytes per weight byte.",
            [_best_table(results), text(_words(results["summary"]))],
        ),
        Section(
            "Score over the learning rate",
            "The median over the seeds that chose, with the best strength at each learning rate. Bars show the range. "
            "Where a method has no point, its score was not finite.",
            [rate_figure(results)],
        ),
        Section(
            "Training loss of the best settings",
            "The median over seeds. A line that ends early has diverged.",
            [loss_figure(results)],
        ),
    ]
    lead = f"{about['title'][:1].upper()}{about['title'][1:]}. {about['data_note']}"
    evidence = {**results["conditions"], "grid": {k: v for k, v in grid.items() if k not in ("methods", "strengths")}}
    return page(f"gradsplit compare {about['name']}", lead, sections, evidence)


def _score(scores: Mapping[str, Any]) -> str:
    if scores["min"] is None:
        return "–"
    lost = f", {scores['lost']} lost" if scores["lost"] else ""
    median = "–" if scores["median"] is None else f"{scores['median']:.3f}"
    return f"{median} [{scores['min']:.3f} to {scores['max']:.3f}{lost}]"


def _words(summary: Sequence[Mapping[str, Any]]) -> str:
    """What each method is: below the table, since it would press the numbers out of a screen."""
    return "; ".join(f"{entry['method']}: {entry['summary']}" for entry in summary) + "."


def _best_table(results: Mapping[str, Any]) -> str:
    headings = ["method", results["workload"]["metric"], "strength", "lr", "diverged", "to target", "scaled",
                "ms/step", "memory", "s/run", "worst bin"]  # fmt: skip
    rows = []
    for entry in results["summary"]:
        scaled, steps = entry["scaled_share"], entry["steps_to_target"]
        rows.append([
            entry["method"],
            _score(entry["fresh"] or entry["choosing"]),
            "" if entry["strength"] is None else f"{entry['strength']:g}",
            f"{entry['lr']:.3g}",
            f"{entry['diverged']} of {entry['runs']}",
            "never" if steps is None else f"{steps:.0f}",
            "" if scaled is None else f"{100 * scaled:.1f} %",
            number(entry.get("cpu_ms_a_step"), 2),
            number(entry.get("state_per_weight"), 2),
            f"{entry['seconds']:.1f}",
            entry["worst_bin"] or "",
        ])  # fmt: skip
    return html_table(headings, rows, bold=[at for at, entry in enumerate(results["summary"]) if entry["ours"]])


def rate_figure(results: Mapping[str, Any]) -> go.Figure:
    """Median score over the learning rate, one line per method, bars from least to greatest."""
    style, figure = style_of(results["summary"]), go.Figure()
    for entry in results["summary"]:
        colour, dash = style[entry["method"]]
        held = [point for point in entry["curve"] if point["median"] is not None]
        median = [point["median"] for point in held]
        figure.add_scatter(
            x=[point["lr"] for point in held],
            y=median,
            name=html.escape(entry["method"]),  # plotly reads some HTML in its texts
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2.2},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [point["max"] - y for point, y in zip(held, median, strict=True)],
                "arrayminus": [y - point["min"] for point, y in zip(held, median, strict=True)],
                "thickness": 1,
                "width": 3,
            },
            customdata=[["" if p["strength"] is None else f", strength {p['strength']:g}"] for p in held],
            hovertemplate="%{y:.4g} at lr %{x:.3g}%{customdata[0]}<extra>" + html.escape(entry["method"]) + "</extra>",
        )
    lrs = sorted({point["lr"] for entry in results["summary"] for point in entry["curve"]})
    figure.update_xaxes(type="log", title="learning rate", tickvals=lrs, ticktext=[f"{lr:.3g}" for lr in lrs])
    figure.update_yaxes(title=html.escape(results["workload"]["metric"]))
    figure.update_layout(height=460, legend=_LEGEND)
    return figure


def loss_figure(results: Mapping[str, Any]) -> go.Figure:
    """Training loss of each method's best cell, median over its runs."""
    style, figure = style_of(results["summary"]), go.Figure()
    for entry in results["summary"]:
        rows = [
            row for row in results["cells"]
            if (row["method"], row["strength"], row["lr"]) == (entry["method"], entry["strength"], entry["lr"])
        ]  # fmt: skip
        loss = median_curve([row["losses"] for row in rows])
        stride = max(row["steps_run"] for row in rows) / max(len(loss), 1)
        colour, dash = style[entry["method"]]
        figure.add_scatter(
            x=[round((at + 1) * stride) for at in range(len(loss))],
            y=loss,
            name=html.escape(entry["method"]),
            line={"color": colour, "dash": dash},
            hovertemplate="%{y:.4g} at step %{x}<extra>" + html.escape(entry["method"]) + "</extra>",
        )
    positive = [y for trace in figure.data for y in trace.y if y is not None and y > 0]
    wide = bool(positive) and max(positive) > 20 * min(positive)
    figure.update_yaxes(title="training loss", type="log" if wide else "linear", **({"dtick": 1} if wide else {}))
    figure.update_xaxes(title="step")
    figure.update_layout(height=420, legend=_LEGEND)
    return figure


def median_curve(curves: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Point by point the median of curves of any length; None where most have ended or are not finite.

    >>> median_curve([[3.0, 1.0], [5.0, None], [4.0]])
    [4.0, None]
    """
    made: list[float | None] = []
    for at in range(max(map(len, curves), default=0)):
        here = [curve[at] if at < len(curve) else None for curve in curves]
        finite = [value for value in here if value is not None]
        made.append(statistics.median(finite) if 2 * len(finite) > len(curves) else None)
    return made
