"""The pictures of a run: norms and loss on one time axis, the heat map of nodes and steps, a close-up of the departure.

Shape suffixes: _C one entry a column of the picture, _L one a leaf.
"""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from .account import StreamAccount

__all__ = ["curves", "heat_map", "pooled"]

COLUMNS = 600
POINTS = 2000
MARKS = 2000
CLOSE = 60  # windows on either side of the departure
CURVES = 6
# After Okabe and Ito: distinct for most colour-blind readers.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A")


def pooled(values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest finite value of each of at most ``columns`` equal runs along axis 0, and where they begin.

    >>> pooled(np.array([1.0, 5.0, 2.0, np.nan]), 2)[0].tolist()
    [5.0, 2.0]
    """
    starts = np.unique(np.arange(min(columns, len(values))) * len(values) // max(1, min(columns, len(values))))
    finite = np.where(np.isfinite(values), values, -np.inf)
    best = np.maximum.reduceat(finite, starts, axis=0)
    return np.where(np.isneginf(best), np.nan, best), starts


def curves(account: StreamAccount) -> go.Figure:
    """Norms of the whole gradient and of the top modules on a logarithmic axis, the loss on the right."""
    series, outline = account.series, account.stream.outline
    figure = go.Figure()
    total, at = pooled(series.total_R.astype(np.float64), POINTS)
    steps = series.step_R[at]
    figure.add_scatter(x=steps, y=total, name="whole gradient", line={"color": "#1c1c1c", "width": 2})
    nodes = outline.children(0)
    while len(nodes) == 1 and outline.children(nodes[0]):
        nodes = outline.children(nodes[0])
    ranked = sorted(nodes, key=lambda node: -account.uses[node].median if account.uses[node].median > 0 else 0.0)
    for node, colour in zip(ranked[:CURVES], COLOURS, strict=False):
        values, starts = pooled(series.node_peak(node), POINTS)
        figure.add_scatter(
            x=series.step_W[starts],
            y=values,
            name=html.escape(outline.names_N[node]),
            line={"color": colour, "width": 1},
        )
    loss, at = pooled(series.loss_R.astype(np.float64), POINTS)
    if np.isfinite(loss).any():
        figure.add_scatter(
            x=series.step_R[at], y=loss, name="loss (right)", yaxis="y2", line={"color": "#D55E00", "dash": "dot"}
        )
    if account.first is not None:
        figure.add_vline(x=account.first.step, line={"color": "#B2182B", "dash": "dash", "width": 1})
    figure.update_layout(
        xaxis={"title": "step"},
        yaxis={"title": "norm as measured", "type": "log", "exponentformat": "power"},
        yaxis2={"title": "loss", "overlaying": "y", "side": "right", "showgrid": False},
        legend={"orientation": "h", "y": 1.14},
        hovermode="x unified",
    )
    return figure


def heat_map(account: StreamAccount, *, close: bool = False) -> go.Figure:
    """Every recorded leaf (down) at every step (across): its norm over its own median, as a power of ten.

    Args:
        account: of one optimizer.
        close: only the windows around the departure, each on its own.
    """
    series, outline = account.series, account.stream.outline
    window = slice(None)
    if close and account.first is not None:
        window = slice(max(0, account.first.window - CLOSE), account.first.window + CLOSE)
    step_W = series.step_W[window]
    z_CL, at = _relative(account, window)
    figure = go.Figure(
        go.Heatmap(
            x=np.asarray(step_W[at]) if _rising(step_W[at]) else at,
            y=[html.escape(name) for name in outline.leaf_names],
            z=np.ascontiguousarray(z_CL.T, dtype=np.float32),
            zmin=-3,
            zmax=3,
            colorscale=[[0, "#2166ac"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#67001f"]],
            colorbar={"title": "norm / own median", "tickvals": [-3, -2, -1, 0, 1, 2, 3],
                      "ticktext": ["1/1000", "1/100", "1/10", "1", "10", "100", "1000"]},
            hovertemplate="%{y}<br>step %{x}<br>10<sup>%{z:.2f}</sup> times its median<extra></extra>",
        )
    )  # fmt: skip
    _mark_lost(figure, account, window, at, step_W)
    figure.update_layout(
        xaxis={"title": "step"},
        yaxis={"autorange": "reversed", "automargin": True, "tickfont": {"size": 10}},
        height=int(min(900, max(320, 12 * outline.num_leaves + 160))),
    )
    return figure


def _relative(account: StreamAccount, window: slice) -> tuple[np.ndarray, np.ndarray]:
    """(C, L) log10 of norm over the leaf's median, nan where it was 0 or not finite; and where columns begin."""
    series, columns, at = account.series, [], np.zeros(0, dtype=np.int64)
    usual = {use.node: use.median for use in account.uses}
    for leaf, node in enumerate(account.stream.outline.nodes_L.tolist()):
        best, at = pooled(series.peak(leaf)[window].astype(np.float64), COLUMNS)
        with np.errstate(divide="ignore", invalid="ignore"):
            column = np.log10(best / usual[node])
        columns.append(np.where(np.isfinite(column), column, np.nan))
    return np.stack(columns, axis=1), at


def _mark_lost(figure: go.Figure, account: StreamAccount, window: slice, at: np.ndarray, step_W: np.ndarray) -> None:
    """Crosses where a norm was not finite."""
    names = account.stream.outline.leaf_names
    bad_WL = (account.series.peak_bits_WL[window] & 0x7F80) == 0x7F80  # all exponent bits of a bfloat16: inf or nan
    rows, leaves = np.nonzero(np.maximum.reduceat(bad_WL, at, axis=0))
    if not len(rows):
        return
    x = step_W[at] if _rising(step_W[at]) else at
    figure.add_scatter(
        x=x[rows[:MARKS]],
        y=[html.escape(names[leaf]) for leaf in leaves[:MARKS]],
        mode="markers",
        marker={"symbol": "x", "color": "#1c1c1c", "size": 6},
        name="not finite",
        hovertemplate="%{y}<br>step %{x}<br>not finite<extra></extra>",
        showlegend=False,
    )


def _rising(values: np.ndarray) -> bool:
    """Whether steps can be an axis: a closure called several times a step repeats them."""
    return bool((np.diff(values) > 0).all())
