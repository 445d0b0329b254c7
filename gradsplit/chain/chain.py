"""Chain and Link, which `gradient_chain` returns, and their picture."""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Link:
    """One factor of the chain: what a module, with the operations before it, does to the signal on its way down.

    Attributes:
        name: the module, "(loss)" for the loss; "#2" marks a second call.
        module: dotted name of the module.
        kind: its class.
        signal: L2 norm of the signal that enters the factor, at the module's output; units of loss / activation.
        leaving: L2 norm of the signal that leaves it towards all activations that it read.
        gain: leaving / signal, no unit; NaN at the bottom, where nothing below takes a signal.
        cumulative: log10(signal / signal that leaves the loss).
        operator_norm: largest singular value of the factor, NaN if it was not measured.
        activation: root mean square of the module's output.
        forward_gain: activation / root mean square of the module's inputs: the counterpart of the gain in the forward
            pass.
        parameter_norm: L2 norm of the gradient of the module's own parameters, NaN if it has none.
        finite_in: whether the module's inputs were finite.
        finite_out: whether its output was finite.
        signal_in_finite: whether the entering signal was finite.
        signal_out_finite: whether the leaving signal was finite.
        above: name of the link that sends it the largest signal, "" for the loss.
    """

    name: str
    module: str
    kind: str
    signal: float
    leaving: float
    gain: float
    cumulative: float
    operator_norm: float
    activation: float
    forward_gain: float
    parameter_norm: float
    finite_in: bool
    finite_out: bool
    signal_in_finite: bool
    signal_out_finite: bool
    above: str = ""

    @property
    def share(self) -> float:
        """Gain as a share of the factor's operator norm, 0 to 1; it is 1 if the signal has the worst direction."""
        return self.gain / self.operator_norm if self.operator_norm > 0 else math.nan


@dataclass
class Recurrence:
    """The chain through the time steps of one layer of a recurrent module.

    Attributes:
        name: the module and its layer.
        gain_T: gain of every step's factor for the signal that passes it, last step first; no unit. It is NaN where no
            signal enters, as in the backward direction below the first output that the loss reads.
        exponents: leading Lyapunov exponents of the state's dynamics, natural logarithm per step, largest first.
    """

    name: str
    gain_T: list[float]
    exponents: list[float]

    @property
    def cumulative(self) -> float:
        """log10 of the product of the gains of the steps that a signal enters; NaN if none does."""
        known = [gain for gain in self.gain_T if not math.isnan(gain)]
        return sum(math.log10(gain) if gain > 0 else -math.inf for gain in known) if known else math.nan


@dataclass
class Chain:
    """The gradient of one batch, factored.

    Attributes:
        loss: the loss.
        links: from the loss down to the input.
        recurrences: chains through time of the recurrent modules.
        ends: "(input)" -> L2 norm of the signal that arrives at the model's floating inputs.
        calls: (module, inputs finite, output finite) of every leaf module's call, in the order of the forward pass.
    """

    loss: float
    links: list[Link]
    recurrences: list[Recurrence] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)
    calls: list[tuple[str, bool, bool]] = field(default_factory=list)

    def link(self, name: str) -> Link:
        """The link of that name.

        Raises:
            KeyError: there is no such link; the message lists the names.
        """
        for link in self.links:
            if link.name == name:
                return link
        known = ", ".join(link.name for link in self.links)
        raise KeyError(f"Chain.link({name!r}): expected the name of a link, got another. The chain has {known}.")

    def way(self, name: str) -> list[Link]:
        """The links that the strongest signal passes on its way from the loss to one link, both ends included."""
        by_name = {link.name: link for link in self.links}
        way = [self.link(name)]
        while way[-1].above in by_name and len(way) <= len(self.links):
            way.append(by_name[way[-1].above])
        return way[::-1]

    def worst(self, k: int = 5) -> list[Link]:
        """The links with the largest gains, without the loss."""
        finite = [link for link in self.links[1:] if math.isfinite(link.gain)]
        return sorted(finite, key=lambda link: -link.gain)[:k]

    def text(self) -> str:
        """The chain as a table, one line per link."""
        wide = max([len(link.name) for link in self.links] + [4])
        lines = [f"{'link':<{wide}}  {'signal':>9}  {'gain':>8}  {'log10':>6}  {'activation':>10}  {'forward':>8}"]
        for link in self.links:
            lines.append(
                f"{link.name:<{wide}}  {link.signal:9.3g}  {_short(link.gain):>8}  {_short(link.cumulative, 2):>6}  "
                f"{link.activation:10.3g}  {_short(link.forward_gain):>8}"
            )
        for steps in self.recurrences:
            exponents = ", ".join(f"{value:+.3f}" for value in steps.exponents)
            lines.append(
                f"{steps.name}: {len(steps.gain_T)} steps, log10 of their product {steps.cumulative:+.2f}, "
                f"leading Lyapunov exponents {exponents}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON; None stands for figures that do not exist."""
        return {
            "loss": _plain(self.loss),
            "links": [{key: _plain(value) for key, value in asdict(link).items()} for link in self.links],
            "recurrences": [
                {"name": r.name, "gain_T": [_plain(g) for g in r.gain_T], "exponents": [_plain(e) for e in r.exponents]}
                for r in self.recurrences
            ],
            "ends": {name: _plain(value) for name, value in self.ends.items()},
        }

    def figure(self) -> Any:
        """The chain drawn as a path, a plotly figure: the width is the signal, the colour the gain."""
        return chain_figure(self)


def _short(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


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
    """Blue below one, grey at one, red above one; the colour is full at a gain of ten or of a tenth.

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
        chain: from `gradient_chain`.

    Returns:
        A `plotly.graph_objects.Figure`. One stroke per link goes from the link above to the link itself, in the colour
        of the factor that the signal passes in between. One marker per link has the colour of the link's own factor.
    """
    import plotly.graph_objects as go

    links = [link for link in chain.links if math.isfinite(link.cumulative)]
    by_name, width = {link.name: place for place, link in enumerate(links)}, widths([link.signal for link in links])
    figure = go.Figure()
    for place, link in enumerate(links):
        before = by_name.get(link.above, place)
        if before != place:
            figure.add_scatter(
                x=[before, place],
                y=[links[before].cumulative, link.cumulative],
                mode="lines",
                line={"width": width[place], "color": colour(links[before].gain)},
                hoverinfo="skip",
                showlegend=False,
            )
    figure.add_scatter(  # after all strokes, so that none covers a marker
        x=list(range(len(links))),
        y=[link.cumulative for link in links],
        mode="markers",
        marker={
            "size": [max(8.0, size) for size in width],
            "color": [colour(link.gain) for link in links],
            "line": {"width": 1, "color": "white"},
        },
        hovertext=[
            f"{html.escape(link.name)} ({html.escape(link.kind)})<br>signal {link.signal:.3g}<br>gain {link.gain:.3g}"
            f"<br>activation {link.activation:.3g}"
            for link in links
        ],
        hoverinfo="text",
        showlegend=False,
    )
    figure.update_layout(
        title="width: signal; colour: gain (red > 1, blue < 1)",
        xaxis={
            "tickvals": list(range(len(links))),
            "ticktext": [html.escape(link.name) for link in links],
            "title": "from the loss down",
        },
        yaxis={"title": "log10 of the cumulative gain from the loss"},
        template="plotly_white",
    )
    return figure
