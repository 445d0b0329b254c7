"""Tree-SP, tree splitting: the module tree above tensors, or above the bins of an inner strategy."""

from __future__ import annotations

from collections.abc import Callable

from .layout import Layout, check_layout
from .plan import Plan
from .registry import Strategy, register, strategy_named
from .slices import per_tensor

__all__ = ["tree_sp"]


def tree_sp(layout: Layout, *, inner: Callable[[Layout], Plan] | str | None = None) -> Plan:
    """Make the module tree by dotted name, so that a budget can set a limit at every level.

    The nodes are the root, one node per module, one per tensor, and the bins. The bins are the tensors, or those of
    ``inner``.

    Args:
        layout: names and shapes; ``"decoder.0.attn.weight"`` lies below modules ``decoder``, ``decoder.0``,
            ``decoder.0.attn``.
        inner: the strategy that cuts the tensors, as a function ``layout -> plan`` or a registered name; None: one
            bin per tensor.

    Raises:
        ValueError: an unknown inner name or one that needs energies; inner bins that span several tensors, which have
            no place in a tree of modules.

    >>> plan = tree_sp(Layout.from_shapes({"a.w": (2, 3), "a.b": (2,)}), inner="xsp")
    >>> [f"{node.level} {node.name}" for node in plan.nodes]
    ['root all', 'module a', 'tensor a.w', 'tensor a.b', 'bin a.w[0:1]', 'bin a.w[1:2]', 'bin a.b']
    """
    check_layout(layout, call="tree_sp")
    if isinstance(inner, str):
        row = strategy_named(inner, call=f"tree_sp(inner={inner!r})")
        if row.needs_energy:
            raise ValueError(
                f"tree_sp(inner={inner!r}): expected a strategy that cuts by shapes alone, got one that needs "
                f"energies. Pass a function, for example inner=lambda layout: {inner}(layout, energy)."
            )
        inner = row.make
    flat = per_tensor(layout) if inner is None else inner(layout)
    boxes, num_bins = flat.boxes, flat.num_bins
    del flat  # its tree is as large as the one to come
    if len(boxes) != num_bins:
        raise ValueError(
            f"tree_sp(inner={getattr(inner, '__name__', inner)!r}): expected bins inside one tensor each, got a bin of "
            "several boxes. Use xsp, lbf or per_tensor inside; a limit for the whole model is a budget at level 'root'."
        )
    return Plan(layout, boxes, modules=True)


register(Strategy("tree_sp", tree_sp, "the module tree above the tensors; a limit at every level"))
