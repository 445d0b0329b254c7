"""What every strategy must do. A strategy is a function layout -> plan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradsplit.plan import LEVELS, Layout, Plan
from tests.laws.oracles import bins_below, label_elements

Make = Callable[[Layout], Plan]


def check_exact_cover(make: Make, layout: Layout) -> None:
    """Every element of every tensor lies in exactly one bin, and no bin is empty."""
    plan = make(layout)
    labels = np.concatenate([canvas.reshape(-1) for canvas in label_elements(plan)])
    counts = np.bincount(labels, minlength=plan.num_bins)
    assert len(counts) == plan.num_bins, "a label beyond the number of bins"
    assert (counts > 0).all(), "a bin without elements"
    np.testing.assert_array_equal(counts, plan.numel_B)


def check_tree(make: Make, layout: Layout) -> None:
    """Parents come before children, the bins are the leaves, and a tensor's bins lie below its node."""
    plan = make(layout)
    parents, levels = plan.parents_N, plan.levels_N
    assert parents[0] == -1, "node 0 is not the root"
    assert levels[0] == 0, "the root is not of level root"
    assert (parents[1:] >= 0).all(), "a second root"
    assert (parents[1:] < np.arange(1, plan.num_nodes)).all(), "a child before its parent"
    assert (levels[1:] >= levels[parents[1:]]).all(), "a level below its own children"
    leaves = np.setdiff1d(np.arange(plan.num_nodes), parents)
    np.testing.assert_array_equal(np.sort(plan.bin_nodes_B), leaves, "the leaves are not the bins")
    assert (levels[plan.bin_nodes_B] == LEVELS.index("bin")).all(), "a bin of another level"
    below = bins_below(plan)
    for node in plan.nodes:
        if node.level == "tensor":
            inside = [b for b in below[node.index] if {box.tensor for box in plan.bins[b].boxes} == {node.name}]
            assert inside == below[node.index], f"a bin of another tensor below {node.name}"
        if node.level == "module":
            outside = [
                b
                for b in below[node.index]
                if not all(box.tensor.startswith(node.name + ".") for box in plan.bins[b].boxes)
            ]
            assert not outside, f"a bin of another module below {node.name}"


def check_names_one_partition(make: Make, layout: Layout) -> None:
    """The same call gives the same plan, its fingerprint names it, and it survives being written down."""
    plan = make(layout)
    assert plan.fingerprint == make(layout).fingerprint, "the same call gave another plan"
    again = Plan.from_dict(plan.to_dict())
    assert again.fingerprint == plan.fingerprint, "to_dict lost something"
    np.testing.assert_array_equal(again.parents_N, plan.parents_N)
    np.testing.assert_array_equal(again.bin_nodes_B, plan.bin_nodes_B)
    names = [each.name for each in plan.bins]
    assert len(set(names)) == len(names), "two bins of one name"


def check_order_of_tensors(make: Make, layout: Layout) -> None:
    """Permuting the tensors permutes the bins: which elements share a bin does not change."""
    reverse = Layout(layout.names[::-1], layout.shapes[::-1])

    def partition(plan: Plan) -> set[frozenset[tuple[str, int]]]:
        bins: list[set[tuple[str, int]]] = [set() for _ in range(plan.num_bins)]
        for name, canvas in zip(plan.layout.names, label_elements(plan), strict=True):
            for element, b in enumerate(canvas.reshape(-1)):
                bins[b].add((name, element))
        return {frozenset(members) for members in bins}

    assert partition(make(layout)) == partition(make(reverse)), "the partition depends on the order of the tensors"
