"""From rows to named numbers, the same for every service that takes scalars."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..record import Rows, Stream

__all__ = ["scalars_of", "top_nodes"]

_MAX_MODULES = 30


def top_nodes(stream: Stream) -> list[int]:
    """Return the nodes worth a curve each: children of the root; the level below where the root has only one child."""
    outline, nodes = stream.outline, stream.outline.children(0)
    while len(nodes) == 1 and outline.children(nodes[0]):
        nodes = outline.children(nodes[0])
    return nodes[:_MAX_MODULES]


def scalars_of(rows: Rows) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Yield (step, time, {name: value}); non-finite norms are counted under ``nonfinite`` and otherwise left out.

    Names: ``norm/all``, ``norm/<module>``, ``loss``, ``lr``, ``own_scale``, ``nonfinite``; under control ``kept/all``
    (norm after / before), ``scaled``, ``zeroed`` (bins). A second optimizer's begin with ``1/``, and so on.
    """
    outline, stream = rows.stream.outline, rows.stream
    nodes = top_nodes(stream)
    norms, total = rows.node_norms(nodes), rows.total_S
    prefix = f"{stream.index}/" if stream.index else ""
    after = None
    if rows.kept_SL is not None:
        after = (((rows.norm_SL.astype("f8") * rows.kept_SL) ** 2).sum(axis=1)) ** 0.5
    for s in range(len(rows)):
        values = {"norm/all": float(total[s]), "loss": float(rows.loss_S[s]), "lr": float(rows.lr_S[s])}
        values |= {f"norm/{outline.names_N[node]}": float(norms[s, i]) for i, node in enumerate(nodes)}
        values["own_scale"] = float(rows.own_scale_S[s])
        if after is not None and rows.scaled_SL is not None and rows.zeroed_SL is not None:
            values["kept/all"] = float(after[s] / total[s]) if total[s] else 1.0
            values["scaled"] = float(rows.scaled_SL[s].sum())
            values["zeroed"] = float(rows.zeroed_SL[s].sum())
        finite = {prefix + name: value for name, value in values.items() if math.isfinite(value)}
        finite[f"{prefix}nonfinite"] = float(sum(not math.isfinite(value) for value in rows.norm_SL[s].tolist()))
        yield int(rows.step_S[s]), float(rows.time_S[s]), finite
