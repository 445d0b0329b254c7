"""The outline: the nodes a recording keeps, few enough to store at every step, and which bins each one sums up.

A plan may have a million bins; a recording has at most about a thousand leaves. A leaf is a run of neighbouring bins of
one tensor, so its square is the sum of theirs; tensors, modules and the root are sums of leaves and are never stored.

Shape suffixes: _B one entry per bin of the plan, _L one per leaf, _N one per node of the outline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...plan import Layout, Plan, tree_sp, xsp
from .checks import check_outline

__all__ = ["Outline", "recording_plan"]

_PARTS = (64, 32, 16, 8, 4, 2, 1)


def recording_plan(layout: Layout, *, max_nodes: int = 1000) -> Plan:
    """Return the plan that is measured when nothing is bounded: row blocks, as fine as ``max_nodes`` allows.

    Every tensor is cut along its rows into at most 64 blocks, halved until leaves, tensors and modules together are
    at most ``max_nodes``; a layout of more tensors than that is left at one leaf per tensor.

    >>> recording_plan(Layout.from_shapes({"w": (6, 2)}), max_nodes=5).num_bins
    4
    """
    tree = tree_sp(layout)
    above = tree.num_nodes - tree.num_bins
    for parts in _PARTS:
        leaves = sum(min(rows, parts) for rows in layout.rows)
        if parts == 1 or above + leaves <= max_nodes + 1:
            break
    return xsp(layout, parts=parts)


@dataclass(frozen=True)
class Outline:
    """Leaves that are stored, and the tree of modules and tensors above them; parents come before children.

    Attributes:
        names_N: dotted names; leaves are named like bins, ``decoder.3.attn.q[128:192]``.
        levels_N: "root", "module", "tensor" or "leaf".
        parents_N: (N,) index of the parent, -1 for the root.
        nodes_L: (L,) the node of each leaf; a tensor with a single leaf is that leaf.
        tensors_L: (L,) name of the leaf's tensor; "all" for a bin across tensors.
        numel_L: (L,) elements.
        bins_L: (L,) bins of the plan in each leaf.
        leaf_of_bin_B: (B,) the leaf of each bin; empty when the outline was read from a file.
    """

    names_N: tuple[str, ...]
    levels_N: tuple[str, ...]
    parents_N: np.ndarray
    nodes_L: np.ndarray
    tensors_L: tuple[str, ...]
    numel_L: np.ndarray
    bins_L: np.ndarray
    leaf_of_bin_B: np.ndarray

    @classmethod
    def of(cls, plan: Plan, *, max_nodes: int = 1000) -> Outline:
        """Return the outline of a plan: its bins where they are few, runs of neighbouring bins otherwise."""
        first_B, tensor_B = _first_box(plan), _tensor_of_bin(plan)
        num_tensors = len(plan.layout)
        counts_T = np.bincount(tensor_B[tensor_B >= 0], minlength=num_tensors)
        alone = np.flatnonzero(tensor_B < 0)
        tree = tree_sp(plan.layout)
        above = tree.num_nodes - tree.num_bins
        for parts in (1 << 62, *_PARTS):
            leaves_T = np.minimum(counts_T, parts)
            if parts == 1 or above + int(leaves_T.sum()) + len(alone) <= max_nodes + 1:
                break
        start_T = np.concatenate(([0], np.cumsum(leaves_T)))
        leaf_of_bin_B = np.empty(plan.num_bins, dtype=np.int64)
        for t in np.flatnonzero(counts_T):
            members = np.flatnonzero(tensor_B == t)
            order = members[np.argsort(first_B[members], kind="stable")]
            cuts = np.arange(leaves_T[t]) * len(order) // leaves_T[t]  # the slices of `xsp`
            leaf_of_bin_B[order] = start_T[t] + np.searchsorted(cuts, np.arange(len(order)), side="right") - 1
        leaf_of_bin_B[alone] = start_T[-1] + np.arange(len(alone))
        num_leaves = int(start_T[-1]) + len(alone)
        names = _leaf_names(plan, leaf_of_bin_B, num_leaves)
        tensor_of_leaf = np.full(num_leaves, -1)
        tensor_of_leaf[leaf_of_bin_B] = tensor_B
        tensors_L = tuple(plan.layout.names[t] if t >= 0 else "all" for t in tensor_of_leaf)
        numel_L = np.bincount(leaf_of_bin_B, weights=plan.numel_B, minlength=num_leaves)
        bins_L = np.bincount(leaf_of_bin_B, minlength=num_leaves)
        names_N, levels_N, parents_N, nodes_L = _tree(names, tensors_L)
        return cls(names_N, levels_N, parents_N, nodes_L, tensors_L, numel_L, bins_L, leaf_of_bin_B)

    @property
    def num_leaves(self) -> int:
        """L: the numbers stored per step."""
        return len(self.nodes_L)

    @property
    def num_nodes(self) -> int:
        """N: leaves, tensors, modules and the root."""
        return len(self.names_N)

    @cached_property
    def leaf_names(self) -> tuple[str, ...]:
        """(L,) the leaves' names."""
        return tuple(self.names_N[node] for node in self.nodes_L)

    @cached_property
    def leaves_of_N(self) -> tuple[np.ndarray, ...]:
        """(N,) which leaves lie at or below each node."""
        below: list[list[int]] = [[] for _ in self.names_N]
        for leaf, node in enumerate(self.nodes_L.tolist()):
            at = node
            while at >= 0:
                below[at].append(leaf)
                at = int(self.parents_N[at])
        return tuple(np.array(leaves, dtype=np.int64) for leaves in below)

    def children(self, node: int) -> list[int]:
        """Return the nodes directly below a node, in order."""
        return np.flatnonzero(self.parents_N == node).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists from which `from_dict` makes the outline again, without the plan's bins."""
        return {
            "names": list(self.names_N),
            "levels": list(self.levels_N),
            "parents": self.parents_N.tolist(),
            "nodes_of_leaves": self.nodes_L.tolist(),
            "tensors_of_leaves": list(self.tensors_L),
            "numel": self.numel_L.tolist(),
            "bins": self.bins_L.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Outline:
        """Make the outline that `to_dict` described.

        Raises:
            ValueError: something else, see `check_outline`.
        """
        check_outline(state)
        return cls(
            tuple(state["names"]),
            tuple(state["levels"]),
            np.array(state["parents"], dtype=np.int64),
            np.array(state["nodes_of_leaves"], dtype=np.int64),
            tuple(state["tensors_of_leaves"]),
            np.array(state["numel"], dtype=np.float64),
            np.array(state["bins"], dtype=np.int64),
            np.zeros(0, dtype=np.int64),
        )


def _first_box(plan: Plan) -> np.ndarray:
    """(B,) the position of each bin's first box, which orders the bins of a tensor from top left."""
    first = np.full(plan.num_bins, len(plan.bin_K), dtype=np.int64)
    order = np.lexsort((plan.col_start_K, plan.row_start_K, plan.tensor_K))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    np.minimum.at(first, plan.bin_K, place)
    return first


def _tensor_of_bin(plan: Plan) -> np.ndarray:
    """(B,) the tensor that each bin lies in; -1 for a bin that lies in several."""
    low = np.full(plan.num_bins, len(plan.layout), dtype=np.int64)
    high = np.full(plan.num_bins, -1, dtype=np.int64)
    np.minimum.at(low, plan.bin_K, plan.tensor_K)
    np.maximum.at(high, plan.bin_K, plan.tensor_K)
    return np.where(low == high, low, -1)


def _leaf_names(plan: Plan, leaf_of_bin_B: np.ndarray, num_leaves: int) -> list[str]:
    """A single bin lends its name. Full rows are named by their numbers, anything else by its bins."""
    leaf_K = leaf_of_bin_B[plan.bin_K]
    top = np.full(num_leaves, np.iinfo(np.int64).max)
    bottom, area = np.zeros(num_leaves, dtype=np.int64), np.zeros(num_leaves)
    np.minimum.at(top, leaf_K, plan.row_start_K)
    np.maximum.at(bottom, leaf_K, plan.row_stop_K)
    np.add.at(area, leaf_K, plan.boxes.numel_K)
    tensor_L = np.zeros(num_leaves, dtype=np.int64)
    tensor_L[leaf_K] = plan.tensor_K
    bins_L = np.bincount(leaf_of_bin_B, minlength=num_leaves)
    first_bin_L = np.zeros(num_leaves, dtype=np.int64)
    first_bin_L[leaf_of_bin_B[::-1]] = np.arange(plan.num_bins)[::-1]
    names = []
    for leaf in range(num_leaves):
        t, rows = int(tensor_L[leaf]), int(bottom[leaf] - top[leaf])
        if bins_L[leaf] == 1:
            names.append(plan.bins[int(first_bin_L[leaf])].name)
        elif rows == plan.layout.rows[t] and area[leaf] == plan.layout.numels[t]:
            names.append(plan.layout.names[t])
        elif area[leaf] == rows * plan.layout.cols[t]:
            names.append(f"{plan.layout.names[t]}[{top[leaf]}:{bottom[leaf]}]")
        else:
            names.append(f"{plan.layout.names[t]}[{bins_L[leaf]} bins from {int(first_bin_L[leaf])}]")
    return names


def _tree(
    leaf_names: list[str], tensors_L: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray, np.ndarray]:
    """Root, modules by dotted name, tensors, leaves."""
    names, levels, parents = ["all"], ["root"], [-1]
    place = {"": 0}

    def add(name: str, level: str, parent: int) -> int:
        names.append(name)
        levels.append(level)
        parents.append(parent)
        return len(names) - 1

    nodes_L = np.zeros(len(leaf_names), dtype=np.int64)
    tensor_node: dict[str, int] = {}
    num_leaves = Counter(tensors_L)
    for leaf, (name, tensor) in enumerate(zip(leaf_names, tensors_L, strict=True)):
        path, parent = tensor.split(".")[:-1], 0
        for depth in range(len(path)):
            dotted = ".".join(path[: depth + 1])
            if dotted not in place:
                place[dotted] = add(dotted, "module", parent)
            parent = place[dotted]
        if num_leaves[tensor] == 1:
            nodes_L[leaf] = add(name, "tensor", parent)
            continue
        if tensor not in tensor_node:
            tensor_node[tensor] = add(tensor, "tensor", parent)
        nodes_L[leaf] = add(name, "leaf", tensor_node[tensor])
    return tuple(names), tuple(levels), np.array(parents, dtype=np.int64), nodes_L
