"""L-BF, leaf-based best-first splitting: rectangles in which the gradient's energy is even. It controls both axes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .boxes import Boxes
from .layout import Layout, check_layout
from .plan import Plan
from .slices import xsp

__all__ = ["lbf"]

_FLOOR = 1e-12  # of the mean energy; it keeps the logarithm finite where a leaf never had a gradient


class _Leaf(NamedTuple):
    tensor: int
    top: int
    bottom: int
    left: int
    right: int
    row_energy: np.ndarray
    col_energy: np.ndarray


class _Cut(NamedTuple):
    gain: float
    axis: int
    at: int


def lbf(layout: Layout, energy: Mapping[str, Any], *, max_bins: int = 256, min_gain: float = 10.0) -> Plan:
    """Cut, best first, where the likelihood of the calibrated energies rises most.

    The model of a leaf: its gradient entries are Gaussian with mean zero and one variance. A leaf has n entries and the
    energy E, the sum of their mean squares. A cut into (n1, E1) and (n2, E2) has the gain

        n log(E / n) - n1 log(E1 / n1) - n2 log(E2 / n2)  >=  0

    which is twice the rise of the log-likelihood. Each tensor begins as one leaf. A priority queue gives the leaf and
    the row or column cut with the greatest gain. Prefix sums of a leaf's row and column energies score all its cuts in
    O(rows + columns). The result is deterministic: ties go to the first tensor, to row cuts, to the lowest position.

    The search is greedy. It leaves a pattern whole that no single cut improves, such as an exact checkerboard, and a
    first cut that looked best may cost more cuts later than it saved. So it compares plain slices along one axis at the
    end, with as many bins or with ``max_bins``, and takes them where they are likelier. L-BF is never less likely than
    XSP with as many bins. Trials found L-BF as good as rows, not better (residual net .87 against .89; detector .284
    against .273).

    Args:
        layout: names and shapes.
        energy: ``{name: mean of squared gradients, shaped like the tensor}``; see `GradientSplitter.calibrate`.
        max_bins: largest number of leaves, at least one per tensor.
        min_gain: cuts with no larger gain are not made. 10 is a likelihood ratio of e^5.

    Raises:
        ValueError: energies of other tensors or shapes, negative or not finite; max_bins below the number of tensors.

    >>> plan = lbf(Layout.from_shapes({"w": (4, 8)}), {"w": [[1] * 8] + [[100] * 8] * 3}, max_bins=2)
    >>> [bin.name for bin in plan.bins]
    ['w[0:1]', 'w[1:4]']
    """
    check_layout(layout, call="lbf")
    matrices = _checked_matrices(layout, energy)
    full = [t for t, numel in enumerate(layout.numels) if numel]
    if not isinstance(max_bins, int) or max_bins < len(full):
        raise ValueError(
            f"lbf(max_bins={max_bins}): expected at least one bin per tensor, {len(full)} here. Raise max_bins, or "
            "leave tensors out of the layout."
        )
    if not min_gain >= 0:
        raise ValueError(f"lbf(min_gain={min_gain}): expected a gain >= 0. 0 makes every cut that gains at all.")
    floor = _floor(matrices)
    done: list[_Leaf] = []
    queue: list[tuple[float, int, int, int, int, _Cut, _Leaf]] = []

    def push(leaf: _Leaf) -> None:
        cut = _best_cut(leaf, floor)
        if cut.gain > min_gain:
            heapq.heappush(queue, (-cut.gain, leaf.tensor, leaf.top, leaf.left, len(done), cut, leaf))
        else:
            done.append(leaf)

    for t in full:
        matrix = matrices[t]
        push(_Leaf(t, 0, matrix.shape[0], 0, matrix.shape[1], matrix.sum(1), matrix.sum(0)))
    while queue and len(queue) + len(done) < max_bins:
        *_, cut, leaf = heapq.heappop(queue)
        for child in _halves(leaf, cut, matrices[leaf.tensor]):
            push(child)
    leaves = done + [entry[-1] for entry in queue]
    slices = _likelier_slices(layout, matrices, leaves, floor, max_bins, min_gain)
    if slices is not None:
        return xsp(layout, parts=slices[1], axis=slices[0])
    corners = np.array([leaf[:5] for leaf in leaves], dtype=np.int64)
    corners = corners[np.lexsort((corners[:, 3], corners[:, 1], corners[:, 0]))]
    return Plan(layout, Boxes.from_columns(*corners[:, (0, 1, 2, 3, 4)].T, np.arange(len(corners))))


def _likelier_slices(
    layout: Layout, matrices: list[np.ndarray], leaves: list[_Leaf], floor: float, max_bins: int, min_gain: float
) -> tuple[int, int] | None:
    """Return (axis, parts) of the slices that beat the leaves, each bin costing ``min_gain``; None if none do."""
    lines = {axis: [(m.sum(1 - axis), m.shape[1 - axis]) for m in matrices if m.size] for axis in (0, 1)}
    sizes = {axis: [len(line) for line, _ in lines[axis]] for axis in (0, 1)}
    energy, numel = (
        np.array([leaf.row_energy.sum() for leaf in leaves]),
        np.array([float(leaf.bottom - leaf.top) * (leaf.right - leaf.left) for leaf in leaves]),
    )
    num, chosen = len(leaves), None
    best = _score(energy, numel, floor) - min_gain * num
    seen: set[tuple[int, int]] = set()
    while True:  # slices with as many bins as the best so far are compared too, so each change looks again
        fresh = {(axis, _parts_for(sizes[axis], most)) for axis in (0, 1) for most in (num, max_bins)} - seen
        if not fresh:
            return chosen
        for axis, parts in sorted(fresh):
            seen.add((axis, parts))
            energies, numels = zip(*(_sums_of_slices(line, across, parts) for line, across in lines[axis]), strict=True)
            count = sum(map(len, energies))
            score = _score(np.concatenate(energies), np.concatenate(numels), floor) - min_gain * count
            if score > best + 1e-9 * abs(best):  # more than rounding
                best, num, chosen = score, count, (axis, parts)


def _parts_for(sizes: list[int], most: int) -> int:
    """Return the largest number of slices per tensor with at most ``most`` bins in all."""
    low, high = 1, max(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(size, middle) for size in sizes) <= most else (low, middle - 1)
    return low


def _sums_of_slices(line: np.ndarray, across: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return energies and elements of a matrix's slices, cut where `xsp` cuts."""
    count = min(len(line), parts)
    cuts = np.array([k * len(line) // count for k in range(count)])
    return np.add.reduceat(line, cuts), np.diff(np.append(cuts, len(line))) * float(across)


def _score(energy: np.ndarray, numel: np.ndarray, floor: float) -> float:
    """Twice the Gaussian log-likelihood of a partition up to a constant: -sum over bins of n log(E / n)."""
    return float(-(numel * np.log(energy / numel + floor)).sum())


def _best_cut(leaf: _Leaf, floor: float) -> _Cut:
    rows, cols = leaf.bottom - leaf.top, leaf.right - leaf.left
    best = _Cut(0.0, 0, 0)
    for axis, line, across in ((0, leaf.row_energy, cols), (1, leaf.col_energy, rows)):
        if len(line) < 2:
            continue
        before = np.cumsum(line)[:-1]
        after = np.cumsum(line[::-1])[::-1][1:]  # summed from its own end: a difference would lose small energies
        n1 = np.arange(1, len(line)) * float(across)
        n2 = float(len(line)) * across - n1
        total = before[-1] + line[-1]
        n = float(len(line)) * across
        gain = n * np.log(total / n + floor) - n1 * np.log(before / n1 + floor) - n2 * np.log(after / n2 + floor)
        at = int(np.argmax(gain))
        if gain[at] > best.gain:
            best = _Cut(float(gain[at]), axis, at + 1)
    return best


def _halves(leaf: _Leaf, cut: _Cut, matrix: np.ndarray) -> tuple[_Leaf, _Leaf]:
    """Cut a leaf. Energies along the cut axis are slices; those across are summed anew, never by subtraction."""
    t, top, bottom, left, right, row, col = leaf
    if cut.axis == 0:
        middle = top + cut.at
        return (
            _Leaf(t, top, middle, left, right, row[: cut.at], matrix[top:middle, left:right].sum(0)),
            _Leaf(t, middle, bottom, left, right, row[cut.at :], matrix[middle:bottom, left:right].sum(0)),
        )
    middle = left + cut.at
    return (
        _Leaf(t, top, bottom, left, middle, matrix[top:bottom, left:middle].sum(1), col[: cut.at]),
        _Leaf(t, top, bottom, middle, right, matrix[top:bottom, middle:right].sum(1), col[cut.at :]),
    )


def _floor(matrices: list[np.ndarray]) -> float:
    entries = sum(matrix.size for matrix in matrices)
    return _FLOOR * sum(float(matrix.sum()) for matrix in matrices) / max(entries, 1) or np.finfo(np.float64).tiny


def _gap(missing: list[str], surplus: list[str]) -> str:
    """Say which names lack an energy, and which energies lack a tensor."""
    parts = []
    for said, names, more in (("none for", missing, ""), ("some for", surplus, ", which it does not have")):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{said} {names[0]!r}{rest}{more}")
    return ", and ".join(parts)


def _checked_matrices(layout: Layout, energy: Mapping[str, Any]) -> list[np.ndarray]:
    if not isinstance(energy, Mapping):
        raise TypeError(
            f"lbf(energy=…): expected a mapping from names to energies, got {type(energy).__name__}. Calibrate, or "
            "pass {name: array shaped like the tensor}."
        )
    missing = [name for name in layout.names if name not in energy]
    surplus = [name for name in energy if name not in set(layout.names)]
    if missing or surplus:
        raise ValueError(
            f"lbf(energy=…): expected energies of exactly the layout's tensors, got {_gap(missing, surplus)}. "
            "Calibrate the model that you split."
        )
    matrices = []
    for t, name in enumerate(layout.names):
        value = energy[name]
        if hasattr(value, "detach"):  # a torch tensor, without importing torch
            value = value.detach().to("cpu")
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(
                f"lbf(energy=…): expected an array of numbers, got {type(value).__name__} at {name!r}. Pass the mean "
                "of its squared gradients."
            ) from None
        if array.shape != layout.shapes[t]:
            raise ValueError(
                f"lbf(energy=…): expected shape {layout.shapes[t]}, got {array.shape} at {name!r}. Pass one energy per "
                "entry of the tensor."
            )
        if not (np.isfinite(array).all() and (array >= 0).all()):
            raise ValueError(
                f"lbf(energy=…): expected finite energies >= 0, got others at {name!r}. Pass means of squared "
                "gradients, and leave out steps whose gradient is not finite."
            )
        matrices.append(array.reshape(layout.rows[t], layout.cols[t]))
    return matrices
