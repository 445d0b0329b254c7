"""The plan: an exact partition of a layout into bins, with the tree of nodes above them.

Shape suffixes: _K one entry per box, _B per bin, _N per node, _T per tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

import numpy as np

from .boxes import Boxes
from .layout import Layout
from .tree import BIN, LEVELS, Tree, tensors_of_bins

__all__ = ["Bin", "Box", "Node", "Plan", "part_of"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Box:
    """An axis-aligned block of one tensor's matrix view; bounds are half open."""

    tensor: str
    start: tuple[int, int]
    stop: tuple[int, int]


@dataclass(frozen=True)
class Bin:
    """Boxes that are controlled together: a leaf of the plan."""

    index: int
    name: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Node:
    """A place in the plan's tree; ``level`` is "root", "module", "tensor" or "bin"; the root's ``parent`` is -1."""

    index: int
    name: str
    level: str
    parent: int


class _Lazy(Sequence[_T], Generic[_T]):
    """A sequence whose entries are made on demand, so that a million bins do not cost a million objects."""

    def __init__(self, length: int, make: Callable[[int], _T]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> list[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | list[_T]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"index {index} is out of range for {self._length} entries")
        return self._make(position)

    def __iter__(self) -> Iterator[_T]:
        return (self._make(i) for i in range(self._length))


class Plan:
    """What is controlled together: bins that cover every element of the layout exactly once.

    A plan never changes after it is made.

    Args:
        layout: names and shapes of the tensors.
        boxes: the boxes of all bins; bins are numbered from 0 without gaps.
        modules: put the module tree (dotted names) between the root and the tensors.
        width_T: (T,) elements of a whole row of each matrix, where the layout holds a shard. None: as in the layout.

    Attributes:
        num_bins: number of bins.
        tree: the nodes, see `Tree`.
        width_T: (T,) elements of a whole row of each matrix; inf for a vector, which thereby counts no matrix rows.

    Raises:
        ValueError: the boxes do not tile the layout, or bins are not numbered 0 … B-1.
        AttributeError: a later assignment.

    >>> from gradsplit.plan import xsp
    >>> plan = xsp(Layout.from_shapes({"w": (4, 3), "b": (4,)}), parts=2)
    >>> [bin.name for bin in plan.bins]
    ['w[0:2]', 'w[2:4]', 'b']
    >>> [(node.level, node.name) for node in plan.nodes[:3]]
    [('root', 'all'), ('tensor', 'w'), ('tensor', 'b')]
    """

    layout: Layout
    boxes: Boxes
    modules: bool
    num_bins: int
    tree: Tree
    width_T: np.ndarray

    def __init__(
        self, layout: Layout, boxes: Boxes, *, modules: bool = False, width_T: np.ndarray | None = None
    ) -> None:
        boxes.check_cover(layout)
        num_bins = int(boxes.bin_K.max()) + 1 if len(boxes) else 0
        if not len(boxes):
            raise ValueError(
                f"Plan(…): expected at least one element, got only empty tensors ({', '.join(layout.names[:3])}…). "
                "Pass a model with parameters."
            )
        misnumbered = boxes.bin_K.min() < 0 or num_bins > len(boxes)  # looked at before memory is taken for them
        if misnumbered or (np.bincount(boxes.bin_K, minlength=num_bins) == 0).any():
            raise ValueError("Plan(…): expected bins numbered 0 … B-1 without gaps, got a gap. Renumber boxes.bin_K.")
        tree = Tree.build(layout, boxes, num_bins, modules=modules)
        self._set(layout, boxes, modules, num_bins, tree, _widths_of(layout) if width_T is None else width_T)

    @classmethod
    def within(cls, plan: Plan, shapes_T: Sequence[tuple[int, ...]], blocks_T: np.ndarray) -> Plan:
        """Make the plan of what lies within one block of each tensor's matrix view, such as a shard.

        Bins keep their numbers, and the tree is that of the whole plan: a bin that lies elsewhere has no box here. So a
        vector over bins means the same for every shard, and sums over shards are sums over bins.

        Args:
            plan: over the whole tensors.
            shapes_T: the shape of each block.
            blocks_T: (T, 4) row start, row stop, column start and column stop of each block; half open.

        >>> from gradsplit.plan import xsp
        >>> whole = xsp(Layout.from_shapes({"w": (4, 3)}), parts=2)
        >>> upper = Plan.within(whole, [(3, 3)], np.array([[0, 3, 0, 3]]))
        >>> upper.numel_B.tolist()
        [6.0, 3.0]
        """
        whole, corner = plan.boxes, np.asarray(blocks_T, dtype=np.int64)[plan.boxes.tensor_K]
        top, bottom = np.maximum(whole.row_start_K, corner[:, 0]), np.minimum(whole.row_stop_K, corner[:, 1])
        left, right = np.maximum(whole.col_start_K, corner[:, 2]), np.minimum(whole.col_stop_K, corner[:, 3])
        here = (top < bottom) & (left < right)
        boxes = Boxes.from_columns(
            whole.tensor_K[here],
            (top - corner[:, 0])[here],
            (bottom - corner[:, 0])[here],
            (left - corner[:, 2])[here],
            (right - corner[:, 2])[here],
            whole.bin_K[here],
        )
        made, layout = cls.__new__(cls), Layout(plan.layout.names, tuple(shapes_T))
        made._set(layout, boxes, plan.modules, plan.num_bins, plan.tree, plan.width_T)
        vars(made)["tensor_B"] = plan.tensor_B
        return made

    def _set(self, layout: Layout, boxes: Boxes, modules: bool, num_bins: int, tree: Tree, width_T: np.ndarray) -> None:
        made = {"layout": layout, "boxes": boxes, "modules": modules, "num_bins": num_bins}
        vars(self).update(made, tree=tree, width_T=width_T)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Plan.{name} = …: expected a plan to stay as it was made. Make another plan.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"del Plan.{name}: expected a plan to stay as it was made. Make another plan.")

    # The boxes and the tree, by the names that kernels and budgets use.
    tensor_K = property(lambda self: self.boxes.tensor_K)
    row_start_K = property(lambda self: self.boxes.row_start_K)
    row_stop_K = property(lambda self: self.boxes.row_stop_K)
    col_start_K = property(lambda self: self.boxes.col_start_K)
    col_stop_K = property(lambda self: self.boxes.col_stop_K)
    bin_K = property(lambda self: self.boxes.bin_K)
    parents_N = property(lambda self: self.tree.parents_N)
    levels_N = property(lambda self: self.tree.levels_N)
    bin_nodes_B = property(lambda self: self.tree.bin_nodes_B)
    num_nodes = property(lambda self: len(self.tree.parents_N))

    @cached_property
    def numel_B(self) -> np.ndarray:
        """Elements of each bin, float64 (exact below 2^53)."""
        return np.bincount(self.boxes.bin_K, weights=self.boxes.numel_K, minlength=self.num_bins)

    def numel_in_B(self, present_T: np.ndarray) -> np.ndarray:
        """Elements of each bin in the tensors that are present, (B,); ``present_T`` (T,) holds 1.0 or 0.0."""
        weights = self.boxes.numel_K * present_T[self.boxes.tensor_K]
        return np.bincount(self.boxes.bin_K, weights=weights, minlength=self.num_bins)

    @cached_property
    def tensor_B(self) -> np.ndarray:
        """The tensor that each bin lies in, (B,); -1 where it lies in several."""
        first_B, single_B = tensors_of_bins(self.boxes, self.num_bins)
        return np.where(single_B, first_B, -1)

    def boxes_of(self, t: int) -> slice:
        """Return where the boxes of tensor ``t`` stand among all boxes."""
        return slice(int(self._bounds_T[t]), int(self._bounds_T[t + 1]))

    @cached_property
    def _bounds_T(self) -> np.ndarray:
        return self.boxes.slices_T(len(self.layout))

    @cached_property
    def num_rows_B(self) -> np.ndarray:
        """Matrix rows in each bin, as a fraction where a bin holds some columns of a row; a vector has none."""
        rows_K = self.boxes.numel_K / self.width_T[self.boxes.tensor_K]
        return np.bincount(self.boxes.bin_K, weights=rows_K, minlength=self.num_bins)

    @property
    def bins(self) -> Sequence[Bin]:
        """The bins, made when asked for."""
        return _Lazy(self.num_bins, self._bin)

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes, parents before children, made when asked for."""
        return _Lazy(self.num_nodes, self._node)

    def level_nodes(self, level: str) -> np.ndarray:
        """Indices of the nodes of a level: "root", "module", "tensor" or "bin"."""
        return np.flatnonzero(self.tree.levels_N == LEVELS.index(level))

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name this partition of this layout."""
        digest = hashlib.sha256(self.layout.fingerprint.encode())
        digest.update(b"modules" if self.modules else b"")
        for column in vars(self.boxes).values():
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        return digest.hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings from which `from_dict` makes the same plan again."""
        return {
            "names": list(self.layout.names),
            "shapes": [list(shape) for shape in self.layout.shapes],
            "modules": self.modules,
            "boxes": {key: column.tolist() for key, column in vars(self.boxes).items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Plan:
        """Make the plan that `to_dict` described.

        Raises:
            ValueError: something else, or boxes that do not tile the layout.
        """
        try:
            names, shapes = tuple(state["names"]), tuple(tuple(shape) for shape in state["shapes"])
            columns = {key: np.array(column).astype(np.int64, casting="safe") for key, column in state["boxes"].items()}
            boxes, modules = Boxes(**columns), bool(state["modules"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"Plan.from_dict(…): expected what to_dict() returned, got something else ({error}). Make the plan "
                "again from the model."
            ) from error
        if len({column.shape for column in columns.values()}) != 1 or columns["bin_K"].ndim != 1:
            raise ValueError(
                "Plan.from_dict(…): expected columns of one length, one entry per box, got columns of the shapes "
                f"{sorted({column.shape for column in columns.values()})}. Make the plan again from the model."
            )
        return cls(Layout(names, shapes), boxes, modules=modules)

    def describe(self, *, max_lines: int = 20) -> str:
        """Say in a few lines what is split into how many bins, and how many bytes that takes."""
        layout = self.layout
        lines = [
            f"{self.num_bins} bins over {len(layout)} tensors, {layout.num_elements:,} elements "
            f"({4 * layout.num_elements:,} bytes in float32); {self.num_nodes} nodes; "
            f"{8 * self.num_bins:,} bytes for one float64 per bin; plan {self.fingerprint}"
        ]
        for t, name in enumerate(layout.names[:max_lines]):
            bins = len(np.unique(self.boxes.bin_K[self.boxes_of(t)]))
            shape = "x".join(str(size) for size in layout.shapes[t]) or "scalar"
            lines.append(f"  {name:<40} {shape:>16} {bins:>10} bin{'s' if bins != 1 else ''}")
        if len(layout) > max_lines:
            lines.append(f"  … and {len(layout) - max_lines} more tensors")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Plan({self.num_bins} bins, {len(self.layout)} tensors, {self.fingerprint})"

    def _box(self, k: int) -> Box:
        b = self.boxes
        return Box(
            self.layout.names[b.tensor_K[k]],
            (int(b.row_start_K[k]), int(b.col_start_K[k])),
            (int(b.row_stop_K[k]), int(b.col_stop_K[k])),
        )

    def _bin(self, index: int) -> Bin:
        members = np.flatnonzero(self.boxes.bin_K == index) if self._many_boxes else (self._box_of_bin_B[index],)
        boxes = tuple(self._box(int(k)) for k in members)
        return Bin(index, " + ".join(self._box_name(int(k)) for k in members) if len(boxes) < 4 else "all", boxes)

    def _box_name(self, k: int) -> str:
        box, t = self._box(k), int(self.boxes.tensor_K[k])
        rows, cols = self.layout.rows[t], self.layout.cols[t]
        all_rows, all_cols = box.stop[0] - box.start[0] == rows, box.stop[1] - box.start[1] == cols
        if all_rows and all_cols:
            return box.tensor
        row = ":" if all_rows else f"{box.start[0]}:{box.stop[0]}"
        return f"{box.tensor}[{row}]" if all_cols else f"{box.tensor}[{row}, {box.start[1]}:{box.stop[1]}]"

    def _node(self, index: int) -> Node:
        level = int(self.tree.levels_N[index])
        name = self._bin(int(self.tree.bin_of_node(index))).name if level == BIN else self.tree.names[index]
        return Node(index, name, LEVELS[level], int(self.tree.parents_N[index]))

    @cached_property
    def _many_boxes(self) -> bool:
        return len(self.boxes) != self.num_bins

    @cached_property
    def _box_of_bin_B(self) -> np.ndarray:
        return np.argsort(self.boxes.bin_K, kind="stable")


def _widths_of(layout: Layout) -> np.ndarray:
    shapes = zip(layout.shapes, layout.cols, strict=True)
    return np.array([max(float(cols), 1.0) if len(shape) > 1 else np.inf for shape, cols in shapes])


def part_of(plan: Plan, tensors: Sequence[int]) -> tuple[Plan, np.ndarray]:
    """Return the plan of some tensors alone, and which bins of the whole plan its bins are.

    >>> from gradsplit.plan import xsp
    >>> part, bins = part_of(xsp(Layout.from_shapes({"w": (2, 3), "b": (2,), "u": (2, 1)})), [1, 2])
    >>> [bin.name for bin in part.bins], bins.tolist()
    (['b', 'u[0:1]', 'u[1:2]'], [2, 3, 4])
    """
    boxes, layout = plan.boxes, plan.layout
    place_T = np.full(len(layout), -1, dtype=np.int64)
    place_T[list(tensors)] = np.arange(len(tensors))
    kept = place_T[boxes.tensor_K] >= 0
    columns = [column[kept] for column in vars(boxes).values()]
    bins, numbers = np.unique(columns[5], return_inverse=True)
    columns[0], columns[5] = place_T[columns[0]], numbers.reshape(-1)
    part = Layout(tuple(layout.names[t] for t in tensors), tuple(layout.shapes[t] for t in tensors))
    width_T = plan.width_T[list(tensors)]
    return Plan(part, Boxes.from_columns(*columns), modules=plan.modules, width_T=width_T), bins
