"""Bins in eager torch without a loop over bins, for every device, dtype and stride.

The plan of each tensor is read once into a *pattern*: the bin of each row, of each column or of each element. Reading a
tensor is then one reduction, and all bins are added up by one scatter-add. Scaling it is one multiplication by a factor
that broadcasts.

On a GPU a small tensor costs what its launches cost. So tensors are read and scaled in *sets*: those that are one bin
by one foreach operation, small ones of one shape in one reduction, and small ones of one dtype by one multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..plan import Plan, pattern_of
from .addressable import PLAIN, LastFour, overlap
from .kernel import Kernel, accumulate_dtype

__all__ = ["SMALL", "EagerKernel"]

SMALL = 1 << 16
"""Elements up to which a tensor is copied beside others, since its launches cost more than the copy."""

STACKED, PACKED = 64, 1 << 22
"""The most tensors that are read as one, and the most elements that are scaled as one: what the copies may take."""


class _Pattern:
    """The `pattern_of` one tensor on its device, and what is done with it."""

    def __init__(self, plan: Plan, t: int, device: torch.device) -> None:
        self.kind, bins = pattern_of(plan, t)
        self.shape = plan.layout.shapes[t]
        self.ids = torch.from_numpy(np.ascontiguousarray(bins.reshape(-1))).to(device)

    def lengths(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return lengths whose squares add up to the bins', one an entry of ``ids`` (if sparse: of the stored rows)."""
        dims = {"tensor": None, "rows": tuple(range(1, tensor.dim())), "cols": 0, "cells": ()}[self.kind]
        tensor = tensor.abs() if tensor.is_complex() else tensor
        if self.kind == "cells" or tensor.dim() == 0 or (self.kind == "cols" and tensor.dim() == 1):
            return tensor.reshape(-1).to(dtype)
        return torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype).reshape(-1)

    def stored_ids(self, rows: Tensor) -> Tensor:
        """Return the ids that belong to the stored rows of a sparse tensor."""
        if self.kind == "rows":
            return self.ids[rows]
        if self.kind == "cols" and len(self.shape) == 1:
            return self.ids[rows]
        if self.kind == "cells":
            return self.ids.view(self.shape[0], -1)[rows].reshape(-1)
        return self.ids

    def factor(self, values_B: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the bins' values in a shape that broadcasts over the tensor, or over its stored rows."""
        ids = self.ids if rows is None else self.stored_ids(rows)
        return self.broadcast(values_B.index_select(0, ids), rows)

    def broadcast(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return values, one an entry of ``ids`` or of `stored_ids`, in a shape that broadcasts over the tensor."""
        if self.kind in ("tensor", "none"):
            return values.reshape(() if len(values) else self.shape)  # an empty tensor has no bin
        if self.kind == "rows":
            return values.view(-1, *(1,) * (len(self.shape) - 1))
        shape = self.shape if rows is None else (len(rows), *self.shape[1:])
        return values.view(1, *shape[1:]) if self.kind == "cols" and len(shape) > 1 else values.view(shape)


Signature = list[tuple[torch.dtype, bool] | None]
"""The dtype of each tensor and whether it is contiguous; None: nothing there, or one that is served by itself."""


@dataclass
class _Pack:
    """Small tensors of one dtype that are scaled as one: the ids of their rows, and the elements of each row."""

    at: list[int]
    ids: Tensor
    sizes: Tensor
    numel: int


@dataclass
class _Together:
    """What is done at once with tensors of one signature; all lists hold places in the layout.

    Attributes:
        wholes: tensors that are one bin each, by dtype.
        stacks: small ones of one shape and dtype, whose rows are bins.
        singles: all others, which are read one by one.
        read_ids: the bins of what is read, in the order of these three.
        packs: small ones that are scaled as one.
        alone: all others, scaled by one foreach operation.
        alone_ids, alone_sizes: their ids, and how many each has.
    """

    wholes: list[list[int]]
    stacks: list[list[int]]
    singles: list[int]
    read_ids: Tensor
    packs: list[_Pack]
    alone: list[int]
    alone_ids: Tensor
    alone_sizes: list[int]
    apart_at: list[int] = field(default_factory=list)  # the addresses at which tensors were last found apart


class EagerKernel(Kernel):
    """The kernel for tensors of every kind.

    For L-BF bins it keeps one int64 per element of their tensor: use the numba backend where that is too much.
    """

    name = "eager"

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._patterns = [_Pattern(plan, t, device) for t in range(len(plan.layout))]
        self._known: LastFour[_Together] = LastFour()

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares`."""
        dtype = accumulate_dtype(self.device)
        sets, odd = self._together(tensors)
        ids: list[Tensor] = []
        lengths: list[Tensor] = []
        if sets is not None:
            ids.append(sets.read_ids)
            lengths += [torch.stack(torch._foreach_norm(_at(tensors, of), 2, dtype)) for of in sets.wholes]
            for of in sets.stacks:
                stack = torch.stack(_at(tensors, of))
                lengths.append(torch.linalg.vector_norm(stack, dim=tuple(range(2, stack.dim())), dtype=dtype).view(-1))
            lengths += [self._patterns[t].lengths(tensors[t], dtype) for t in sets.singles]  # type: ignore[arg-type]
        for t in odd:
            tensor, pattern = tensors[t], self._patterns[t]
            assert tensor is not None
            if not tensor.is_sparse:
                ids.append(pattern.ids)
                lengths.append(pattern.lengths(tensor, dtype))
                continue
            tensor = tensor.coalesce()
            if tensor._nnz():
                ids.append(pattern.stored_ids(tensor.indices()[0]))
                lengths.append(pattern.lengths(tensor.values(), dtype))
        squares_B = torch.zeros(self.plan.num_bins, dtype=dtype, device=self.device)
        return squares_B.index_add(0, _joined(ids), _joined(lengths).square()) if lengths else squares_B

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `Kernel.scale_`. It multiplies unconditionally: to look first would be to wait for the device."""
        sets, odd = self._together(tensors)
        if sets is not None and not _apart(sets, tensors):
            sets, odd = None, [t for t, tensor in enumerate(tensors) if tensor is not None and tensor.numel()]
        if sets is not None:  # all copies are made before the first write, since there may be no memory for one
            packs = [(_at(tensors, pack.at), pack) for pack in sets.packs]
            scaled = [(of, self._scaled(of, pack, scale_B, zero_B)) for of, pack in packs]
            if sets.alone:
                self._scale_alone_(_at(tensors, sets.alone), sets, scale_B, zero_B)
            for of, flat in scaled:
                torch._foreach_copy_(of, torch._C._nn.unflatten_dense_tensors(flat, of))
        for t in odd:
            tensor = tensors[t]
            assert tensor is not None
            rows = tensor.indices()[0] if tensor.is_sparse else None
            dense = tensor.values() if tensor.is_sparse else tensor
            dense.mul_(self.factor(t, scale_B, tensor.dtype, rows))
            dense.masked_fill_(self._patterns[t].factor(zero_B, rows), 0)

    def _scaled(self, tensors: list[Tensor], pack: _Pack, scale_B: Tensor, zero_B: Tensor) -> Tensor:
        """Return a scaled copy of small tensors beside each other."""
        flat: Tensor = torch._C._nn.flatten_dense_tensors(tensors)
        row_of = torch.repeat_interleave(pack.sizes, output_size=pack.numel)
        flat.mul_(scale_B.index_select(0, pack.ids).to(_wide(flat.dtype)).index_select(0, row_of))
        return flat.masked_fill_(zero_B.index_select(0, pack.ids).index_select(0, row_of), 0)

    def _scale_alone_(self, tensors: list[Tensor], sets: _Together, scale_B: Tensor, zero_B: Tensor) -> None:
        """Scale tensors where they lie, by factors that are read at once."""
        scales, zeros = (values_B.index_select(0, sets.alone_ids) for values_B in (scale_B, zero_B))
        in_dtype = {dtype: scales.to(dtype) for dtype in {_wide(tensor.dtype) for tensor in tensors}}
        parts = {dtype: values.split(sets.alone_sizes) for dtype, values in in_dtype.items()}
        patterns = [self._patterns[t] for t in sets.alone]
        factors = [
            p.broadcast(parts[_wide(x.dtype)][i]) for i, (p, x) in enumerate(zip(patterns, tensors, strict=True))
        ]
        torch._foreach_mul_(tensors, factors)
        for tensor, pattern, zero in zip(tensors, patterns, zeros.split(sets.alone_sizes), strict=True):
            tensor.masked_fill_(pattern.broadcast(zero), 0)

    def _together(self, tensors: Sequence[Tensor | None]) -> tuple[_Together | None, list[int]]:
        """The sets of tensors of these dtypes, made anew or found among the last four; and those without one."""
        signature: Signature = []
        odd = []
        traced = torch.compiler.is_compiling()
        for t, tensor in enumerate(tensors):
            if tensor is None or tensor.numel() == 0:
                signature.append(None)
            elif traced or type(tensor) not in PLAIN or tensor.layout is not torch.strided or tensor.is_complex():
                signature.append(None)
                odd.append(t)
            else:
                signature.append((tensor.dtype, tensor.is_contiguous()))
        if len(odd) == len(signature) or not any(signature):
            return None, odd
        return self._known.find(signature) or self._known.keep(signature, self._gather(signature)), odd

    def _gather(self, signature: Signature) -> _Together:
        layout, patterns = self.plan.layout, self._patterns
        wholes: dict[torch.dtype, list[int]] = {}
        stacks: dict[tuple[torch.dtype, tuple[int, ...]], list[int]] = {}
        packs: dict[torch.dtype, list[int]] = {}
        singles: list[int] = []
        alone: list[int] = []
        for t, entry in enumerate(signature):
            if entry is None:
                continue
            (dtype, contiguous), kind = entry, patterns[t].kind
            small = contiguous and layout.numels[t] <= SMALL
            if kind == "tensor":
                wholes.setdefault(dtype, []).append(t)
            elif kind == "rows" and small:
                stacks.setdefault((dtype, layout.shapes[t]), []).append(t)
            else:
                singles.append(t)
            if small and kind in ("tensor", "rows"):
                packs.setdefault(dtype, []).append(t)
            else:
                alone.append(t)
        stacked = [of[i : i + STACKED] for of in stacks.values() for i in range(0, len(of), STACKED)]
        order = [t for of in (*wholes.values(), *stacked, singles) for t in of]
        packed = [of for in_dtype in packs.values() for of in _runs(in_dtype, [layout.numels[t] for t in in_dtype])]
        return _Together(
            wholes=list(wholes.values()),
            stacks=stacked,
            singles=singles,
            read_ids=self._ids(order),
            packs=[self._pack(of) for of in packed],
            alone=alone,
            alone_ids=self._ids(alone),
            alone_sizes=[len(patterns[t].ids) for t in alone],
        )

    def _pack(self, at: list[int]) -> _Pack:
        numels = [self.plan.layout.numels[t] for t in at]
        rows = [len(self._patterns[t].ids) for t in at]
        sizes = np.repeat([numel // num for numel, num in zip(numels, rows, strict=True)], rows)
        return _Pack(at, self._ids(at), torch.from_numpy(sizes).to(self.device), sum(numels))

    def _ids(self, at: list[int]) -> Tensor:
        return _joined([self._patterns[t].ids for t in at] or [torch.zeros(0, dtype=torch.int64, device=self.device)])

    def factor(self, t: int, values_B: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Return values of the bins in a shape that broadcasts over tensor t, or over its stored rows.

        Args:
            t: the tensor's place in the layout.
            values_B: (B,) numbers or bool.
            dtype: of the tensor; numbers come in at least float32 and else in its real dtype, which it then keeps.
            rows: the stored rows of a sparse tensor.
        """
        values = self._patterns[t].factor(values_B, rows)
        return values if values.dtype == torch.bool else values.to(_wide(dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the factors for tensors of a dtype."""
    dtype = dtype.to_real() if dtype.is_complex else dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _at(tensors: Sequence[Tensor | None], places: list[int]) -> list[Tensor]:
    return [tensors[t] for t in places]  # type: ignore[misc]


def _joined(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _runs(at: list[int], sizes: list[int]) -> list[list[int]]:
    """Places in runs of at most `PACKED` elements."""
    run_of = (np.cumsum(sizes) - 1) // PACKED
    return [[t for t, one in zip(at, run_of, strict=True) if one == run] for run in np.unique(run_of)]


def _apart(sets: _Together, tensors: Sequence[Tensor | None]) -> bool:
    """Whether no two tensors that are scaled in a copy share memory; looked at where one has moved."""
    small = [tensors[t] for pack in sets.packs for t in pack.at]
    addresses = [tensor.data_ptr() for tensor in small if tensor is not None]
    if addresses != sets.apart_at:
        if all(addresses) and overlap([tensor for tensor in small if tensor is not None]):
            return False
        sets.apart_at = addresses
    return True
