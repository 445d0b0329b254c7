"""Broken strategies. Each is named for the law that must catch it."""

from __future__ import annotations

import copy
import itertools

import numpy as np

from gradsplit.plan import Boxes, Layout, Plan, xsp
from tests.laws import laws_of_plans as laws

_calls = itertools.count()


def _unchecked(plan: Plan, **columns: np.ndarray) -> Plan:
    """A plan whose boxes were replaced behind the back of Plan's own checks."""
    broken = copy.copy(plan)
    kept = {key: column.copy() for key, column in vars(plan.boxes).items()}
    vars(broken)["boxes"] = Boxes(**(kept | columns))
    vars(broken).pop("numel_B", None)
    return broken


def loses_the_last_row(layout: Layout) -> Plan:
    plan = xsp(layout, parts=1)
    stop = plan.row_stop_K.copy()
    stop[-2] -= 1
    return _unchecked(plan, row_stop_K=stop)


def covers_a_row_twice(layout: Layout) -> Plan:
    plan = xsp(layout)
    start = plan.row_start_K.copy()
    start[np.flatnonzero(start)[0]] -= 1
    return _unchecked(plan, row_start_K=start)


def rows_and_columns_swapped(layout: Layout) -> Plan:
    plan = xsp(layout)
    b = plan.boxes
    return _unchecked(
        plan,
        row_start_K=b.col_start_K,
        row_stop_K=b.col_stop_K,
        col_start_K=b.row_start_K,
        col_stop_K=b.row_stop_K,
    )


def numbers_with_a_gap(layout: Layout) -> Plan:
    return _unchecked(xsp(layout), bin_K=np.maximum(xsp(layout).bin_K, 1))


def _with_parents(plan: Plan, parents: np.ndarray) -> Plan:
    broken = copy.copy(plan)
    vars(broken)["tree"] = copy.copy(plan.tree)
    object.__setattr__(broken.tree, "parents_N", parents)
    return broken


def child_before_its_parent(layout: Layout) -> Plan:
    plan = xsp(layout)
    parents = plan.parents_N.copy()
    parents[1] = plan.num_nodes - 1
    return _with_parents(plan, parents)


def bin_below_another_tensor(layout: Layout) -> Plan:
    plan = xsp(layout)
    parents = plan.parents_N.copy()
    parents[plan.bin_nodes_B[-1]] = parents[plan.bin_nodes_B[0]]
    return _with_parents(plan, parents)


def another_plan_at_every_call(layout: Layout) -> Plan:
    return xsp(layout, parts=2 + next(_calls) % 2)


def cuts_by_position_in_the_layout(layout: Layout) -> Plan:
    """The first two tensors are left whole, whichever they are."""
    boxes = xsp(Layout(layout.names[:2], layout.shapes[:2]), parts=1).boxes
    rest = xsp(layout).boxes
    later = rest.tensor_K > 1
    columns = [
        np.concatenate((a, b[later]))
        for a, b in zip(list(vars(boxes).values())[:5], list(vars(rest).values())[:5], strict=True)
    ]
    return Plan(layout, Boxes.from_columns(*columns, np.arange(len(columns[0]))))


MUTANTS = {
    loses_the_last_row: laws.check_exact_cover,
    covers_a_row_twice: laws.check_exact_cover,
    rows_and_columns_swapped: laws.check_exact_cover,
    numbers_with_a_gap: laws.check_exact_cover,
    child_before_its_parent: laws.check_tree,
    bin_below_another_tensor: laws.check_tree,
    another_plan_at_every_call: laws.check_names_one_partition,
    cuts_by_position_in_the_layout: laws.check_order_of_tensors,
}
