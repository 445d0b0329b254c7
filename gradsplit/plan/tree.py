"""The tree of a plan: root, modules by dotted name, tensors, and the bins as its leaves.

Nodes are numbered breadth first, so that the nodes of one depth are one slice, and the children of a node are
neighbours. Sums over children are then sums over sorted segments, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .boxes import Boxes
from .layout import Layout

__all__ = ["BIN", "LEVELS", "Tree", "tensors_of_bins"]

LEVELS = ("root", "module", "tensor", "bin")
ROOT, MODULE, TENSOR, BIN = range(4)


@dataclass(frozen=True)
class Tree:
    """Parents before children.

    Attributes:
        parents_N: (N,) index of each node's parent; -1 for the root, which is node 0.
        levels_N: (N,) position in `LEVELS`.
        depth_starts: first node of each depth, and N at the end.
        bin_nodes_B: (B,) node of each bin.
        names: names of the nodes that are not bins, by node index.
    """

    parents_N: np.ndarray
    levels_N: np.ndarray
    depth_starts: tuple[int, ...]
    bin_nodes_B: np.ndarray
    names: dict[int, str]

    @classmethod
    def build(cls, layout: Layout, boxes: Boxes, num_bins: int, *, modules: bool) -> Tree:
        """Number the nodes above the bins. A bin over several tensors hangs below the root."""
        tensor_B, single_B = tensors_of_bins(boxes, num_bins)
        owns_bins = np.zeros(len(layout), dtype=bool)
        owns_bins[tensor_B[single_B]] = True
        inner, node_of_tensor = _inner_nodes(layout, owns_bins, modules=modules)

        # The few inner nodes by Python, the many bins by numpy: sort each depth by the parent's new number.
        inner_parent, inner_depth = np.array([one.parent for one in inner]), np.array([one.depth for one in inner])
        parent_B = np.where(single_B, node_of_tensor[tensor_B], 0)
        depth_B = (inner_depth[parent_B] + 1).astype(np.int16)
        del tensor_B, single_B
        new_of_inner = np.zeros(len(inner), dtype=np.int64)
        parents_N = np.full(len(inner) + num_bins, -1, dtype=np.int64)
        levels_N = np.full(len(inner) + num_bins, BIN, dtype=np.int8)
        levels_N[0] = ROOT
        bin_nodes_B = np.zeros(num_bins, dtype=np.int64)
        names, starts = {0: inner[0].name}, [0, 1]
        for depth in range(1, int(max(depth_B.max(), inner_depth.max())) + 1):
            here = np.flatnonzero(inner_depth == depth)
            bins = np.flatnonzero(depth_B == depth)
            parent = new_of_inner[np.concatenate((inner_parent[here], parent_B[bins]))]
            order = np.argsort(parent, kind="stable")
            parents_N[starts[-1] : starts[-1] + len(order)] = parent[order]
            place = parent  # its space is free now
            place[order] = np.arange(starts[-1], starts[-1] + len(order))
            new_of_inner[here] = place[: len(here)]
            levels_N[place[: len(here)]] = [inner[i].level for i in here]
            bin_nodes_B[bins] = place[len(here) :]
            names.update({int(new_of_inner[i]): inner[i].name for i in here})
            starts.append(starts[-1] + len(order))
        return cls(parents_N, levels_N, tuple(starts), bin_nodes_B, names)

    def bin_of_node(self, node: int) -> int:
        """Return the bin that sits at a node of level "bin"."""
        return int(self._order_of_bins[np.searchsorted(self.bin_nodes_B, node, sorter=self._order_of_bins)])

    @cached_property
    def _order_of_bins(self) -> np.ndarray:
        return np.argsort(self.bin_nodes_B)


class _Inner(NamedTuple):
    """A node above the bins, as it is found; `Tree.build` numbers it anew."""

    name: str
    parent: int
    level: int
    depth: int


def _inner_nodes(layout: Layout, owns_bins: np.ndarray, *, modules: bool) -> tuple[list[_Inner], np.ndarray]:
    """Return root, modules and tensors, parents before children, and the node of each tensor that owns bins."""
    nodes = [_Inner("all", -1, ROOT, 0)]
    module_index: dict[str, int] = {}

    def add(name: str, parent: int, level: int) -> int:
        nodes.append(_Inner(name, parent, level, nodes[parent].depth + 1))
        return len(nodes) - 1

    node_of_tensor = np.zeros(len(layout), dtype=np.int64)
    for t in np.flatnonzero(owns_bins):
        parent = 0
        path = layout.names[t].split(".")[:-1] if modules else []
        for i in range(len(path)):
            dotted = ".".join(path[: i + 1])
            if dotted not in module_index:
                module_index[dotted] = add(dotted, parent, MODULE)
            parent = module_index[dotted]
        node_of_tensor[t] = add(layout.names[t], parent, TENSOR)
    return nodes, node_of_tensor


def tensors_of_bins(boxes: Boxes, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each bin's first tensor, and whether it lies in that one alone."""
    if len(boxes) == num_bins and bool((boxes.bin_K[1:] == boxes.bin_K[:-1] + 1).all()):
        return boxes.tensor_K, np.ones(num_bins, dtype=bool)
    first_B = np.full(num_bins, np.iinfo(np.int64).max)
    last_B = np.full(num_bins, -1, dtype=np.int64)
    np.minimum.at(first_B, boxes.bin_K, boxes.tensor_K)
    np.maximum.at(last_B, boxes.bin_K, boxes.tensor_K)
    return first_B, first_B == last_B
