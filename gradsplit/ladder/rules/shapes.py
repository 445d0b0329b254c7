"""Operations that move, pick, pad or sum numbers; they are linear, so they act on every order of the series alike.

Indexing and gathering are linear in what is indexed. The indices are those at t = 0, since an integer does not move.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..series import Series, Value, at_start, map_orders, scale
from .registry import linear, rule, unsupported

aten = torch.ops.aten

linear(
    aten.permute,
    aten.transpose,
    aten.t,
    aten.expand,
    aten.squeeze,
    aten.unsqueeze,
    aten.slice,
    aten.select,
    aten.split,
    aten.split_with_sizes,
    aten.unbind,
    aten.cat,
    aten.stack,
    aten.flip,
    aten.roll,
    aten.repeat,
    aten.cumsum,
    aten.tril,
    aten.triu,
    aten.diagonal,
    aten.unfold,
    aten.sum,
    aten.mean,
    aten.embedding,
    aten.index_select,
    aten.gather,
    aten.index_add,
    aten.index_put,
    aten._unsafe_index_put,
    aten.scatter.src,
    aten.scatter_add,
    aten.slice_scatter,
    aten.select_scatter,
    aten.avg_pool1d,
    aten.avg_pool2d,
    aten.avg_pool3d,
    aten._adaptive_avg_pool2d,
    aten.upsample_nearest2d,
    aten.upsample_bilinear2d,
    aten.upsample_bicubic2d,
    aten.upsample_trilinear3d,
    aten.im2col,
    aten.col2im,
)


@rule(aten.view, aten._unsafe_view, aten.reshape)
def _view(x: Series, size: Sequence[int]) -> Series:
    return x.like(x.coef.reshape(*x.coef.shape[:2], *size))


@rule(aten.index, aten._unsafe_index)
def _index(x: Value, indices: Sequence[Value | None]) -> Series:
    if any(isinstance(i, Series) and i.coef.dtype == torch.bool for i in indices):
        raise unsupported(aten.index, "a mask x[mask] that picks other numbers for one bin than for another")
    found: Series = map_orders(aten.index, (x, list(indices)), {})
    return found


@rule(aten.scatter.value)
def _scatter_value(x: Value, dim: int, index: Value, value: float) -> Value:
    if not isinstance(x, Series):
        return at_start(lambda place: aten.scatter.value(x, dim, place, value), index)
    out: Series = map_orders(aten.scatter.value, (x, dim, index, 0.0), {})
    for b in range(out.num_bins):
        place = index.coef[0, b] if isinstance(index, Series) else index
        out.coef[0, b] = aten.scatter.value(out.coef[0, b], dim, place, value)
    return out


@rule(aten.copy)
def _copy(target: Value, source: Value, non_blocking: bool = False) -> Value:
    if not isinstance(source, Series):
        return source.expand(target.shape)
    return source if source.shape == target.shape else map_orders(aten.expand, (source, target.shape), {})


@rule(aten.constant_pad_nd)
def _constant_pad(x: Series, pad: list[int], value: float = 0) -> Series:
    out = map_orders(aten.constant_pad_nd, (x, pad, 0.0), {})
    if value:
        out.coef[0] = aten.constant_pad_nd(x.coef[0], pad, value)
    return out


@rule(aten.nll_loss_forward, aten.nll_loss2d_forward)
def _nll_loss(
    x: Series, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignore_index: int
) -> tuple[Value, Value]:
    """Take minus the picked log-probabilities, which is linear. Reduction 0 is none, 1 weighted mean, 2 sum."""
    classes = 1 if x.ndim > 1 else 0
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    factor = -kept.to(x.coef.dtype) if weight is None else -torch.where(kept, weight.to(x.coef.dtype)[index], 0.0)
    picked = map_orders(aten.gather, (x, classes, index.unsqueeze(classes)), {})
    losses = scale(map_orders(aten.squeeze, (picked, classes), {}), factor)
    total = -factor.sum()
    if reduction == 0:
        return losses, total
    summed = map_orders(aten.sum, (losses,), {})
    return (scale(summed, 1 / total) if reduction == 1 else summed), total
