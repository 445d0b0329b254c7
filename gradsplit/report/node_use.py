"""How every node of a run fared: its norms as measured and after control, and how often it was touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..record import Series

__all__ = ["NodeUse", "uses_of"]


@dataclass(frozen=True)
class NodeUse:
    """How one node fared: norms as measured and after control, and how often it was touched."""

    node: int
    name: str
    median: float
    largest: float
    largest_step: int
    largest_after: float
    scaled: float
    zeroed: int


def uses_of(series: Series) -> tuple[NodeUse, ...]:
    """Return how every node fared, medians of the windows' first rows and extremes of all rows."""
    outline, made = series.stream.outline, []
    for node in range(outline.num_nodes):
        leaves = outline.leaves_of_N[node]
        with np.errstate(over="ignore"):
            norm_W = np.sqrt((series.norm(leaves).astype(np.float64) ** 2).sum(axis=1))
            peak_WL = series.peak(leaves).astype(np.float64)
            peak_W = np.sqrt((peak_WL**2).sum(axis=1)) if series.thinned else norm_W
        finite = np.isfinite(peak_W)
        best = int(np.argmax(np.where(finite, peak_W, -1.0)))
        kept, scaled, zeroed = series.kept(leaves), 0.0, 0
        after_W = peak_W
        if kept is not None and series.scaled_WL is not None and series.zeroed_WL is not None:
            after_W = np.sqrt(((np.where(np.isfinite(peak_WL), peak_WL, 0.0) * kept) ** 2).sum(axis=1))
            bins = max(1, int(outline.bins_L[leaves].sum()))
            scaled = float(series.scaled_WL[:, leaves].sum() / (bins * series.num_rows))
            zeroed = int(series.zeroed_WL[:, leaves].sum())
        made.append(
            NodeUse(
                node,
                outline.names_N[node],
                float(np.median(norm_W[np.isfinite(norm_W)])) if np.isfinite(norm_W).any() else float("nan"),
                float(peak_W[best]) if finite.all() else float("inf"),
                int(series.step_W[best if finite.all() else int(np.argmin(finite))]),
                float(after_W[np.isfinite(after_W)].max(initial=0.0)),
                scaled,
                zeroed,
            )
        )
    return tuple(made)
