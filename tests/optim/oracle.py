"""GSO from its formulas, in float64 numpy, element by element; shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass
class Group:
    """Hyper-parameters of some tensors."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    maximize: bool = False
    top: float = 0.0  # the largest rate so far


@dataclass
class Oracle:
    """AdamW over labelled elements.

    Args:
        weights: one array a tensor; complex ones as a last axis of two.
        labels: the bin of every element, shaped like the tensor (without the axis of two).
        groups: one a tensor; tensors of one group share the object.
        factor, floor: the gradient's limit is factor * max(||w_b||, floor); None: unbounded.
        tau, rms: the update's limit is tau * pace * max(||w_b||, rms * sqrt(n_b)); None: unbounded.
        per_bin: one second moment a bin.
    """

    weights: list[Array]
    labels: list[Array]
    groups: list[Group]
    factor: float | None = 0.2
    floor: float = 1e-3
    tau: float | None = 0.03
    rms: float = 0.01
    per_bin: bool = False
    steps: list[int] = field(default_factory=list)
    first: list[Array] = field(default_factory=list)
    second: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = [np.array(w, dtype=np.float64) for w in self.weights]
        self.steps = [0] * len(self.weights)
        self.first = [np.zeros_like(w) for w in self.weights]
        self.second = [np.zeros_like(w) for w in self.weights]
        for group in self.groups:
            group.top = max(group.top, group.lr)

    def step(self, gradients: list[Array | None]) -> None:
        """One update; None passes a tensor over."""
        for group in self.groups:
            group.top = max(group.top, group.lr)
        for t, given in enumerate(gradients):
            if given is None:
                continue
            group, w = self.groups[t], self.weights[t]
            gradient = -given if group.maximize else given
            self.steps[t] += 1
            for b in np.unique(self.labels[t]):
                members = self.labels[t] == b
                if np.isfinite(gradient[members]).all():
                    self._step_of_bin(t, members, gradient[members], group)
            self.weights[t] = w

    def _step_of_bin(self, t: int, members: Array, g: Array, group: Group) -> None:
        w, (beta1, beta2), k = self.weights[t][members], group.betas, self.steps[t]
        length = np.sqrt((w**2).sum())
        if self.factor is not None:
            limit, norm = self.factor * max(length, self.floor), np.sqrt((g**2).sum())
            g = g * (limit / norm) if norm > limit else g
        m = beta1 * self.first[t][members] + (1 - beta1) * g
        square = (g**2).sum() / g.size if self.per_bin else g**2
        v = beta2 * self.second[t][members] + (1 - beta2) * square
        self.first[t][members], self.second[t][members] = m, v
        update = group.lr * (m / (1 - beta1**k)) / (np.sqrt(v / (1 - beta2**k)) + group.eps)
        share = 1.0
        if self.tau is not None:
            cap = self.tau * (group.lr / group.top) * max(length, self.rms * np.sqrt(g.size))
            norm = np.sqrt((update**2).sum())
            share = min(1.0, cap / norm) if norm > 0 else 1.0
        self.weights[t][members] = w - share * (update + group.lr * group.weight_decay * w)
