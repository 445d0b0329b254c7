"""The chain drawn as a path from the loss to the input: width = signal, colour = gain."""

from __future__ import annotations

import html
import math
from typing import Any

from gradsplit.chain.chain import Chain

WIDEST, NARROWEST = 26.0, 1.5
DECADES = 6.0
"""A path this many decades below the largest signal has the narrowest width."""


def widths(signals: list[float]) -> list[float]:
    """Widths in pixels, linear in the logarithm of the signal between the largest and `DECADES` below it.

    >>> widths([1.0, 1e-6, 0.0])
    [26.0, 1.5, 1.5]
    """
    known = [math.log10(s) for s in signals if s > 0 and math.isfinite(s)]
    top = max(known, default=0.0)
    drawn = []
    for signal in signals:
        level = math.log10(signal) if signal > 0 and math.isfinite(signal) else top - DECADES
        share = min(1.0, max(0.0, 1 + (level - top) / DECADES))
        drawn.append(NARROWEST + (WIDEST - NARROWEST) * share)
    return drawn


def colour(gain: float) -> str:
    """Blue below one, grey at one, red above; full colour at a gain of ten, or a tenth.

    >>> colour(1.0), colour(10.0)
    ('rgb(160,160,160)', 'rgb(200,40,40)')
    """
    if not gain > 0 or not math.isfinite(gain):
        return "rgb(160,160,160)"
    tone = max(-1.0, min(1.0, math.log10(gain)))
    end = (200, 40, 40) if tone > 0 else (40, 80, 200)
    mixed = [round(160 + (goal - 160) * abs(tone)) for goal in end]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"


def chain_figure(chain: Chain) -> Any:
    """Draw a chain with plotly.

    Args:
        chain: of `gradient_chain`.

    Returns:
        A `plotly.graph_objects.Figure`: one stroke a link from log10 of the cumulative gain above it to its own.
    """
    import plotly.graph_objects as go

    links = [link for link in chain.links if math.isfinite(link.cumulative)]
    by_name = {link.name: place for place, link in enumerate(links)}
    figure = go.Figure()
    for place, (link, width) in enumerate(zip(links, widths([link.signal for link in links]), strict=True)):
        before = by_name.get(link.above, place)
        # the stroke into a link has the colour of the factor that the signal has just passed
        tone = colour(links[before].gain) if before != place else colour(1.0)
        figure.add_trace(
            go.Scatter(
                x=[before, place],
                y=[links[before].cumulative, link.cumulative],
                mode="lines+markers",
                line={"width": width, "color": tone},
                marker={"size": max(5.0, width), "color": colour(link.gain)},
                hovertext=f"{html.escape(link.name)} ({html.escape(link.kind)})<br>"
                f"signal {link.signal:.3g}<br>gain {link.gain:.3g}"
                f"<br>activation {link.activation:.3g}",
                hoverinfo="text",
                showlegend=False,
            )
        )
    figure.update_layout(
        title="The backward chain: width = signal, colour = gain (red above one, blue below)",
        xaxis={
            "tickvals": list(range(len(links))),
            "ticktext": [html.escape(link.name) for link in links],
            "title": "from the loss down",
        },
        yaxis={"title": "log10 of the cumulative gain from the loss"},
        template="plotly_white",
    )
    return figure
