"""Truncated power series of a tensor in the step t: what a value of the network becomes when the parameters move.

A value y of the forward pass, seen as a function of the step t along a direction, is kept as

    y(t) = sum_k coef[k] t**k,   k = 0 … order

Layout of ``coef``, everywhere in this package: ``(degree + 1, B, *shape)``. The leading axis counts orders, the second
one bins (1 for a single direction), the rest is the shape of the ordinary value. Orders above ``degree`` are exactly
zero and not stored: a parameter is a series of degree 1, an activation of the first layer one of degree 1 or 2, and
skipping their zeros is most of the speed at high order. ``coef[0]`` is the ordinary value, so it is the same for all
bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Series:
    """A value that depends on the step, truncated after ``order``.

    Args:
        coef: Taylor coefficients, (degree + 1, B, *shape), float64 (bool for a branch that differs between bins).
        order: the highest order that is kept, >= degree.
    """

    coef: Tensor
    order: int

    @property
    def degree(self) -> int:
        """Highest stored order; all above are exactly zero."""
        return int(self.coef.shape[0]) - 1

    @property
    def num_bins(self) -> int:
        """Length of the bin axis."""
        return int(self.coef.shape[1])

    @property
    def shape(self) -> torch.Size:
        """Shape of the ordinary value."""
        return self.coef.shape[2:]

    @property
    def ndim(self) -> int:
        """Rank of the ordinary value."""
        return self.coef.ndim - 2

    @property
    def value(self) -> Tensor:
        """The ordinary value, at t = 0."""
        return self.coef[0, 0]

    def like(self, coef: Tensor) -> Series:
        """A series with other coefficients and the same truncation."""
        return Series(coef[: self.order + 1], self.order)


Value = Any  # Series | Tensor | number: what flows along the edges of a traced graph


def promote(value: Tensor, like: Series) -> Series:
    """A constant as a series of degree 0, one copy for all bins."""
    value = value.to(like.coef.dtype).to(like.coef.device)
    return Series(value.expand(1, like.num_bins, *value.shape), like.order)


def padded(coef: Tensor, degree: int) -> Tensor:
    """Coefficients up to ``degree``: zeros above what is stored, cut where more is stored."""
    missing = degree + 1 - coef.shape[0]
    if missing <= 0:
        return coef[: degree + 1]
    return torch.cat([coef, coef.new_zeros(missing, *coef.shape[1:])])


def aligned(coef: Tensor, ndim: int) -> Tensor:
    """Insert axes behind the bin axis, so that values of lower rank broadcast as they would without series."""
    missing = ndim + 2 - coef.ndim
    return coef.reshape(*coef.shape[:2], *([1] * missing), *coef.shape[2:]) if missing > 0 else coef


def add(a: Value, b: Value, alpha: float = 1) -> Value:
    """a + alpha b, where either may be constant."""
    if not isinstance(a, Series):
        return add(scale(b, alpha), a)
    if isinstance(b, Series):
        ndim = max(a.ndim, b.ndim)
        left, right = aligned(a.coef, ndim), aligned(b.coef, ndim)
        if left.shape[0] == right.shape[0]:
            return a.like(torch.add(left, right, alpha=alpha))
        shape = torch.broadcast_shapes(left.shape[1:], right.shape[1:])
        out = left.new_zeros(max(left.shape[0], right.shape[0]), *shape)
        out[: left.shape[0]] += left
        out[: right.shape[0]].add_(right, alpha=alpha)
        return a.like(out)
    constant = torch.as_tensor(b, dtype=a.coef.dtype)
    left = aligned(a.coef, constant.ndim)
    out = left.expand(left.shape[0], *torch.broadcast_shapes(left.shape[1:], constant.shape)).clone()
    out[0].add_(constant, alpha=alpha)
    return a.like(out)


def scale(a: Value, factor: Value) -> Value:
    """A series times a constant (number or tensor)."""
    if not isinstance(a, Series):
        return a * factor
    if isinstance(factor, Tensor):
        return a.like(aligned(a.coef, factor.ndim) * factor)
    return a if factor == 1 else a.like(a.coef * factor)


def weighted(coef: Tensor) -> Tensor:
    """k coef[k]: the coefficients of t y'(t), the form in which the recurrences need a derivative."""
    k = torch.arange(coef.shape[0], dtype=coef.dtype, device=coef.device)
    return coef * k.reshape(-1, *([1] * (coef.ndim - 1)))


def series_leaves(tree: Any) -> list[Series]:
    """All series in a nested argument list."""
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=_is_series) if isinstance(leaf, Series)]


def map_orders(op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Apply an operation that is linear in its tensors to every order of every bin at once.

    The order and bin axes are folded into one batch axis and vectorised over (``torch.vmap``), so that no dimension
    argument has to be translated. Constant floating tensors among the arguments (``cat``, ``index_put``) are the
    degree-0 series of themselves; index tensors stay as they are.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_series)
    first = next(leaf for leaf in leaves if isinstance(leaf, Series))
    leaves = [promote(x, first) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    degree = max(leaf.degree for leaf in leaves if isinstance(leaf, Series))
    folded = [padded(x.coef, degree).flatten(0, 1) if isinstance(x, Series) else x for x in leaves]
    in_dims = tuple(0 if isinstance(x, Series) else None for x in leaves)

    def run(*flat: Any) -> Any:
        inner_args, inner_kwargs = pytree.tree_unflatten(list(flat), spec)
        return op(*inner_args, **inner_kwargs)

    out = torch.vmap(run, in_dims=in_dims)(*folded)
    return pytree.tree_map(lambda x: first.like(x.unflatten(0, (degree + 1, first.num_bins))), out)


def _is_series(value: Any) -> bool:
    return isinstance(value, Series)
