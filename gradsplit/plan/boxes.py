"""Boxes: axis-aligned blocks of matrix views as columns of integers, and the check that they tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import Layout

__all__ = ["Boxes", "sides_of"]

_INT64_MAX = 2**63 - 1


def sides_of(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of every tensor's matrix view, int64, shape (T,) each.

    Raises:
        ValueError: a side longer than 2^63 - 1; products of sides may be of any size.
    """
    for name, rows, cols in zip(layout.names, layout.rows, layout.cols, strict=True):
        if max(rows, cols) > _INT64_MAX:
            raise ValueError(
                f"Plan(…): expected rows and columns below 2^63, got {rows:,} x {cols:,} at {name!r}. Cut the "
                "tensor into several."
            )
    return np.array(layout.rows, dtype=np.int64), np.array(layout.cols, dtype=np.int64)


@dataclass(frozen=True)
class Boxes:
    """K boxes as six arrays of int64, shape (K,), sorted by tensor, then row, then column.

    Row and column bounds are half open: ``row_start <= row < row_stop``. ``bin_K`` is the bin of each box.
    """

    tensor_K: np.ndarray
    row_start_K: np.ndarray
    row_stop_K: np.ndarray
    col_start_K: np.ndarray
    col_stop_K: np.ndarray
    bin_K: np.ndarray

    @classmethod
    def from_columns(cls, *columns: np.ndarray) -> Boxes:
        """Make boxes from the six columns, in whatever order the boxes are."""
        arrays = [np.asarray(column, dtype=np.int64) for column in columns]
        tensor, row, col = arrays[0], arrays[1], arrays[3]
        same_tensor = tensor[1:] == tensor[:-1]
        rising = (row[1:] > row[:-1]) | ((row[1:] == row[:-1]) & (col[1:] >= col[:-1]))
        if not bool(np.all((tensor[1:] > tensor[:-1]) | (same_tensor & rising))):
            order = np.lexsort((col, row, tensor))
            arrays = [column[order] for column in arrays]
        return cls(*arrays)

    def __len__(self) -> int:
        return len(self.tensor_K)

    @property
    def numel_K(self) -> np.ndarray:
        """Elements of each box as float64, since a box can hold more than 2^63."""
        return (self.row_stop_K - self.row_start_K).astype(np.float64) * (self.col_stop_K - self.col_start_K)

    def slices_T(self, num_tensors: int) -> np.ndarray:
        """Bounds (T + 1,) such that the boxes of tensor t are ``[bounds[t], bounds[t + 1])``."""
        return np.searchsorted(self.tensor_K, np.arange(num_tensors + 1))

    def check_cover(self, layout: Layout) -> None:
        """Check that every element of every tensor lies in exactly one box.

        Raises:
            ValueError: boxes out of order, out of their tensor's bounds or empty, an element in two boxes or in none;
                names the tensor.
        """
        if (self.tensor_K[1:] < self.tensor_K[:-1]).any():
            raise ValueError("Plan(…): expected boxes sorted by tensor, got others. Make them with Boxes.from_columns.")
        bounds = self.slices_T(len(layout))
        if len(self) and (self.tensor_K[0] < 0 or self.tensor_K[-1] >= len(layout)):
            raise ValueError(
                f"Plan(…): expected tensor indices in [0, {len(layout)}), got one outside. Count the tensors in the "
                "layout's order, from 0."
            )
        sides_of(layout)
        for t, name in enumerate(layout.names):
            part = slice(bounds[t], bounds[t + 1])
            problem = _cover_problem(
                layout.rows[t],
                layout.cols[t],
                self.row_start_K[part],
                self.row_stop_K[part],
                self.col_start_K[part],
                self.col_stop_K[part],
            )
            if problem:
                raise ValueError(
                    f"Plan(…): expected every element in exactly one box, got {problem} at tensor {name!r} "
                    f"({layout.rows[t]} rows x {layout.cols[t]} columns). Boxes of a tensor must tile its matrix view."
                )


def _cover_problem(rows: int, cols: int, r0: np.ndarray, r1: np.ndarray, c0: np.ndarray, c1: np.ndarray) -> str | None:
    """Say what is wrong with the tiling of one rows x cols matrix, or None."""
    if rows == 0 or cols == 0:
        return "a box in an empty tensor" if len(r0) else None
    if not len(r0):
        return "no box"
    if (r0 < 0).any() or (r1 > rows).any() or (c0 < 0).any() or (c1 > cols).any():
        return "a box outside the tensor"
    if (r1 <= r0).any() or (c1 <= c0).any():
        return "an empty box"
    if (c0 == 0).all() and (c1 == cols).all():
        return _line_problem(rows, r0, r1, "row")
    if (r0 == 0).all() and (r1 == rows).all():
        return _line_problem(cols, c0, c1, "column")
    # Coordinate compression: count the boxes over each cell of the grid of all cuts by a 2-d difference array.
    row_cuts = np.unique(np.concatenate((r0, r1, [0, rows])))
    col_cuts = np.unique(np.concatenate((c0, c1, [0, cols])))
    count = np.zeros((len(row_cuts), len(col_cuts)), dtype=np.int32)
    top, bottom = np.searchsorted(row_cuts, r0), np.searchsorted(row_cuts, r1)
    left, right = np.searchsorted(col_cuts, c0), np.searchsorted(col_cuts, c1)
    for at, sign in (((top, left), 1), ((top, right), -1), ((bottom, left), -1), ((bottom, right), 1)):
        np.add.at(count, at, sign)
    np.cumsum(count, axis=0, out=count)
    np.cumsum(count, axis=1, out=count)
    cells = count[:-1, :-1]
    if (cells > 1).any():
        i, j = np.argwhere(cells > 1)[0]
        return f"two boxes over row {row_cuts[i]}, column {col_cuts[j]}"
    if (cells < 1).any():
        i, j = np.argwhere(cells < 1)[0]
        return f"no box over row {row_cuts[i]}, column {col_cuts[j]}"
    return None


def _line_problem(size: int, start: np.ndarray, stop: np.ndarray, word: str) -> str | None:
    """Say where half-open intervals fail to tile [0, size), or None."""
    order = np.argsort(start, kind="stable")
    start, stop = start[order], stop[order]
    starts_wanted = np.concatenate(([0], stop[:-1]))
    wrong = np.flatnonzero(start != starts_wanted)
    if len(wrong):
        at = wrong[0]
        word_for = "two boxes" if start[at] < starts_wanted[at] else "no box"
        return f"{word_for} over {word} {min(start[at], starts_wanted[at])}"
    if stop[-1] != size:
        return f"no box over {word} {stop[-1]}"
    return None
