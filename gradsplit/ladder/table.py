"""A ladder as rows of text, and as a figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from .ladder import Ladder
from .recipe import Climb

COLUMNS = ("bin", "gradient", "safe step", "ended by", "radius", "spread", "kink", "2nd", "3rd", "last")


def ladder_rows(ladder: Ladder, count: int | None = None) -> list[dict[str, str]]:
    """Return one row per bin, the smallest safe step first.

    The columns are the length of the direction, the safe step and what ends it, the radius and its spread, and the
    kink. The last ones are the derivatives of order 2, 3 and K by the step. Steps are learning rates of plain gradient
    descent.
    """
    order_B = np.argsort(np.minimum(ladder.safe_step_B, ladder.reach_B), kind="stable")[:count]
    return [
        dict(
            zip(
                COLUMNS,
                (
                    ladder.names[b],
                    f"{ladder.length_B[b]:.3g}",
                    f"{ladder.safe_step_B[b]:.3g}",
                    ladder.limited_by[b],
                    f"{ladder.radius_B[b]:.3g}",
                    f"{100 * ladder.radii[b].spread:.0f} %",
                    f"{ladder.kink_B[b]:.3g}",
                    *(ladder.derivative.text((k, int(b))) if k <= ladder.order else "" for k in (2, 3)),
                    ladder.derivative.text((ladder.order, int(b))),
                ),
                strict=True,
            )
        )
        for b in order_B
    ]


def ladder_table(ladder: Ladder, count: int | None = 20) -> str:
    """Return these rows as aligned text, with the loss and the order above them."""
    rows = ladder_rows(ladder, count)
    cells = [list(COLUMNS), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    hidden = len(ladder.names) - len(rows)
    head = f"loss {ladder.loss:.6g}, orders 1 to {ladder.order}, {len(ladder.names)} bins" + (
        f", {hidden} not shown" if hidden else ""
    )
    return "\n".join([head, *lines])


def climb_rows(climb: Climb, b: int = 0) -> list[dict[str, str]]:
    """Return a recipe, step by step for one bin: what it says, what it is, and what float32 and float64 give."""
    rows = []
    for s, step in enumerate(climb.steps):
        said = "" if np.isnan(climb.said.sign[s, b]) else climb.said.text((s, b))
        rows.append(
            {
                "step": str(s + 1),
                "operator": step.operator,
                "said": " -> ".join("" if k is None else str(k) for k in (step.order_in, step.order_out)),
                "true order": str(int(climb.order_true[s])),
                "value": climb.value.text((s, b)),
                "derivative of the said order": said,
                "float32": f"{climb.float32[s, b]:.3g}",
                "float64": f"{climb.float64[s, b]:.3g}",
            }
        )
    return rows


def ladder_figure(ladder: Ladder, count: int = 8) -> dict[str, Any]:
    """Draw |c_k R^k| over k for the bins with the smallest safe steps; a line is flat if its radius is right.

    Returns:
        A plotly figure as plain data: ``plotly.graph_objects.Figure(ladder_figure(ladder))`` draws it.
    """
    k = np.arange(1, ladder.order + 1)
    traces = []
    for b in np.argsort(np.minimum(ladder.safe_step_B, ladder.reach_B), kind="stable")[:count]:
        radius = ladder.radius_B[b] if np.isfinite(ladder.radius_B[b]) else 1.0
        size = ladder.coefficient.log10[1:, b] + k * np.log10(radius)
        traces.append(_line(k, size, f"{ladder.names[b]} (R = {radius:.3g})"))
    return _figure(traces, "Taylor coefficients at the radius", "order k", "log10 |c_k R^k|")


def climb_figure(climb: Climb, b: int = 0) -> dict[str, Any]:
    """Draw log10 |log10 |value|| over the recipe's steps, and where float32 and float64 fail; plain data, as above."""
    steps = np.arange(1, len(climb.steps) + 1)
    with np.errstate(divide="ignore"):
        traces = [
            _line(steps, np.log10(np.abs(values.log10[:, b])), name)
            for values, name in ((climb.value, "recipe"), (climb.said, "true derivative of the said order"))
        ]
    figure = _figure(traces, "The recipe, step by step", "step", "log10 |log10 |value||")
    died = {name: int(climb.died_B(name)[b]) for name in ("float32", "float64")}
    figure["layout"]["shapes"] = [
        {"type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot"}}
        for step in died.values()
        if step
    ]
    figure["layout"]["annotations"] = [
        {
            "x": step,
            "yref": "paper",
            "y": 1.0 - 0.06 * place,
            "text": f"{name} dies",
            "showarrow": False,
            "xanchor": "left",
        }
        for place, (name, step) in enumerate(died.items())
        if step
    ]
    return figure


def _line(x: np.ndarray, y: np.ndarray, name: str) -> dict[str, Any]:
    shown: list[float | None] = [float(v) if np.isfinite(v) else None for v in y]
    return {"type": "scatter", "mode": "lines", "x": x.tolist(), "y": shown, "name": name}


def _figure(traces: list[dict[str, Any]], title: str, x: str, y: str) -> dict[str, Any]:
    layout = {"title": {"text": title}, "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return {"data": traces, "layout": layout}
