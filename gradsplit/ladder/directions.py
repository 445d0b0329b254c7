"""Directions of a ladder: one for the whole gradient, or one per bin of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..plan import Plan
from .signedlog import Floats
from .trace import Params, TracedLoss

FLOOR_RMS = 0.01  # a bin of zeros (a fresh bias) counts as this long per element, as in RelativeStep


@dataclass(frozen=True)
class Batch:
    """Some directions that are followed together.

    Args:
        names: name of each direction.
        tensors: for each parameter that moves, (B, *shape).
        length_B: length of each direction.
        weight_B: length of the parameters that it moves, at least ``FLOOR_RMS`` per element.
    """

    names: tuple[str, ...]
    tensors: dict[str, Tensor]
    length_B: Floats
    weight_B: Floats

    def scaled(self, log_scale_B: Floats) -> dict[str, Tensor]:
        """Return every direction times its own factor."""
        factor_B = torch.from_numpy(np.exp(log_scale_B))
        return {name: x * factor_B.to(x.device).reshape(-1, *[1] * (x.ndim - 1)) for name, x in self.tensors.items()}


def checked(direction: Mapping[str, Tensor], params: Params) -> dict[str, Tensor]:
    """Return a given direction in float64.

    Raises:
        ValueError: a name that the parameters do not have, or a shape that differs from its parameter's.
    """
    for name, x in direction.items():
        if name not in params or tuple(x.shape) != tuple(params[name].shape):
            expected = f"shape {tuple(params[name].shape)}" if name in params else f"one of {', '.join(params)}"
            raise ValueError(
                f"taylor_ladder(direction): expected {expected}, got {name!r} of shape {tuple(x.shape)}. "
                "Give the direction the names and shapes of the parameters."
            )
    if not direction:
        raise ValueError(
            "taylor_ladder(direction={}): expected at least one tensor, got none. Leave it out for minus the gradient."
        )
    return {name: x.detach().double() for name, x in direction.items()}


def single(direction: Mapping[str, Tensor], params: Params) -> Batch:
    """Return one direction as a batch."""
    tensors = {name: x[None] for name, x in direction.items()}
    square = sum(float(x.square().sum()) for x in tensors.values())
    moved = [params[name].detach().double() for name in direction]
    return Batch(
        names=("direction",),
        tensors=tensors,
        length_B=np.sqrt(np.array([square])),
        weight_B=_weight(np.array([sum(float(w.square().sum()) for w in moved)]), [sum(w.numel() for w in moved)]),
    )


def per_bin(
    plan: Plan, params: Params, direction: Mapping[str, Tensor], traced: TracedLoss, order: int, memory: int
) -> Iterator[Batch]:
    """Yield a direction restricted to each bin alone, in batches that fit the memory.

    Args:
        plan: the bins; its tensors must be among the parameters.
        params: the point.
        direction: a tensor for every parameter; see ``checked``.
        traced: the loss, which knows how many numbers one order of one bin needs.
        order: highest order.
        memory: bytes that one batch may take, roughly.

    Raises:
        ValueError: the plan's layout does not fit the parameters.
    """
    names, boxes = plan.layout.names, plan.boxes
    for name, shape in zip(names, plan.layout.shapes, strict=True):
        if name not in params or tuple(params[name].shape) != tuple(shape):
            raise ValueError(
                f"taylor_ladder(bins=plan): expected the plan's tensors among the parameters, got {name!r} of shape "
                f"{tuple(shape)}. Build the plan from the same model: gs.xsp(gs.layout_of(model))."
            )
    by_bin = np.argsort(boxes.bin_K, kind="stable")
    first_box_B = np.searchsorted(boxes.bin_K[by_bin], np.arange(plan.num_bins + 1))
    start = 0
    while start < plan.num_bins:
        boxes_of_first = by_bin[first_box_B[start] : first_box_B[start + 1]]
        touched = frozenset(names[t] for t in boxes.tensor_K[boxes_of_first])
        moving_numbers = traced.peak_numbers(touched) + 2 * sum(params[name].numel() for name in touched)
        limit = max(1, memory // (8 * 3 * (order + 1) * moving_numbers))
        stop = start + 1
        while stop < plan.num_bins and stop - start < limit:
            boxes_of_next = by_bin[first_box_B[stop] : first_box_B[stop + 1]]
            if not touched.issuperset(names[t] for t in boxes.tensor_K[boxes_of_next]):
                break
            stop += 1
        chosen = by_bin[first_box_B[start] : first_box_B[stop]]
        yield _bins(plan, params, direction, range(start, stop), chosen)
        start = stop


def _bins(plan: Plan, params: Params, direction: Mapping[str, Tensor], bins: range, box_indices: np.ndarray) -> Batch:
    tensors: dict[str, Tensor] = {}
    square_B, weight_B = np.zeros(len(bins)), np.zeros(len(bins))
    boxes, layout = plan.boxes, plan.layout
    for k in box_indices:
        t = int(boxes.tensor_K[k])
        name, view = layout.names[t], (int(layout.rows[t]), int(layout.cols[t]))
        rows = slice(int(boxes.row_start_K[k]), int(boxes.row_stop_K[k]))
        columns = slice(int(boxes.col_start_K[k]), int(boxes.col_stop_K[k]))
        b = int(boxes.bin_K[k]) - bins.start
        part = direction[name].reshape(view)[rows, columns]
        if name not in tensors:
            tensors[name] = direction[name].new_zeros(len(bins), *params[name].shape)
        tensors[name][b].view(view)[rows, columns] = part
        square_B[b] += float(part.square().sum())
        weight_B[b] += float(params[name].detach().double().reshape(view)[rows, columns].square().sum())
    return Batch(
        names=tuple(plan.bins[b].name for b in bins),
        tensors=tensors,
        length_B=np.sqrt(square_B),
        weight_B=_weight(weight_B, plan.numel_B[bins.start : bins.stop]),
    )


def _weight(square_B: Floats, numel_B: Sequence[float] | Floats) -> Floats:
    return np.maximum(np.sqrt(square_B), FLOOR_RMS * np.sqrt(np.asarray(numel_B, dtype=np.float64)))
