"""The page of the demonstration: table, training loss, and the norm of every node over the steps, before and after."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...watch.report.html import Section, figure_html, html_table, page, text
from .rate_curve import line_style

__all__ = ["demo_page", "heat_figure", "loss_figure"]

_NOTHING = 1e-12  # a norm of zero has no logarithm


def demo_page(scenes: Sequence[Mapping[str, Any]], evidence: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        scenes: one per workload, from `gradsplit.lab.demo.collect`.
        evidence: where the numbers come from.
    """
    sections = [section for scene in scenes for section in _sections(scene)]
    lead = (
        "The same model, data, seed and number of steps for every row. Tuned rows stand at the learning rate and "
        "strength that a sweep chose for that method; untuned rows have nothing to choose but the learning "
        "rate. Methods that do not help are shown as they are."
    )
    return page("gradsplit demo", lead, sections, evidence)


def _sections(scene: Mapping[str, Any]) -> Iterable[Section]:
    name, way = scene["workload"], "higher is better" if scene["higher_is_better"] else "lower is better"
    yield Section(
        f"{name}: the table",
        f"{scene['title'][:1].upper()}{scene['title'][1:]}. {scene['expect']} {scene['steps']} steps with "
        f"{scene['optimizer']}; {scene['metric']}: {way}. To target: steps until "
        "the training loss is down to where the tuned global clip ends.",
        [_table(scene), text("What chose learning rate and strength: " + _choices(scene["rows"]))],
    )
    yield Section(
        f"{name}: training loss",
        "Each point is the mean of a few steps. Click a name to hide its line, twice to see it alone.",
        [loss_figure(scene)],
    )
    watched = [row for row in scene["rows"] if row["norms"]]
    if watched:
        yield Section(
            f"{name}: the norm of every node, before and after",
            "Each line of the map is a node of the module tree: the whole gradient, modules, tensors. Colour: power of "
            "ten of its norm; black: not finite, or the run had ended. Left as measured after backward, right what "
            "reached the optimizer. GSO and the default in Adam's place bound inside their update, so there the two "
            "are the same.",
            [figure_html(heat_figure(watched))],
        )


def _table(scene: Mapping[str, Any]) -> str:
    metric = scene["metric"]
    headings = [
        "method",
        "lr",
        "strength",
        metric,
        "to target",
        "diverged",
        "bins",
        "scaled",
        "not finite",
        "worst bin × mean scale",
        "s",
    ]
    rows = []
    for row in scene["rows"]:
        worst = row["worst"][0] if row["worst"] else None
        rows.append([
            row["label"],
            f"{row['lr']:g}",
            "" if row["strength"] is None else f"{row['strength']:g}",
            "–" if row["score"] is None else f"{row['score']:.3f}",
            "never" if row["steps_to_target"] is None else f"{row['steps_to_target']}",
            _verdict(row),
            f"{row['num_bins']}" if row["num_bins"] else "",
            _percent(row["scaled_share"]),
            _percent(row["zeroed_share"]),
            "" if worst is None else f"{worst[0]} × {worst[1]:.1g}",
            f"{row['seconds']:.1f}",
        ])  # fmt: skip
    return html_table(headings, rows, bold=[at for at, row in enumerate(scene["rows"]) if row["ours"]])


def _choices(rows: Sequence[Mapping[str, Any]]) -> str:
    """What chose, each with its rows in brackets, in the order of the table."""
    chosen: dict[str, list[str]] = {}
    for row in rows:
        chosen.setdefault(row["chosen_by"], []).append(row["label"])
    return "; ".join(f"{source} ({' / '.join(labels)})" for source, labels in chosen.items()) + "."


def _verdict(row: Mapping[str, Any]) -> str:
    if row["diverged"]:
        return f"at step {row['steps_run']}"
    return "worse than at start" if row["ends_above_start"] else "no"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %" if share else "0"


def loss_figure(scene: Mapping[str, Any]) -> go.Figure:
    """Training loss of every row, one line each; ours solid, other people's dashed."""
    figure = go.Figure()
    style = line_style([(row["label"], row["ours"]) for row in scene["rows"]])
    for row in scene["rows"]:
        stride = row["steps_run"] / max(len(row["losses"]), 1)
        figure.add_scatter(
            x=[round((at + 1) * stride) for at in range(len(row["losses"]))],
            y=row["losses"],
            name=html.escape(row["label"]),  # plotly reads some HTML in its texts
            line={"color": style[row["label"]][0], "dash": style[row["label"]][1], "width": 1.8},
            hovertemplate="%{y:.4g} at step %{x}<extra>" + html.escape(row["label"]) + "</extra>",
        )
    finite = [loss for row in scene["rows"] for loss in row["losses"] if loss is not None and loss > 0]
    log = bool(finite) and max(finite) > 20 * min(finite)
    figure.update_yaxes(title="training loss", type="log" if log else "linear", **({"dtick": 1} if log else {}))
    if log:  # a run that explodes to 1e30 must not press all others into one line
        low, high = min(finite), min(max(finite), 1e4 * sorted(finite)[len(finite) // 2])
        figure.update_yaxes(range=[math.log10(low) - 0.1, math.log10(high) + 0.1])
    figure.update_xaxes(title="step")
    figure.update_layout(height=420)
    return figure


def heat_figure(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Norms of every node over the steps, before | after, one method at a time, chosen from a menu.

    Args:
        rows: with "label" and "norms": names, levels, steps, before and after as lists.
    """
    maps = [(_powers(row["norms"]["before"]), _powers(row["norms"]["after"])) for row in rows]
    live = [part[np.isfinite(part) & (part > np.log10(_NOTHING))] for pair in maps for part in pair]
    finite = np.concatenate([*live, np.zeros(1)])
    low, high = np.floor(np.quantile(finite, 0.01)), np.ceil(np.quantile(finite, 0.995))
    shown = next((at for at, row in enumerate(rows) if row["method"] == "default"), 0)
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=("before", "after"))
    for at, (row, pair) in enumerate(zip(rows, maps, strict=True)):
        norms = row["norms"]
        labels = [
            html.escape(_indented(name, level)) for name, level in zip(norms["names"], norms["levels"], strict=True)
        ]
        for side, powers in enumerate(pair):
            figure.add_trace(
                go.Heatmap(
                    z=powers.T.astype(np.float32), x=norms["steps"], y=labels, zmin=low, zmax=max(high, low + 1),
                    colorscale="Viridis", visible=at == shown, showscale=side == 1,
                    colorbar={"title": "log10 norm", "thickness": 14},
                    hovertemplate="%{y}<br>step %{x}: 10^%{z:.2f}<extra></extra>",
                ),
                row=1, col=side + 1,
            )  # fmt: skip
    buttons = [
        {
            "label": html.escape(row["label"]),
            "method": "update",
            "args": [{"visible": [i // 2 == at for i in range(2 * len(rows))]}],
        }
        for at, row in enumerate(rows)
    ]
    num_nodes = len(rows[0]["norms"]["names"])
    figure.update_yaxes(
        autorange="reversed", tickfont={"size": 10, "family": "ui-monospace, monospace"}, automargin=True
    )
    figure.update_xaxes(title="step", showgrid=False)
    figure.update_yaxes(showgrid=False)
    menu = {
        "buttons": buttons,
        "active": shown,
        "x": 0,
        "xanchor": "left",
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": 30},
    }
    figure.update_layout(height=max(380, 150 + 14 * num_nodes), plot_bgcolor="#111", updatemenus=[menu])
    return figure


def _powers(norms: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Powers of ten, two digits after the point; NaN where a norm was not finite."""
    values = np.array([[np.nan if value is None else value for value in line] for line in norms], dtype=np.float64)
    made: np.ndarray = np.round(np.log10(np.maximum(values, _NOTHING)), 2)
    return made


def _indented(name: str, level: str) -> str:
    if level == "root":
        return "whole gradient"
    return name if level == "tensor" else f"{name}.*"
