"""GSO's rule in plain eager torch, with the options that the trials compared.

Matrices are viewed as (rows, columns); a vector is one row. Per step, with the share tau = `lr`:

    1. bound       g' = g min(1, 0.2 max(||w||, 1e-3) / ||g||) per row; a row that is not finite is left out
    2. direction   d  = NewtonSchulz(.9 m + .1 g') of a matrix, Adam's direction of embeddings and vectors
    3. step        w  = (1 - .01 tau) w - tau max(||w||, .1 sqrt n) d / ||d||, then ||w|| <= max(first length, 3)

`Collective` stands in front of it: it tells a batch whose whole gradient is scaled from one bad row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["COEFFICIENTS", "Collective", "GSOReference", "orthogonal", "output_layers"]

_QUINTIC = (3.4445, -4.7750, 2.0315)

# "polar": each step's polynomial is the best one for the interval that the step before leaves (as Polar Express does);
# computed here by linear programming for singular values from 0.001 (5 steps), 0.005 (4) and 0.01 (3) of the largest.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "muon5": (_QUINTIC,) * 5,
    "muon4": (_QUINTIC,) * 4,
    "muon3": (_QUINTIC,) * 3,
    "muon2": (_QUINTIC,) * 2,
    "polar5": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    "polar4": (
        (8.2987, -24.4305, 18.0903),
        (3.9152, -2.9211, 0.5592),
        (3.1746, -2.3804, 0.4978),
        (2.1895, -1.5672, 0.4079),
    ),
    "polar3": ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)),
}
"""Name -> (a, b, c) of each step X <- a X + (b A + c A A) X with A = X X^T."""


def orthogonal(
    x: Tensor, coefficients: str = "muon5", *, dtype: torch.dtype | None = None, tight: bool = False
) -> Tensor:
    """Draw all singular values of a matrix, or of each matrix of a stack, near 1.

    Args:
        x: (…, rows, columns).
        coefficients: a name of `COEFFICIENTS`.
        dtype: what the products are computed in; None: x's own.
        tight: divide by the square root of ||X X^T|| in place of ||X||, a closer bound on the largest singular value.
    """
    given = x.dtype
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)
    if tight:
        x = x / ((x @ x.mT).norm(dim=(-2, -1), keepdim=True).sqrt() + 1e-20)
    x = x if dtype is None else x.to(dtype)
    for a, b, c in COEFFICIENTS[coefficients]:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.mT if flip else x).to(given)


def rows_of(tensor: Tensor) -> Tensor:
    """The matrix view: rows are dim 0, a vector or a scalar is one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)


class Collective:
    """Tell a batch whose whole gradient is scaled from one bad row, by the median over rows; and scale it back.

    Every row keeps the largest norm s that it has had of late. Let c be the median over rows of norm / s.

    - Where c > limit, the whole gradient is divided by c, and every s becomes 1.05 s. So a jump that stays is let
      through within a hundred steps, and one that passes leaves nothing behind.
    - Otherwise s <- min(max(norm, f s), 2 s) with f = min(0.98, t / (t + 2)) at step t, counted from 0. So a spike in
      the first steps is soon forgotten.

    Args:
        parameters: whose gradients are read and scaled.
        limit: 5 by default.
        median: "exact" over all rows; "tensors": the median of the tensors' own medians, each counted as often as it
            has rows; "sample": over at most 256 rows, evenly spread over all.
        rule: "recent" as above, or "slow": s rises by 5 % at a norm above it and falls by 5 % below, and the gradient
            is multiplied by limit / c.
    """

    def __init__(
        self, parameters: Iterable[Tensor], limit: float = 5.0, median: str = "tensors", rule: str = "recent"
    ) -> None:
        self.parameters, self.limit, self.median, self.rule = list(parameters), limit, median, rule
        self.scale: Tensor | None = None
        self.fired: list[int] = []
        self.medians: list[float] = []
        self.steps = 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Read all gradients; scale them where the median says so."""
        read = [p for p in self.parameters if p.grad is not None]
        times = self.decide([rows_of(p.grad).double().norm(dim=1) for p in read])
        if times != 1.0:
            for p in read:
                p.grad.mul_(times)

    def decide(self, parts: list[Tensor]) -> float:
        """Return what the whole gradient is multiplied by, and remember the norms.

        Args:
            parts: the norms of the rows of each tensor, float64; the same tensors in the same order at every step.
        """
        norm = torch.cat(parts)
        seen = norm.isfinite() & (norm > 0)
        if self.scale is None:
            self.scale = torch.where(seen, norm, 0.0)
        c = self._middle(norm, seen & (self.scale > 0), [len(part) for part in parts])
        self.medians.append(c)
        times = 1.0
        if c > self.limit:
            times = (1.0 if self.rule == "recent" else self.limit) / c
            norm = norm * times
            self.fired.append(self.steps)
        if self.rule == "slow":
            moved = torch.where(norm > self.scale, self.scale * 1.05, self.scale * 0.95)
        elif c > self.limit:
            moved = 1.05 * self.scale
        else:
            fall = min(0.98, self.steps / (self.steps + 2))
            moved = torch.minimum(torch.maximum(norm, fall * self.scale), 2 * self.scale)
        self.steps += 1
        self.scale = torch.where(seen, torch.where(self.scale > 0, moved, norm), self.scale)
        return times

    def _middle(self, norm: Tensor, known: Tensor, sizes: list[int]) -> float:
        if self.median == "sample":
            picked = torch.linspace(0, len(norm) - 1, min(256, len(norm))).long()
            norm, known, scale = norm[picked], known[picked], self.scale[picked]
        else:
            scale = self.scale
        if not bool(known.any()):
            return 1.0
        if self.median != "tensors":
            return float((norm[known] / scale[known]).median())
        ratios = (norm / scale).split(sizes)
        pairs = [
            (float(ratio[k].median()), int(k.sum()))
            for ratio, k in zip(ratios, known.split(sizes), strict=True)
            if bool(k.any())
        ]
        half, so_far = sum(count for _, count in pairs) / 2, 0
        for value, count in sorted(pairs):
            so_far += count
            if so_far >= half:
                return value
        return pairs[-1][0]


def output_layers(model: nn.Module, output: Tensor) -> set[int]:
    """The ids of the matrices that no other matrix follows on the way to `output`, found in autograd's graph.

    From the output back, a path ends at the first operation that takes a parameter of two or more dimensions.

    Args:
        model: whose parameters are looked for.
        output: what the model returned, with its graph.
    """
    matrices = {id(p) for p in model.parameters() if p.ndim >= 2}
    found: set[int] = set()
    seen: set[Any] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        children = [child for child, _ in node.next_functions if child is not None]
        here = {id(p) for child in children if (p := _parameter_behind(child)) is not None} & matrices
        found |= here
        if not here:
            stack += children
    return found


def _parameter_behind(node: Any) -> Tensor | None:
    """The parameter whose view `node` is, or None."""
    while node is not None:
        if hasattr(node, "variable"):
            return node.variable  # type: ignore[no-any-return]
        if type(node).__name__ not in ("TBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0"):
            return None
        node = node.next_functions[0][0]
    return None


class GSOReference(torch.optim.Optimizer):
    """Bound, direction, step; see the module.

    Args:
        model: its parameters are optimised.
        lr: the share of its length that a row moves per step.
        limit: rows of matrices do not grow beyond max(first length, limit); infinity for no limit.
        free: ids of matrices without that limit.
        bound: rows of the gradient are bounded to this share of the weight's row; infinity: not at all.
        coefficients, dtype, tight: of `orthogonal`.
        blocks: name of a parameter -> into how many blocks of rows it is cut, each made orthogonal by itself.
        floor: the length below which a row of a matrix counts as floor * sqrt(columns).
        vector: what a vector's share is, in units of `lr`.
        vectors: "root": a vector counts as max(||b||, sqrt n); "plain": as a row does.
        decay: of the weights, in units of the share.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.03,
        *,
        limit: float = 3.0,
        free: Iterable[int] = (),
        bound: float = 0.2,
        coefficients: str = "muon5",
        dtype: torch.dtype | None = None,
        tight: bool = False,
        blocks: Mapping[str, int] | None = None,
        floor: float = 0.1,
        vector: float = 1 / 3,
        vectors: str = "root",
        decay: float = 0.01,
        momentum: float = 0.9,
        beta2: float = 0.99,
    ) -> None:
        kinds: dict[str, list[Tensor]] = {"matrix": [], "embedding": [], "vector": []}
        self.blocks: dict[int, int] = {}
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            for name, p in module.named_parameters(recurse=False):
                if id(p) in seen or not p.requires_grad:
                    continue
                seen.add(id(p))
                kind = "vector" if p.ndim < 2 else "embedding" if isinstance(module, nn.Embedding) else "matrix"
                kinds[kind].append(p)
                self.blocks[id(p)] = next(
                    (k for pattern, k in dict(blocks or {}).items() if f"{prefix}.{name}".endswith(pattern)), 1
                )
        self.limit, self.free, self.bound, self.floor = limit, set(free), bound, floor
        self.vector, self.vectors, self.decay, self.beta1, self.beta2 = vector, vectors, decay, momentum, beta2
        self.direction: Callable[[Tensor], Tensor] = lambda x: orthogonal(x, coefficients, dtype=dtype, tight=tight)
        groups = [{"params": found, "kind": kind} for kind, found in kinds.items() if found]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            share = group["lr"] * (self.vector if group["kind"] == "vector" else 1.0)
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group["kind"], share)

    def _update(self, p: Tensor, kind: str, share: float) -> None:
        w, g = rows_of(p.data), rows_of(p.grad)
        root_n, state = math.sqrt(w.shape[1]), self.state[p]
        length = w.norm(dim=1, keepdim=True)
        if not state:
            state.update(step=0, m=torch.zeros_like(w), most=length.clamp(min=self.limit))
            if kind != "matrix":
                state["v"] = torch.zeros_like(w)
        size = g.double().norm(dim=1, keepdim=True)
        fine = size.isfinite()
        times = (self.bound * length.double().clamp(min=1e-3) / size.clamp(min=1e-30)).clamp(max=1.0)
        g = torch.where(fine, (g.double() * times).to(g.dtype), 0.0)
        state["step"] += 1
        m = state["m"] = torch.where(fine, torch.lerp(state["m"], g, 1 - self.beta1), state["m"])
        ahead = torch.where(fine, torch.lerp(m, g, 1 - self.beta1), m)
        if kind == "matrix":
            parts = ahead.reshape(self.blocks[id(p)], -1, w.shape[1])
            d = self.direction(parts).reshape(w.shape)
            d = d / d.norm(dim=1, keepdim=True).clamp(min=1e-30)
        else:
            v = state["v"] = torch.where(fine, self.beta2 * state["v"] + (1 - self.beta2) * g * g, state["v"])
            spread = (v / (1 - self.beta2 ** state["step"])).sqrt() + 1e-8
            d = ahead / (1 - self.beta1 ** state["step"]) / spread
            d = d / d.norm(dim=1, keepdim=True).clamp(min=root_n)
        least = (1.0 if kind == "vector" and self.vectors == "root" else self.floor) * root_n
        new = (1 - self.decay * share) * w - share * length.clamp(min=least) * d
        if kind == "matrix" and id(p) not in self.free:
            new = new * (state["most"] / new.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        w.copy_(torch.where(fine, new, w))
