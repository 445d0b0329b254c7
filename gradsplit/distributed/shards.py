"""What a rank holds of a sharded tensor, a DTensor, and of a plan over such tensors.

A shard is a block of the tensor's matrix view. torch places it; this module only asks where it lies.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, overload

import numpy as np
import torch
from torch import Tensor

from ..plan import Boxes, Plan

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "Shard",
    "gathering",
    "in_form",
    "is_sharded",
    "local_of",
    "place_of",
    "shard_of",
    "whole_of",
    "local_plan_of",
    "pieces_of",
]


class Shard(NamedTuple):
    """The block of a tensor's matrix view that this rank holds, half open, and the shape of what it holds."""

    shape: tuple[int, ...]
    row_start: int
    row_stop: int
    col_start: int
    col_stop: int


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; this never imports torch.distributed.tensor, as whoever made one has done so."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@overload
def local_of(tensor: Tensor) -> Tensor: ...
@overload
def local_of(tensor: None) -> None: ...
def local_of(tensor: Tensor | None) -> Tensor | None:
    """Return what this rank holds, sharing memory; anything but a DTensor is returned as it is.

    A step needs it: operations on DTensors would gather once per bin, and the `data_ptr()` of a DTensor is 0.
    """
    return tensor.to_local() if is_sharded(tensor) else tensor


def in_form(local: Tensor, form: tuple[int, ...]) -> Tensor:
    """Return what a rank holds in the form that a plan knows it by, sharing memory; complex numbers as pairs there."""
    if local.shape == form:
        return local
    return (torch.view_as_real(local) if local.is_complex() else local).view(form)


def whole_of(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered if it is sharded; this is too slow for a step."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_of(name: str, tensor: Tensor, form: tuple[int, ...] | None = None) -> Shard:
    """Return where this rank's part of a tensor lies.

    Args:
        name: for errors.
        tensor: plain, or a DTensor.
        form: the shape as which its split sees a DTensor, of the same numbers in the same order: experts (E, out, in)
            as (E * out, in), complex numbers as pairs. None: its own shape.

    Raises:
        ValueError: a placement whose part is not a block of the matrix view (a shard of dim 2 or later), or a pending
            sum.
    """
    shape = tuple(int(size) for size in tensor.shape)
    if not is_sharded(tensor):
        rows, cols = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        return Shard(shape, 0, rows, 0, cols)
    placements = tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"shard_of({name!r}): expected a gradient that has been reduced, got placements {placements}. Split after "
            "the reduction: after backward(), outside no_sync()."
        )
    if form is not None and form != shape:
        return _shard_as(name, tensor, form)
    if any(getattr(placement, "dim", 0) > 1 for placement in placements):
        raise ValueError(
            f"shard_of({name!r}): expected shards along dim 0 or 1, got placements {placements} of shape {shape}. A "
            "shard of a later dim is not a block of rows x columns: shard dim 0 instead."
        )
    local, offset = place_of(tensor)
    if len(shape) < 2:
        start = offset[0] if offset else 0
        size = math.prod(local)
        return Shard(local, 0, 1 if size else 0, start, start + size)
    behind = math.prod(shape[2:])
    return Shard(local, offset[0], offset[0] + local[0], offset[1] * behind, (offset[1] + local[1]) * behind)


def gathering(
    name: str, tensor: DTensor, form: tuple[int, ...], rows: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return how what this rank holds of a tensor becomes the whole matrix, by one all-gather, and how it is cut again.

    Args:
        name: of the tensor, for errors.
        tensor: the parameter.
        form: the shape as which the tensor is seen.
        rows: of the matrix (1, rows, columns) that is wanted.
    """
    from torch.distributed.tensor import DTensor

    shard, pair = shard_of(name, tensor, form), (2,) if tensor.is_complex() else ()
    shape, mine = (*tensor.shape, *pair), (*tensor.to_local().shape, *pair)
    steps = torch.empty(shape, device="meta").stride()

    def whole(local: Tensor) -> Tensor:
        made = DTensor.from_local(
            local.view(mine),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=steps,
        )
        return made.full_tensor().reshape(1, rows, -1)

    def piece(matrix: Tensor) -> Tensor:
        row, col = slice(shard.row_start, shard.row_stop), slice(shard.col_start, shard.col_stop)
        return matrix.reshape(form[0] if len(form) > 1 else 1, -1)[row, col].contiguous()[None]

    return whole, piece


def _shard_as(name: str, tensor: DTensor, form: tuple[int, ...]) -> Shard:
    """Where this rank's part lies in another form of the tensor: some first dimensions count rows, the others columns.

    Raises:
        ValueError: a part that is no block of that form.
    """
    sizes, (local, offset) = tuple(int(size) for size in tensor.shape), place_of(tensor)
    if math.prod(form) == 2 * math.prod(sizes):  # pairs of real numbers
        sizes, local, offset = (*sizes, 2), (*local, 2), (*offset, 0)
    num_rows = form[0] if len(form) > 1 else 1
    cut = next((k for k in range(len(sizes) + 1) if math.prod(sizes[:k]) == num_rows), 0)
    rows, cols = (_run(sizes[at], local[at], offset[at]) for at in (slice(cut), slice(cut, None)))
    if rows is None or cols is None:
        raise ValueError(
            f"shard_of({name!r}): expected a shard that is a block of {num_rows} rows, got placements "
            f"{tensor.placements} of shape {tuple(tensor.shape)}, which is seen as {form}. Shard dim 0 instead."
        )
    if 0 in local:
        rows = cols = (0, 0)
    if len(form) < 2:
        shape: tuple[int, ...] = (cols[1] - cols[0],)
    elif form == sizes:
        shape = local
    else:
        pairs = form[2:]
        shape = (rows[1] - rows[0], (cols[1] - cols[0]) // math.prod(pairs), *pairs)
    return Shard(shape, *rows, *cols)


def _run(sizes: tuple[int, ...], local: tuple[int, ...], offset: tuple[int, ...]) -> tuple[int, int] | None:
    """First and last place of a block in the row-major order of all places, half open; None if it has gaps.

    >>> _run((4, 3), (2, 3), (2, 0)), _run((1, 6), (1, 2), (0, 4)), _run((4, 3), (4, 1), (0, 2))
    ((6, 12), (4, 6), None)
    """
    first = next((i for i, size in enumerate(local) if size != 1), len(local))
    if any(part != size for part, size in zip(local[first + 1 :], sizes[first + 1 :], strict=True)):
        return None
    start = sum(at * math.prod(sizes[i + 1 :]) for i, at in enumerate(offset))
    return start, start + math.prod(local)


def place_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of what this rank holds, and where it begins; also of uneven, empty and strided shards.

    The arithmetic is torch's own, and private. If its meaning changed, `ShardedKernel` would not count whole copies and
    would say so.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(local), tuple(offset)


def pieces_of(plan: Plan) -> tuple[Plan, np.ndarray | None]:
    """Cut the bins of a plan at the tensors' borders: tensors of one bin may have different numbers of copies.

    The weight and the bias of a row-wise parallel layer are such tensors.

    Returns:
        A plan of pieces, each inside one tensor; and the bin of each piece, or None where the pieces are the bins.
    """
    pairs, pieces = np.unique(np.stack((plan.bin_K, plan.tensor_K)), axis=1, return_inverse=True)
    if pairs.shape[1] == plan.num_bins:
        return plan, None
    boxes = plan.boxes
    corners = boxes.row_start_K, boxes.row_stop_K, boxes.col_start_K, boxes.col_stop_K
    cut = Boxes.from_columns(boxes.tensor_K, *corners, pieces.reshape(-1))
    return Plan(plan.layout, cut, modules=plan.modules), pairs[0]


def local_plan_of(plan: Plan, shards: Sequence[Shard]) -> Plan:
    """Return the plan of what this rank holds, see `Plan.within`; every kernel runs on it as on a whole plan.

    Bins keep their global numbers, so sums over ranks are sums over bins, and the state of a bin does not depend on the
    number of ranks.

    Args:
        plan: over the global shapes.
        shards: one per tensor.
    """
    return Plan.within(plan, [shard.shape for shard in shards], np.array([shard[1:] for shard in shards]))
