"""Truncated power series of a tensor in the step t: the values of the network while the parameters move.

A value y of the forward pass, seen as a function of the step t along a direction, is kept as

    y(t) = sum_k coef[k] t**k,   k = 0 … order

The layout of ``coef`` is ``(degree + 1, B, *shape)`` everywhere in this package. The first axis counts orders, the
second one bins (1 for a single direction), and the rest is the shape of the ordinary value. Orders above ``degree`` are
exactly zero and are not stored. A parameter has degree 1, and an activation of the first layer has degree 1 or 2; most
of the speed at high order comes from skipping their zeros. ``coef[0]`` is the ordinary value. It is the same for all
bins, except behind a jump at which the parameters stand: sign(0) is 1 for a bin that moves up, and -1 for another.
"""

from __future__ import annotations

import math
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
        coef: Taylor coefficients, (degree + 1, B, *shape), float64; of degree 0 also bool or whole numbers, for
            decisions and indices that differ between bins.
        order: the highest order that is kept, >= degree.
    """

    coef: Tensor
    order: int

    @property
    def degree(self) -> int:
        """Highest stored order; all higher orders are exactly zero."""
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
        """The ordinary value of the first bin, at t = 0; see ``start`` for what may differ between bins."""
        return self.coef[0, 0]

    @property
    def start(self) -> Tensor:
        """The values for small t > 0, cut after order 0: (1, *shape) if the bins agree, otherwise (B, *shape)."""
        first = self.coef[0]
        alike = self.num_bins == 1 or bool(((first == first[:1]) | (first != first)).all())
        return first[:1] if alike else first

    def like(self, coef: Tensor) -> Series:
        """Return a series with other coefficients and the same truncation."""
        return Series(coef[: self.order + 1], self.order)


Value = Any  # Series | Tensor | number: a value on an edge of a traced graph


def promote(value: Tensor, like: Series) -> Series:
    """Return a constant as a series of degree 0, one copy for all bins."""
    value = value.to(like.coef.dtype).to(like.coef.device)
    return Series(value.expand(1, like.num_bins, *value.shape), like.order)


def padded(coef: Tensor, degree: int) -> Tensor:
    """Return the coefficients up to ``degree``, with zeros for orders that are not stored."""
    missing = degree + 1 - coef.shape[0]
    if missing <= 0:
        return coef[: degree + 1]
    return torch.cat([coef, coef.new_zeros(missing, *coef.shape[1:])])


def aligned(coef: Tensor, ndim: int) -> Tensor:
    """Insert axes after the bin axis, so that values of lower rank broadcast as they would without series."""
    missing = ndim + 2 - coef.ndim
    return coef.reshape(*coef.shape[:2], *([1] * missing), *coef.shape[2:]) if missing > 0 else coef


def shared(value_B: Tensor, order: int) -> Value:
    """Return a constant if its values (B, *shape) are alike for all bins, otherwise a series of degree 0."""
    if value_B.shape[0] == 1 or bool((value_B == value_B[:1]).all()):
        return value_B[0]
    return Series(value_B[None], order)


def at_start(op: Callable[..., Tensor], *args: Value, **kwargs: Any) -> Value:
    """Apply an operation whose result does not move with t to the values at t = 0, per bin where they differ."""
    starts = [x.start if isinstance(x, Series) else x for x in args]
    moving = [x for x in args if isinstance(x, Series)]
    bins = max(start.shape[0] for start, x in zip(starts, args, strict=True) if isinstance(x, Series))
    rows = [
        op(
            *(s[min(b, len(s) - 1)] if isinstance(x, Series) else s for s, x in zip(starts, args, strict=True)),
            **kwargs,
        )
        for b in range(bins)
    ]
    return rows[0] if bins == 1 else shared(torch.stack(rows), moving[0].order)


def add(a: Value, b: Value, alpha: float = 1) -> Value:
    """Return a + alpha b; either may be constant."""
    if not isinstance(a, Series):
        return add(scale(b, alpha), a)
    if isinstance(b, Series):
        ndim, dtype = max(a.ndim, b.ndim), torch.result_type(a.coef, b.coef)
        left, right = aligned(a.coef.to(dtype), ndim), aligned(b.coef.to(dtype), ndim)
        if left.shape[0] == right.shape[0]:
            return a.like(torch.add(left, right, alpha=alpha))
        shape = torch.broadcast_shapes(left.shape[1:], right.shape[1:])
        out = left.new_zeros(max(left.shape[0], right.shape[0]), *shape)
        out[: left.shape[0]] += left
        out[: right.shape[0]].add_(right, alpha=alpha)
        return a.like(out)
    dtype = torch.result_type(a.coef, b)
    constant = torch.as_tensor(b, dtype=dtype)
    left = aligned(a.coef.to(dtype), constant.ndim)
    out = left.expand(left.shape[0], *torch.broadcast_shapes(left.shape[1:], constant.shape)).clone()
    out[0].add_(constant, alpha=alpha)
    return a.like(out)


def scale(a: Value, factor: Value) -> Value:
    """Return a series times a constant (number or tensor)."""
    if not isinstance(a, Series):
        return a * factor
    if isinstance(factor, Tensor):
        return a.like(aligned(a.coef, factor.ndim) * factor)
    return a if factor == 1 else a.like(a.coef * factor)


def weighted(coef: Tensor) -> Tensor:
    """Return k coef[k]: the coefficients of t y'(t), the form of the derivative that the recurrences use."""
    k = torch.arange(coef.shape[0], dtype=coef.dtype, device=coef.device)
    return coef * k.reshape(-1, *([1] * (coef.ndim - 1)))


def series_leaves(tree: Any) -> list[Series]:
    """Return all series in a nested argument list."""
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=_is_series) if isinstance(leaf, Series)]


def map_orders(op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Apply an operation that is linear in its tensors to every order of every bin at once.

    The order and bin axes are folded into one batch axis, over which ``torch.vmap`` vectorises, so dimension arguments
    need no translation. A constant floating tensor among the arguments (``cat``, ``index_put``) becomes a series of
    degree 0. Index tensors stay as they are, and an index that differs between bins is the same for every order.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_series)
    first = next(leaf for leaf in leaves if isinstance(leaf, Series))
    leaves = [promote(x, first) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    degree = max(leaf.degree for leaf in leaves if isinstance(leaf, Series))
    folded = [_at_orders(x.coef, degree).flatten(0, 1) if isinstance(x, Series) else x for x in leaves]
    in_dims = tuple(0 if isinstance(x, Series) else None for x in leaves)

    def run(*flat: Any) -> Any:
        inner_args, inner_kwargs = pytree.tree_unflatten(list(flat), spec)
        return op(*inner_args, **inner_kwargs)

    out = torch.vmap(run, in_dims=in_dims)(*folded)
    return pytree.tree_map(lambda x: first.like(x.unflatten(0, (degree + 1, first.num_bins))), out)


def _at_orders(coef: Tensor, degree: int) -> Tensor:
    if coef.is_floating_point() or coef.is_complex():
        return padded(coef, degree)
    return coef[:1].expand(degree + 1, *coef.shape[1:])


def _is_series(value: Any) -> bool:
    return isinstance(value, Series)


LOW_DEGREE = 3  # up to this degree a loop over the orders of a factor works on whole tensors
BLOCK_NUMBERS = 100_000  # orders x elements of one array in a block: 0.8 MB, so that a 4 MB cache holds three arrays
FFT_FROM = 24  # degree of both matrix factors from which roots of unity are faster (benchmarks/results/ladder-*.json)
FFT_MULTIPLY_ADDS = 100_000  # and the smallest matrix product of one order for which they are
FFT_RANGE = 1e-7  # and the smallest of the orders relative to the largest, since rounding is relative to the largest


def product_kernel(a: Tensor, b: Tensor, order: int) -> Tensor:
    """Return the coefficients of a b for coefficient arrays (degree + 1, …), truncated after ``order``."""
    if a.shape[0] > b.shape[0]:
        a, b = b, a
    degree, dtype = min(order, a.shape[0] + b.shape[0] - 2), torch.result_type(a, b)
    out = torch.zeros(degree + 1, *torch.broadcast_shapes(a.shape[1:], b.shape[1:]), dtype=dtype, device=b.device)
    for j in range(min(a.shape[0], degree + 1)):
        stop = min(degree + 1, j + b.shape[0])
        out[j:stop].addcmul_(b[: stop - j], a[j])
    return out


def square_kernel(a: Tensor, order: int) -> Tensor:
    """Return the coefficients of a^2; each unequal pair is computed once, which is half the work of a product."""
    degree = min(order, 2 * (a.shape[0] - 1))
    out = torch.zeros(degree + 1, *a.shape[1:], dtype=a.dtype, device=a.device)
    for j in range(min(a.shape[0], degree + 1)):
        stop = min(degree + 1, 2 * j)  # pairs (j, i) with i < j
        if stop > j:
            out[j:stop].addcmul_(a[: stop - j], a[j], value=2)
        if 2 * j <= degree:
            out[2 * j].addcmul_(a[j], a[j])
    return out


def blockwise(kernel: Callable[..., Tensor], *factors: Series, degree: int | None = None) -> Series:
    """Run an elementwise kernel over blocks of elements that stay in the cache while all orders pass over them.

    Args:
        kernel: maps coefficient arrays (degree_i + 1, n) to one array (degree + 1, n), element by element.
        factors: series that broadcast against each other.
        degree: degree of the result; by default the truncation order.
    """
    order = factors[0].order
    degree = order if degree is None else degree
    ndim = max(x.ndim for x in factors)
    coefs = [aligned(x.coef, ndim) for x in factors]
    shape = torch.broadcast_shapes(*(c.shape[1:] for c in coefs))
    flat = [c.expand(c.shape[0], *shape).reshape(c.shape[0], -1) for c in coefs]
    num_elements = math.prod(shape)
    block = max(256, BLOCK_NUMBERS // (order + 1))
    if num_elements <= block:
        return Series(kernel(*flat).reshape(degree + 1, *shape), order)
    out = torch.empty(degree + 1, num_elements, dtype=coefs[0].dtype, device=coefs[0].device)
    for start in range(0, num_elements, block):
        columns = slice(start, start + block)
        out[:, columns] = kernel(*(f[:, columns].contiguous() for f in flat))
    return Series(out.reshape(degree + 1, *shape), order)


def product(a: Series, b: Series) -> Series:
    """Elementwise product of two series."""
    ndim = max(a.ndim, b.ndim)
    if min(a.degree, b.degree) <= LOW_DEGREE:
        return a.like(product_kernel(aligned(a.coef, ndim), aligned(b.coef, ndim), a.order))
    degree = min(a.order, a.degree + b.degree)
    return blockwise(lambda x, y: product_kernel(x, y, a.order), a, b, degree=degree)


def square(a: Series) -> Series:
    """Elementwise square."""
    degree = min(a.order, 2 * a.degree)
    return blockwise(lambda x: square_kernel(x, a.order), a, degree=degree)


def bilinear(op: Callable[[Tensor, Tensor], Tensor], a: Series, b: Series) -> Series:
    """Return the Cauchy product of a bilinear operation, such as a convolution whose input and weight both move.

    There is one vectorised call per stored order of the factor of lower degree. Where its value at t = 0 is the same
    for all bins, order 0 of that factor is used without its bin axis.
    """
    swap = a.degree < b.degree
    long, short = (b, a) if swap else (a, b)
    call = (lambda x, y: op(y, x)) if swap else op
    degree = min(a.order, a.degree + b.degree)
    out: Tensor | None = None
    start = short.start
    for j in range(min(short.degree, degree) + 1):
        stop = min(degree + 1, j + long.degree + 1)
        tail = long.coef[: stop - j]
        if j == 0 and start.shape[0] == 1:
            part = torch.vmap(call, in_dims=(0, None))(tail.flatten(0, 1), start[0]).unflatten(0, tail.shape[:2])
        else:
            per_bin = torch.vmap(torch.vmap(call, in_dims=(0, None)), in_dims=(1, 0), out_dims=1)
            part = per_bin(tail, short.coef[j])
        if out is None:
            out = padded(part, degree) if part.shape[0] == degree + 1 else padded(part, degree).clone()
        else:
            out[j:stop] += part
    assert out is not None
    return Series(out, a.order)


def matmul(a: Series, b: Series) -> Series:
    """Matrix product of two series of matrices (or equal batches of matrices)."""
    if min(a.degree, b.degree) <= LOW_DEGREE:
        return bilinear(torch.matmul, a, b)
    multiply_adds = math.prod(a.coef.shape[1:]) * b.shape[-1]
    if min(a.degree, b.degree) >= FFT_FROM and multiply_adds >= FFT_MULTIPLY_ADDS:
        found = _matmul_at_roots(a, b)
        if found is not None:
            return found
    return _matmul_by_order(a, b)


def _matmul_by_order(a: Series, b: Series) -> Series:
    """Compute order k as one product: the inner axis holds a_0 … a_k and b_k … b_0, so its sum is over the pairs."""
    degree = min(a.order, a.degree + b.degree)
    inner = a.shape[-1]
    left = padded(a.coef, degree).movedim(0, -2)  # (B, …, rows, order, inner)
    left = left.reshape(*left.shape[:-2], (degree + 1) * inner)
    right = padded(b.coef, degree).flip(0).movedim(0, -3)  # (B, …, order, inner, columns), highest order first
    right = right.reshape(*right.shape[:-3], (degree + 1) * inner, right.shape[-1])
    parts = [left[..., : (k + 1) * inner] @ right[..., (degree - k) * inner :, :] for k in range(degree + 1)]
    return Series(torch.stack(parts), a.order)


def _matmul_at_roots(a: Series, b: Series) -> Series | None:
    """Compute the same at roots of unity; None if rounding would eat the smallest orders.

    Rounding is relative to the largest coefficient there, so the orders are first scaled to similar size. One scale
    does that for a series with a radius. It does not for an entire function, whose coefficients fall as 1 / k!.
    """
    degree = min(a.order, a.degree + b.degree)
    num_roots = _smooth(a.degree + b.degree + 1)
    log_rho = torch.minimum(_log_balance(a.coef), _log_balance(b.coef))  # (B,)
    values = [torch.fft.rfft(x.coef * _powers(log_rho, x.coef), n=num_roots, dim=0) for x in (a, b)]
    out = torch.fft.irfft(values[0] @ values[1], n=num_roots, dim=0)[: degree + 1]
    size = out.abs().flatten(2).amax(-1)  # (orders, bins)
    if not bool((size >= FFT_RANGE * size.amax(0)).all()):
        return None
    return Series(out * _powers(-log_rho, out), a.order)


def _log_balance(coef: Tensor) -> Tensor:
    """Return, per bin, log of the rho for which |coef[k]| rho**k is level: least squares over the orders above zero."""
    log = (coef.abs().flatten(2).amax(-1) if coef.ndim > 2 else coef.abs()).log()
    known = log.isfinite().to(coef.dtype)
    k = torch.arange(len(coef), dtype=coef.dtype, device=coef.device)[:, None]
    k = known * (k - (known * k).sum(0) / known.sum(0))
    growth = (k * torch.where(known > 0, log, 0.0)).sum(0) / k.square().sum(0)
    return torch.where(growth.isfinite(), -growth, torch.zeros_like(growth)).clamp(-5, 5)


def _powers(log_rho: Tensor, coef: Tensor) -> Tensor:
    k = torch.arange(coef.shape[0], dtype=log_rho.dtype, device=log_rho.device)
    return (k[:, None] * log_rho).exp().reshape(*coef.shape[:2], *([1] * (coef.ndim - 2)))


def _smooth(length: int) -> int:
    """Return the next length without a prime factor above 5, for which fast Fourier transforms are fast."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1
