"""The share step from its formulas, in float64 NumPy; shares no code with the package.

Every tensor is written down by hand as a `Sheet`: what it is, the matrix that it is seen as, and its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Box = tuple[int, int, int, int]

LEAST = {"matrix": 0.1, "embedding": 0.1, "vector": 1.0}
SHARE = {"matrix": 1.0, "embedding": 1.0, "vector": 1 / 3}
LONGEST = {"matrix": 3.0, "embedding": np.inf, "vector": np.inf}


@dataclass
class Sheet:
    """One tensor as a matrix.

    Attributes:
        what: "matrix", "embedding" or "vector".
        rows, cols: the matrix; a complex entry is one column, and two numbers.
        blocks: equal blocks of rows that are made orthogonal one by one.
        boxes: blocks of other forms: first and last row, first and last column, half open.
        direction: "orthogonal" or "adam"; None: that of its kind.
    """

    what: str
    rows: int
    cols: int
    blocks: int = 1
    boxes: tuple[Box, ...] = ()
    direction: str | None = None

    def __post_init__(self) -> None:
        if self.direction is None:
            self.direction = "orthogonal" if self.what == "matrix" else "adam"
        size = self.rows // self.blocks if self.blocks else 0
        self.boxes = self.boxes or tuple((i * size, (i + 1) * size, 0, self.cols) for i in range(self.blocks))


def newton_schulz(x: Array) -> Array:
    """Five steps of Muon's quintic; the smaller side is multiplied."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.conj().T).conj().T
    x = x / max(np.sqrt((np.abs(x) ** 2).sum()), 1e-30)
    for _ in range(5):
        gram = x @ x.conj().T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def length(x: Array) -> Array:
    """The length of each row."""
    return np.sqrt((np.abs(x) ** 2).sum(axis=1))


@dataclass
class Oracle:
    """GSO over sheets.

    Args:
        sheets: one per tensor.
        weights: one per tensor, of any shape; kept as matrices.
        collective: whether the collective rule is on.
    """

    sheets: list[Sheet]
    weights: list[Array]
    collective: bool = True
    fired: list[int] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        wide = [np.complex128 if np.iscomplexobj(w) else np.float64 for w in self.weights]
        pairs = list(zip(self.sheets, self.weights, wide, strict=True))
        self.weights = [np.array(w, dtype=d).reshape(s.rows, s.cols) for s, w, d in pairs]
        self.momentum = [np.zeros_like(w) for w in self.weights]
        self.second: list[Any] = [np.zeros((*w.shape, 2)) for w in self.weights]
        self.counts = [0] * len(self.weights)
        self.recent = [np.zeros(s.rows) for s in self.sheets]
        self.longest = [np.zeros(s.rows) for s in self.sheets]
        self.series = 0.0
        self.calm = 1.0

    def step(
        self,
        gradients: list[Array | None],
        lr: float = 0.03,
        decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        """One update; None passes a tensor over."""
        given = [
            None if g is None else np.asarray(g, dtype=w.dtype).reshape(w.shape)
            for g, w in zip(gradients, self.weights, strict=True)
        ]
        given = [None if g is None or not g.size else g for g in given]
        factor = self._collect(given)
        lr *= self._in_series(given)
        calm = self._balance(given)
        for t, gradient in enumerate(given):
            if gradient is not None:
                self.counts[t] += 1
                times = calm if self.sheets[t].what == "vector" else 1.0
                self._update(t, gradient, factor, lr * times, decay, betas, eps)

    def _in_series(self, gradients: list[Array | None]) -> float:
        """Return the factor on the share; the number of layers in series is brought up to date."""
        values = []
        for sheet, w, g in zip(self.sheets, self.weights, gradients, strict=True):
            if g is not None and sheet.what != "vector":
                fine = np.isfinite(g).all(axis=1)
                values.append(float((g[fine] * w[fine].conj()).real.sum()))
        largest = max(map(abs, values), default=0.0)
        if largest > 0:
            self.series = max(abs(sum(values)) / largest, 0.995 * self.series)
        return min(1.0, (14.0 / self.series) ** 2) if self.series else 1.0

    def _balance(self, gradients: list[Array | None]) -> float:
        """Return the factor on the share of vectors: they may not change the loss by more than matrices do."""
        matrices, vectors = 0.0, []
        for sheet, w, g in zip(self.sheets, self.weights, gradients, strict=True):
            if g is not None:
                n = sheet.cols * (2 if np.iscomplexobj(w) else 1)
                fine = np.isfinite(g).all(axis=1)
                reach = np.maximum(length(w), LEAST[sheet.what] * np.sqrt(n))
                change = SHARE[sheet.what] * float((length(g[fine]) * reach[fine]).sum())
                if sheet.what == "vector":
                    vectors.append(change)
                else:
                    matrices += change
        total = sum(min(change, matrices / 2) for change in vectors)
        most = matrices * min(1.0, 14.0 / max(self.series, 1.0))
        self.calm = most / total if total > most else 1.0
        return self.calm

    def _collect(self, gradients: list[Array | None]) -> float:
        """Return what the whole gradient is multiplied by; the recent norms are brought up to date."""
        with np.errstate(all="ignore"):
            norms = [np.zeros(s.rows) if g is None else length(g) for s, g in zip(self.sheets, gradients, strict=True)]
        seen = [np.isfinite(n) & (n > 0) for n in norms]
        ratios = sorted(
            float(n[b] / s[b])
            for n, s, k in zip(norms, self.recent, seen, strict=True)
            for b in range(len(n))
            if k[b] and s[b] > 0
        )
        c = ratios[(len(ratios) - 1) // 2] if ratios else 1.0
        fires = self.collective and c > 5.0 and len(ratios) >= 16
        falls = min(0.98, self.steps / (self.steps + 2))
        for norm, recent, known in zip(norms, self.recent, seen, strict=True):
            for b in np.flatnonzero(known):
                if recent[b] == 0:
                    recent[b] = norm[b] / c if fires else norm[b]
                elif fires:
                    recent[b] *= 1.05
                else:
                    recent[b] = min(max(norm[b], falls * recent[b]), 2 * recent[b])
        if fires:
            self.fired.append(self.steps)
        self.steps += any(known.any() for known in seen)
        return 1 / c if fires else 1.0

    def _update(
        self,
        t: int,
        gradient: Array,
        factor: float,
        lr: float,
        decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        sheet, w = self.sheets[t], self.weights[t]
        n = sheet.cols * (2 if np.iscomplexobj(w) else 1)
        fine = np.isfinite(gradient).all(axis=1)
        g = np.where(fine[:, None], gradient, 0) * factor
        before = length(w)
        limit = 0.2 * np.maximum(before, 1e-3)
        g = g * np.minimum(1, limit / np.maximum(length(g), 1e-300))[:, None]
        direction = self._orthogonal(t, g, fine, betas) if sheet.direction == "orthogonal" else None
        if direction is None:
            direction = self._adam(t, g, fine, betas, eps)
        ahead = length(direction)
        moves = fine & (ahead > 0) & ((length(np.where(fine[:, None], gradient, 0)) > 0) | (sheet.direction == "adam"))
        fresh = moves & ((self.longest[t] == 0) | (before > 1.01 * self.longest[t]))
        self.longest[t][fresh] = np.maximum(before, LONGEST[sheet.what])[fresh]
        floor = np.sqrt(n) if sheet.direction == "adam" else 1e-30
        tau = lr * SHARE[sheet.what]
        stride = tau * np.maximum(before, LEAST[sheet.what] * np.sqrt(n)) / np.maximum(ahead, floor)
        new = (1 - decay * tau) * w - stride[:, None] * direction
        shrink = np.minimum(1, self.longest[t] / np.maximum(length(new), 1e-300))
        self.weights[t] = np.where(moves[:, None], new * shrink[:, None], w)

    def _orthogonal(self, t: int, g: Array, fine: Array, betas: tuple[float, float]) -> Array:
        b1, m = betas[0], self.momentum[t]
        m[fine] = b1 * m[fine] + (1 - b1) * g[fine]
        ahead = np.where(fine[:, None], b1 * m + (1 - b1) * g, m)
        made = np.zeros_like(ahead)
        for top, bottom, left, right in self.sheets[t].boxes:
            made[top:bottom, left:right] = newton_schulz(ahead[top:bottom, left:right])
        return made

    def _adam(self, t: int, g: Array, fine: Array, betas: tuple[float, float], eps: float) -> Array:
        (b1, b2), m, v, k = betas, self.momentum[t], self.second[t], self.counts[t]
        parts = np.stack([g.real, g.imag], axis=-1)
        m[fine] = b1 * m[fine] + (1 - b1) * g[fine]
        v[fine] = b2 * v[fine] + (1 - b2) * parts[fine] ** 2
        ahead = np.where(fine[:, None], b1 * m + (1 - b1) * g, m) / (1 - b1**k)
        spread = np.sqrt(v / (1 - b2**k)) + eps
        if np.iscomplexobj(ahead):
            return ahead.real / spread[..., 0] + 1j * ahead.imag / spread[..., 1]
        return ahead / spread[..., 0]
