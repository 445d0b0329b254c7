"""Independent answers: element labels painted from the boxes, plain loops, float64 numpy."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from gradsplit.plan import Plan


@functools.lru_cache(maxsize=64)
def label_elements(plan: Plan) -> list[np.ndarray]:
    """The bin of every element, one integer array a tensor, painted box by box.

    Asserts on the way that no element is painted twice, and at the end that none is left.
    """
    canvases = []
    for shape in plan.layout.shapes:
        rows = shape[0] if len(shape) > 1 else 1
        cols = int(np.prod(shape[1:], dtype=int)) if len(shape) > 1 else int(np.prod(shape, dtype=int))
        canvases.append(np.full((rows, cols), -1))
    for k in range(len(plan.boxes)):
        canvas = canvases[plan.tensor_K[k]]
        block = (
            slice(plan.row_start_K[k], plan.row_stop_K[k]),
            slice(plan.col_start_K[k], plan.col_stop_K[k]),
        )
        assert canvas[block].size > 0, f"box {k} is empty"
        assert plan.row_stop_K[k] <= canvas.shape[0], f"box {k} reaches beyond the rows"
        assert plan.col_stop_K[k] <= canvas.shape[1], f"box {k} reaches beyond the columns"
        assert (canvas[block] == -1).all(), f"box {k} covers an element that another box has"
        canvas[block] = plan.bin_K[k]
    for name, canvas in zip(plan.layout.names, canvases, strict=True):
        assert (canvas >= 0).all(), f"an element of {name} is in no box"
    return [canvas.reshape(shape) for canvas, shape in zip(canvases, plan.layout.shapes, strict=True)]


def to_numpy(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """Dense float64 (complex128) values, always a copy; zeros for None."""
    if tensor is None:
        return np.zeros(shape)
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    wide = torch.complex128 if dense.is_complex() else torch.float64
    return dense.resolve_conj().resolve_neg().to(wide).contiguous().numpy().copy()


def square_sums(plan: Plan, tensors: list[torch.Tensor | None]) -> np.ndarray:
    """Sum of |x|^2 of each bin."""
    sums = np.zeros(plan.num_bins)
    with np.errstate(invalid="ignore", over="ignore"):
        for labels, tensor in zip(label_elements(plan), tensors, strict=True):
            array = to_numpy(tensor, labels.shape)
            squares = array.real**2 + array.imag**2
            np.add.at(sums, labels.reshape(-1), squares.reshape(-1))
    return sums


@functools.lru_cache(maxsize=64)
def bins_below(plan: Plan) -> list[list[int]]:
    """The bins below each node, by walking from every bin to the root."""
    below: list[list[int]] = [[] for _ in range(plan.num_nodes)]
    for b, start in enumerate(plan.bin_nodes_B):
        node = int(start)
        while node >= 0:
            below[node].append(b)
            node = int(plan.parents_N[node])
    return below


def node_norms(plan: Plan, norm_B: np.ndarray) -> np.ndarray:
    """The norm of every node from its bins."""
    return np.array([math.sqrt(sum(norm_B[b] ** 2 for b in bins)) for bins in bins_below(plan)])


def bottom_up_scales(plan: Plan, norm_B: np.ndarray, limit_N: np.ndarray) -> np.ndarray:
    """The default rule as its sentence says: every node after all its children, by what its bins keep by then."""
    below = bins_below(plan)
    depth = np.zeros(plan.num_nodes, dtype=int)
    for node in range(1, plan.num_nodes):
        depth[node] = depth[plan.parents_N[node]] + 1
    scale = np.ones(plan.num_bins)
    for node in sorted(range(plan.num_nodes), key=lambda n: -depth[n]):
        kept = math.sqrt(sum((norm_B[b] * scale[b]) ** 2 for b in below[node]))
        if kept > limit_N[node]:
            for b in below[node]:
                scale[b] *= limit_N[node] / kept
    return scale


def scaled_by_labels(plan: Plan, array: np.ndarray, t: int, scale_B: np.ndarray, zero_B: np.ndarray) -> np.ndarray:
    """One tensor after control."""
    labels = label_elements(plan)[t]
    with np.errstate(invalid="ignore"):
        return np.where(zero_B[labels], 0.0, array * scale_B[labels])


def tolerance_of(dtype: torch.dtype) -> float:
    """A few units in the last place."""
    return 4 * torch.finfo(dtype).eps
